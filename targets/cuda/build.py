"""Building for CUDA: the module's source is taken out of TVM's result and assembled for each architecture.

TVM compiles CUDA source when an artifact is loaded, which would need a compiler on every machine that runs one. Here the
source becomes machine code at once; model.so keeps the host's half, and ``kernels-ARCH.bin`` holds TVM's serialised
form of a CUDA module (format, table of kernels, code), which the runtime hands to TVM's loader as it is.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import tvm
from tvm import relax

from llmc.artifact import DeviceCode, DeviceImage, DeviceKernel
from llmc.targets import simt
from llmc.targets.backend import Built
from llmc.targets.cuda import compiler, resources


def build(module: Any, target: Any, archs: tuple[str, ...]) -> Built:
    """Build a module in VM form for `archs`, with one source that all of them can run.

    Raises:
        LlmcError: no compiler, source refused, or a kernel that exceeds a limit.
    """
    compiler.which()  # before the long work
    pipeline = simt.register()
    with target:
        executable = relax.build(
            module, target, relax_pipeline=None, tir_pipeline=pipeline, exec_mode="bytecode"
        )
    host, device = _find_device(executable.mod)
    source = str(device.inspect_source())
    table = _kernel_table(host, source)
    host.clear_imports()
    threads = threads_of(source)
    files: dict[str, bytes] = {}
    images: list[DeviceImage] = []
    kernels: list[DeviceKernel] = []
    for arch in archs:
        done = compiler.assemble(source, arch)
        found = resources.parse(done.log)
        resources.check(found, threads)
        kernels.extend(found)
        name = f"kernels-{arch}.bin"
        files[name] = serialised("cubin", table, done.cubin)
        images.append(DeviceImage(arch, name, "cubin"))
    code = DeviceCode(compiler.version(), tuple(images), tuple(kernels))
    return Built(executable, files, code)


def threads_of(source: str) -> dict[str, int]:
    """Kernel -> threads of a block, from its launch bounds."""
    found = re.findall(r"__launch_bounds__\((\d+)[^)]*\)\s+(\w+)\(", source)
    return {name: int(threads) for threads, name in found}


def _find_device(root: Any) -> tuple[Any, Any]:
    """(module that imports the CUDA module, the CUDA module)."""
    for child in root.imports:
        if str(child.kind) == "cuda":
            return root, child
        try:
            return _find_device(child)
        except LookupError:
            continue
    raise LookupError("no CUDA module")


def _kernel_table(host: Any, source: str) -> bytes:
    """TVM's serialised table of kernels (name, argument types, launch parameters), as it packs it for `host`."""
    text = str(tvm.get_global_func("runtime.ModulePackImportsToC")(host, False, ""))
    packed = bytes(int(x, 16) for x in re.findall(r"0x([0-9a-fA-F]{2})", text))
    # ... "cuda", size of what follows, then "cuda", table, source; each text behind its length as 64 bits
    head = _text(b"cuda")
    start = packed.index(head) + len(head) + 8
    if not packed.startswith(head, start):
        raise AssertionError("TVM packs CUDA modules in another way than this version of llmc knows")
    end = packed.index(_text(source.encode()), start)
    return packed[start + len(head) : end]


def serialised(kind: str, table: bytes, code: bytes) -> bytes:
    """A CUDA module as TVM's loader (ffi.Module.load_from_bytes.cuda) reads it."""
    return _text(kind.encode()) + table + _text(code)


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw
