"""Artifacts for the fake GPU: as `llmc compile` makes them, with the TIR of their kernels beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmc import cuda_driver
from llmc.cuda_driver import CudaDriver
from llmc.pipeline import CompileResult, compile_model
from llmc.runtime import model as model_module
from llmc.targets import simt
from llmc.targets.cuda import compiler
from tests.runtime.fake_cuda.device import KERNELS, FakeGpu


@contextmanager
def kept_kernels(folder: Path) -> Iterator[None]:
    """Write the device's kernels of what is built meanwhile to folder/kernels.json."""
    import tvm

    original = simt._splitting

    def keep(module: Any, _: Any) -> Any:
        device = {
            gvar: func
            for gvar, func in module.functions.items()
            if func.attrs and "tirx.kernel_launch_params" in func.attrs
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KERNELS).write_text(tvm.ir.save_json(tvm.IRModule(device)))
        return module

    def splitting() -> list[Any]:
        first, *rest = original()
        return [first, tvm.ir.transform.module_pass(keep, opt_level=0, name="KeepKernels"), *rest]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simt, "_splitting", splitting)
        yield


def compile_for_fake(
    model: Any, folder: Path, *, assemble: bool = False, here: FakeGpu | None = None, **spec: Any
) -> CompileResult:
    """Compile a model to folder/artifact.

    Args:
        assemble: really; else the code of an image is a list of its kernels' names, and no compiler is needed.
        here: the GPU of this process, which runs the check at the end; None = none is looked for.
    """
    with pytest.MonkeyPatch.context() as patch, kept_kernels(folder):
        if here is None:
            patch.setattr(cuda_driver, "query", lambda: CudaDriver(0, (), "there is no NVIDIA driver"))
        else:
            load = model_module.load_engine

            def known(*args: Any) -> Any:
                here.read(folder / KERNELS)
                return load(*args)

            patch.setattr(model_module, "load_engine", known)
        if not assemble:
            patch.setattr(compiler, "which", lambda: "nvcc")
            patch.setattr(compiler, "version", lambda: "nvrtc 13.0")
            patch.setattr(compiler, "assemble", _names)
        return compile_model(model, folder / "artifact", **spec)


def _names(source: str, arch: str) -> compiler.Assembled:
    names = dict.fromkeys(re.findall(r"__launch_bounds__\(\d+[^)]*\)\s+(\w+)\(", source))
    return compiler.Assembled(" ".join([f"kernels for {arch}:", *names]).encode(), "")
