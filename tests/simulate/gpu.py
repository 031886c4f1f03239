"""GPU kernels called like compiled ones, in the simulator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import tvm

from llmc.caps import Capabilities
from llmc.simulate import Kernel
from llmc.targets import simt
from llmc.targets.cuda.backend import capabilities, tvm_target

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Tensor:
    """An array with the method that tests of compiled kernels ask tensors for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.array(array, order="C", copy=None)

    def numpy(self) -> np.ndarray:
        return self.array


class SimulatedTools:
    """What tests/schedules/conftest.py calls Tools, for kernels with blocks and threads."""

    dtypes: ClassVar = DTYPES
    exact: ClassVar = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}

    def build(self, caps: Capabilities, **funcs: Any) -> dict[str, Callable[..., None]]:
        named = {name: func.with_attr("global_symbol", name) for name, func in funcs.items()}
        lowered = simt.lower(tvm.IRModule(named), tvm_target(caps))
        return {name: partial(self._call, Kernel(lowered[name])) for name in funcs}

    @staticmethod
    def _call(kernel: Kernel, *args: Any) -> None:
        kernel.run([a.array if isinstance(a, Tensor) else a for a in args])

    tensor = Tensor

    @staticmethod
    def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return rng.standard_normal(shape).astype(DTYPES[dtype])


def gpu(preset: str = "sm_90") -> Capabilities:
    return capabilities(preset)
