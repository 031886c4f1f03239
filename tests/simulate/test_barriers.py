"""Every barrier of the hand-written GPU kernels is needed: without any one of them the simulator finds the race."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pytest

from llmc.ops import NormAttrs
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import gemm, matrix_unit
from llmc.schedules.gpu.attention import attention_prefill
from llmc.schedules.gpu.configs import GpuLinearSchedule, Way
from llmc.schedules.gpu.linear import linear
from llmc.schedules.gpu.norm import norm
from llmc.schedules.layout import linear_layout
from llmc.schedules.linear import LinearConfig
from llmc.schedules.norm import NormConfig
from llmc.simulate import SimulationError
from tests.simulate.gpu import DTYPES, SimulatedTools, gpu
from tests.simulate.test_gpu_kernels import BASE

TOOLS = SimulatedTools()
CAPS = gpu()


def run_norm() -> None:
    attrs = NormAttrs(1e-5, center=True)
    kernel = TOOLS.build(CAPS, k=norm(NormConfig((-1, 1024), "float32", "float32", attrs), CAPS))["k"]
    x = np.ones((2, 1024), np.float32)
    kernel(TOOLS.tensor(x), TOOLS.tensor(x.copy()))


def run_linear(rows: int, way: Way = Way.UNTUNED, dtype: str = "bfloat16") -> np.ndarray:
    rng = np.random.default_rng(0)
    weight, x = TOOLS.random(rng, (64, 256), dtype), TOOLS.random(rng, (rows, 256), dtype)
    schedule = GpuLinearSchedule(way, 0, 0, 0, *astuple(gemm.FEW_ROWS)) if way else GpuLinearSchedule()
    cfg = LinearConfig(64, 256, dtype, dtype, "float32", schedule=ByRows((schedule,)))
    kernel = TOOLS.build(CAPS, k=linear(cfg, CAPS))["k"]
    y = TOOLS.tensor(np.full((rows, 64), np.nan, np.float32))
    kernel(TOOLS.tensor(x), TOOLS.tensor(linear_layout(dtype, CAPS).pack(weight)), y)
    return y.numpy()


def run_attention(**changes: Any) -> None:
    from tests.schedules.test_attention import Cache

    cfg = replace(BASE, **changes, sinks_dtype="")
    cache = Cache(cfg, TOOLS, [(1, 300)], np.random.default_rng(0))
    for pool in (cache.k_pool, cache.v_pool):
        pool.array[...] = 1
    kernel = TOOLS.build(CAPS, k=attention_prefill(cfg, CAPS))["k"]
    q, out = (TOOLS.tensor(np.ones(s, DTYPES[cfg.dtype])) for s in ((1, 4, 1, 16), (1, 1, 4, 16)))
    start, context = np.array([0, 1], np.int32), np.array([300], np.int32)
    kernel(q, cache.k_pool, cache.v_pool, *map(TOOLS.tensor, (start, context, cache.table)), 0, out)


# what runs -> barriers in the kernels that it makes, the one with the branch for one row first
CASES: dict[str, tuple[Callable[[], Any], range]] = {
    "norm": (run_norm, range(3)),
    "gemv": (lambda: run_linear(1), range(1)),
    "gemm": (lambda: run_linear(16, Way.UNITS), range(1)),
    "flat": (lambda: run_linear(16), range(2, 3)),
    "attention": (run_attention, range(4)),
}


# one of each kernel by default
EACH = [
    pytest.param(case, i, marks=[pytest.mark.slow] if i != numbers[-1] else [])
    for case, (_, numbers) in CASES.items()
    for i in numbers
]


@pytest.mark.parametrize(("case", "number"), EACH)
def test_without_a_barrier_there_is_a_race(case: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = g.barrier

    def barrier() -> None:
        if len(seen) != number:
            original()
        seen.append(0)

    monkeypatch.setattr(g, "barrier", barrier)
    with pytest.raises(SimulationError, match="simulate-race"):
        CASES[case][0]()
    assert len(seen) > number


def test_a_copy_that_is_not_waited_for_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.isfinite(run_linear(16, Way.UNITS)).all()
    original = matrix_unit.wait
    monkeypatch.setattr(matrix_unit, "wait", lambda groups: original(groups + 1))
    with pytest.raises(SimulationError, match="simulate-race"):
        run_linear(16, Way.UNITS)


def test_a_tile_must_fit_its_warps() -> None:
    with pytest.raises(ValueError, match="not a tile"):
        gemm.TileConfig(16, 64, 16, 24, 3)
    assert all(t.shared_bytes <= 48 << 10 for t in (gemm.FEW_ROWS, gemm.SOME_ROWS, gemm.MANY_ROWS))
