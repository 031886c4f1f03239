"""Building for CUDA: the module's source is taken out of TVM's result and assembled for each architecture.

TVM compiles CUDA source when an artifact is loaded, which would need a compiler on every machine that runs one. Here the
source becomes machine code at once; model.so keeps the host's half, and ``kernels-ARCH.bin`` holds TVM's serialised
form of a CUDA module (format, table of kernels, code), which the runtime hands to TVM's loader as it is.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from llmc import sample_layout
from llmc.artifact import DeviceCode, DeviceImage, DeviceKernel
from llmc.caps import Capabilities
from llmc.schedules.gpu.sample import sample
from llmc.targets import simt
from llmc.targets.backend import Built
from llmc.targets.cuda import compiler, resources
from llmc.targets.cuda.backend import capabilities


def build(module: Any, target: Any, caps: Capabilities, archs: tuple[str, ...]) -> Built:
    """Build a module in VM form for `archs`, with one source that all of them can run, and the sampling kernels.

    Raises:
        LlmcError: no compiler, source refused, or a kernel that exceeds a limit.
    """
    compiler.which()  # before the long work
    sampler = sample_layout.SampleConfig(vocab_of(module))
    module = tvm.IRModule(dict(module.functions.items()), attrs=module.attrs)
    module[sample_layout.FUNCTION] = sample(sampler, caps).with_attr("global_symbol", sample_layout.FUNCTION)
    pipeline = simt.register()
    with target, source_only():
        executable = relax.build(
            module, target, relax_pipeline=None, tir_pipeline=pipeline, exec_mode="bytecode"
        )
    files, kernels = _assemble(executable.mod, (*archs, *ptx_of(archs)))
    named = {arch: f"kernels-{arch}.bin" for arch in files}
    images = tuple(
        DeviceImage(arch, name, "ptx" if compiler.is_ptx(arch) else "cubin") for arch, name in named.items()
    )
    code = DeviceCode(compiler.version(), images, kernels)
    return Built(executable, {named[arch]: raw for arch, raw in files.items()}, code)


def build_kernels(
    funcs: dict[str, Any], target: Any, archs: tuple[str, ...]
) -> tuple[Any, dict[str, bytes], tuple[DeviceKernel, ...]]:
    """PrimFuncs by themselves, for measuring: (host module, arch -> serialised kernels, what they take)."""
    named = {name: func.with_attr("global_symbol", name) for name, func in funcs.items()}
    with source_only():
        host = tvm.tirx.build(tvm.IRModule(named), target, pipeline=simt.register())
    files, kernels = _assemble(host, archs)
    return host, files, kernels


def _assemble(root: Any, archs: tuple[str, ...]) -> tuple[dict[str, bytes], tuple[DeviceKernel, ...]]:
    """Take the CUDA module out of a built one: (arch -> its serialised form with machine code, the kernels)."""
    host, device = _find_device(root)
    source = str(device.inspect_source())
    table = _kernel_table(host, source)
    host.clear_imports()
    threads, dynamic = threads_of(source), dynamic_shared_of(source)
    files: dict[str, bytes] = {}
    kernels: list[DeviceKernel] = []
    for arch in archs:
        done = compiler.assemble(source, arch)
        if compiler.is_ptx(arch):
            files[arch] = serialised("ptx", table, done.code)
            continue
        found = resources.parse(done.log)
        resources.check(found, threads, dynamic, capabilities(arch).shared_bytes)
        found = tuple(replace(k, shared_bytes=k.shared_bytes + dynamic.get(k.name, 0)) for k in found)
        kernels.extend(found)
        files[arch] = serialised("cubin", table, done.code)
    return files, tuple(kernels)


def ptx_of(archs: tuple[str, ...]) -> tuple[str, ...]:
    """The virtual architecture whose PTX runs on newer GPUs than `archs`: the newest one without features of its own.

    PTX with the suffix ``a`` runs on exactly its architecture (PTX ISA, 11.1), which has machine code already.
    """
    numbers = [int(arch.removeprefix("sm_")) for arch in archs if not arch.endswith("a")]
    return (f"compute_{max(numbers)}",) if numbers else ()


@contextmanager
def source_only() -> Iterator[None]:
    """TVM keeps the source it generates, as it does without a CUDA runtime.

    Where there is a driver, TVM loads its CUDA runtime and calls a compiler of its own choice for the GPU at hand.
    """
    from tvm.support import nvcc  # registers it

    name = "tvm_callback_cuda_compile"
    tvm_ffi.register_global_func(name, lambda code, *_: code.encode(), override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(name, nvcc.tvm_callback_cuda_compile, override=True)


def vocab_of(module: Any) -> int:
    """Columns of the logits."""
    return int(module["step"].ret_ty.shape[-1])


def threads_of(source: str) -> dict[str, int]:
    """Kernel -> threads of a block, from its launch bounds."""
    found = re.findall(r"__launch_bounds__\((\d+)[^)]*\)\s+(\w+)\(", source)
    return {name: int(threads) for threads, name in found}


def dynamic_shared_of(source: str) -> dict[str, int]:
    """Kernel -> bytes of shared memory that its launch asks for, where it does; the assembler does not see them."""
    parts = re.split(r"__launch_bounds__\([^)]*\)\s+(\w+)\([^)]*\)\s*\{", source)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    sizes = {name: re.search(r"llmc_dynamic_shared\((\d+)\)", body) for name, body in bodies.items()}
    return {name: int(size[1]) for name, size in sizes.items() if size}


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
    # ... "cuda", size of what follows, then format, table, source; each text behind its length as 64 bits
    head = _text(b"cuda")
    start = packed.index(head) + len(head) + 8
    kinds = [_text(kind) for kind in (b"cuda", b"cubin", b"ptx", b"fatbin")]
    found = next((kind for kind in kinds if packed.startswith(kind, start)), None)
    if found is None:
        raise AssertionError("TVM packs CUDA modules in another way than this version of llmc knows")
    end = packed.index(_text(source.encode()), start)
    return packed[start + len(found) : end]


def serialised(kind: str, table: bytes, code: bytes) -> bytes:
    """A CUDA module as TVM's loader (ffi.Module.load_from_bytes.cuda) reads it."""
    return _text(kind.encode()) + table + _text(code)


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw
