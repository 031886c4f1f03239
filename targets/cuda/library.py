"""Kernels in one file, for measuring: host code, machine code per architecture, and what they take of the GPU.

A zip file: ``host.so``, ``kernels-ARCH.bin`` (see build.py), ``kernels.json``, and ``about.json`` for whoever measures. It
is made where the compiler is and loaded where the GPU is; loading needs TVM's runtime only.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmc.artifact import DeviceKernel
from llmc.caps import Capabilities
from llmc.cuda_driver import CudaDevice
from llmc.link import export_objects, link_objects
from llmc.runtime import cuda
from llmc.runtime.library import ffi

FEW_SPILLED = 32  # bytes per thread that the assembler may trade for more blocks at a time
_HOST, _KERNELS, _ABOUT = "host.so", "kernels.json", "about.json"


def write_library(func: Any, target: Any, caps: Capabilities, path: Path) -> None:
    """Build one PrimFunc as the function ``k`` for the architectures of `caps`.

    Raises:
        LlmcError: no compiler, or a kernel that exceeds a limit.
    """
    write_kernels({"k": func}, target, caps, path)


def write_kernels(
    funcs: Mapping[str, Any], target: Any, caps: Capabilities, path: Path, about: Any = None
) -> None:
    """Build PrimFuncs by name.

    Args:
        about: JSON values for whoever loads them.

    Raises:
        LlmcError: as write_library.
    """
    from llmc.targets.cuda.backend import archs_of
    from llmc.targets.cuda.build import build_kernels

    host, images, kernels = build_kernels(dict(funcs), target, archs_of(caps.preset))
    with tempfile.TemporaryDirectory(prefix="llmc-link-") as work:
        library = Path(work) / _HOST
        link_objects(export_objects(host, Path(work)), library, triple=caps.triple)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as held:
            held.write(library, _HOST)
            for arch, raw in images.items():
                held.writestr(f"kernels-{arch}.bin", raw)
            held.writestr(_KERNELS, json.dumps([asdict(k) for k in kernels]))
            held.writestr(_ABOUT, json.dumps(about))


def kernels_of(path: Path) -> tuple[DeviceKernel, ...]:
    """What the kernels of a library take."""
    with zipfile.ZipFile(path) as held:
        return tuple(DeviceKernel(**values) for values in json.loads(held.read(_KERNELS)))


def unfit(path: Path) -> str:
    """Why a candidate is not worth measuring: registers that do not suffice go to memory; "" if it is.

    A few bytes are mostly spilled outside of the loop, and such a candidate may be the best.
    """
    spilled = {k.name: k.spill_bytes for k in kernels_of(path) if k.spill_bytes > FEW_SPILLED}
    said = ", ".join(f"{name} {count} bytes" for name, count in sorted(spilled.items()))
    return f"registers are spilled: {said}" if spilled else ""


def about(path: Path) -> Any:
    """What the writer said of the kernels."""
    with zipfile.ZipFile(path) as held:
        return json.loads(held.read(_ABOUT))


def load_library(path: Path, device: CudaDevice) -> Any:
    """A module of the functions of a library, with the newest kernels that the device runs.

    Raises:
        RuntimeError: it has none.
    """
    tvm_ffi = ffi()
    with zipfile.ZipFile(path) as held, tempfile.TemporaryDirectory(prefix="llmc-load-") as work:
        named = {name.removeprefix("kernels-").removesuffix(".bin"): name for name in held.namelist()}
        fitting = sorted(arch for arch in named if arch.startswith("sm_") and cuda.runs_on(arch, device))
        if not fitting:
            raise RuntimeError(f"{path.name} has no code for sm_{device.arch}")
        # loaders return an old library for a path that they have seen: a new folder each time, as here
        module = tvm_ffi.load_module(held.extract(_HOST, work), keep_module_alive=False)
        kernels = held.read(named[fitting[-1]])
    module.import_module(cuda.module_from(kernels))
    return module
