"""Capabilities that this machine can run, and building a kernel for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

from llmc.caps import ByteDot, Capabilities, TileUnit
from llmc.host import architecture, features
from llmc.targets.codegen import tir_pipeline
from llmc.targets.cpu.backend import _PRESETS, capabilities, detect, tvm_target

_RUNNABLE = {
    name
    for name, preset in _PRESETS.items()
    if set(preset["features"]) <= (features() or frozenset()) and preset["machine"] == architecture()
}
# the best preset of this machine, and AVX2, whose code takes the paths without a bf16 dot product
PRESETS = sorted({detect(), "x86-64-v3"} & _RUNNABLE) or [detect()]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(params=PRESETS)
def caps(request: pytest.FixtureRequest) -> Capabilities:
    return capabilities(request.param)


@pytest.fixture
def best() -> Capabilities:
    """This machine's capabilities."""
    return capabilities("")


@pytest.fixture
def emulated(best: Capabilities) -> Capabilities:
    """This machine with emulated tiles; vectors of 16 lanes, as the machines have that have the unit."""
    if best.lanes_f32 != 16:
        best = replace(best, vector_bytes=64, vector_registers=32, has_lookup=False, byte_dot=ByteDot.NONE)
    return replace(best, tiles=TileUnit.EMULATED)


class Tools:
    """Building and calling kernels."""

    dtypes: ClassVar = DTYPES
    exact: ClassVar = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}

    def __init__(self) -> None:
        self._alive: list[Any] = []

    def build(self, caps: Capabilities, **funcs: Any) -> Any:
        """Compile PrimFuncs into one library; index it by name."""
        import tvm

        module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in funcs.items()})
        library = tvm.compile(module, target=tvm_target(caps), tir_pipeline=tir_pipeline())
        self._alive.append(library)
        return library

    def assembly(self, caps: Capabilities, **funcs: Any) -> str:
        return str(self.build(caps, **funcs).mod.inspect_source("s"))

    @staticmethod
    def tensor(array: np.ndarray) -> Any:
        import tvm

        return tvm.runtime.tensor(array)

    @staticmethod
    def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return rng.standard_normal(shape).astype(DTYPES[dtype])


@pytest.fixture
def tools() -> Iterator[Tools]:
    yield Tools()
