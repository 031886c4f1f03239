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
from llmc.targets.cpu.backend import _PRESETS, capabilities, detect, missing, tvm_target
from tests.emulator import Emulator
from tools.run_aarch64 import lacking

_RUNNABLE = {
    name
    for name, preset in _PRESETS.items()
    if set(preset["features"]) <= (features() or frozenset()) and preset["machine"] == architecture()
}
# the best preset of this machine, and AVX2, whose code takes the paths without a bf16 dot product
PRESETS = sorted({detect(), "x86-64-v3"} & _RUNNABLE) or [detect()]
# what runs in an emulator (docs/aarch64.md): the best, one without matrix units, and one without any dot product
EMULATED = ("aarch64-i8mm", "aarch64-dotprod", "aarch64")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def _machine(preset: str) -> Capabilities:
    caps = capabilities(preset)
    if missing(caps) and lacking():
        pytest.skip(f"{caps.preset} cannot run here and {lacking()}")
    return caps


def _emulated(*presets: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in presets]


@pytest.fixture(params=[*PRESETS, *_emulated(*EMULATED)])
def caps(request: pytest.FixtureRequest) -> Capabilities:
    return _machine(request.param)


@pytest.fixture(params=["", *_emulated(*EMULATED[:2])], ids=lambda preset: preset or "best")
def best(request: pytest.FixtureRequest) -> Capabilities:
    """This machine's capabilities; in slow tests, the best of an emulated machine."""
    return _machine(request.param)


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    made = Emulator()
    yield made
    made.close()


@pytest.fixture
def emulated() -> Capabilities:
    """This machine with emulated tiles; vectors of 16 lanes, as the machines have that have the unit."""
    best = capabilities("")
    if best.lanes_f32 != 16:
        best = replace(best, vector_bytes=64, vector_registers=32, has_lookup=False, byte_dot=ByteDot.NONE)
    return replace(best, tiles=TileUnit.EMULATED)


class Tools:
    """Building and calling kernels."""

    dtypes: ClassVar = DTYPES
    exact: ClassVar = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}

    def __init__(self, emulator: Emulator) -> None:
        self._alive: list[Any] = []
        self._emulator = emulator

    def build(self, caps: Capabilities, **funcs: Any) -> Any:
        """Compile PrimFuncs into one library; index it by name. Code for another machine runs in an emulator."""
        library = self.compile(caps, **funcs)
        return self._emulator.library(library, caps.triple) if missing(caps) else library

    def compile(self, caps: Capabilities, **funcs: Any) -> Any:
        """Compile PrimFuncs into one library."""
        import tvm

        module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in funcs.items()})
        library = tvm.compile(module, target=tvm_target(caps), tir_pipeline=tir_pipeline())
        self._alive.append(library)
        return library

    def assembly(self, caps: Capabilities, **funcs: Any) -> str:
        return str(self.compile(caps, **funcs).mod.inspect_source("s"))

    @staticmethod
    def tensor(array: np.ndarray) -> Any:
        import tvm

        return tvm.runtime.tensor(array)

    @staticmethod
    def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return rng.standard_normal(shape).astype(DTYPES[dtype])


@pytest.fixture
def tools(emulator: Emulator) -> Iterator[Tools]:
    yield Tools(emulator)
