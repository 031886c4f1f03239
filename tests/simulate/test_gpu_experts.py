"""Experts' matmuls in the simulator: every kind of weight, every size of tile, experts without rows and with all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.caps import Capabilities
from llmc.quant.schemes import by_name
from llmc.schedules.choice import ByRows
from llmc.schedules.experts import ExpertConfig
from llmc.schedules.gpu.configs import GpuExpertSchedule, Way
from llmc.schedules.gpu.experts import expert_linear, quant_expert_linear
from llmc.schedules.layout import linear_layout
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.tune_experts import ExpertKernel
from tests.quant.random_weight import random_weight
from tests.quant.rounded_rows import e4m3_rows
from tests.simulate.gpu import SimulatedTools, gpu
from tests.simulate.test_gpu_quant import check, rounded_rows
from tests.simulate.test_sort_experts import plan_of

TOOLS = SimulatedTools()
# two blocks of threads work through all tiles of a kernel on warpgroups: each has several
GROUPS = replace(gpu("sm_90a"), multiprocessors=2)


def run(
    scheme: str,
    dtype: str,
    bias: bool,
    caps: Capabilities,
    batches: list[np.ndarray],
    schedule: GpuExpertSchedule | None = None,
    shape: tuple[int, int, int] = (5, 40, 200),
) -> None:
    """Multiply rows with random experts (ids by batch), and compare with numpy in float64."""
    experts, n, k = shape
    rng = np.random.default_rng(4)
    if scheme:
        layout: Any = quant_layout(by_name(scheme), n, k, caps)
        weight = random_weight(scheme, experts, n, k)
        values, packed = weight.dequantize(), layout.pack(weight)
        func = quant_expert_linear(QuantExpertConfig(experts, layout, dtype, "float32", has_bias=bias), caps)
    else:
        layout = linear_layout(dtype, caps)
        cfg: Any = ExpertConfig(experts, n, k, dtype, dtype, "float32", has_bias=bias)
        func = expert_linear(ExpertKernel(cfg, ByRows((schedule,))) if schedule else cfg, caps)
        values = TOOLS.random(rng, (experts, n, k), dtype)
        packed = np.stack([layout.pack(v) for v in values])
    kernel = TOOLS.build(caps, k=func)["k"]
    b = TOOLS.random(rng, (experts, n), dtype)
    for ids in batches:
        x, plan = TOOLS.random(rng, (len(ids), k), dtype), plan_of(ids, experts)
        y = TOOLS.tensor(np.full((len(ids), n), np.nan, np.float32))
        kernel(*map(TOOLS.tensor, (x, plan, packed, *([b] if bias else []))), y)
        wide = x.astype(np.float64)
        if scheme.startswith("fp8a8"):
            wide = e4m3_rows(x, by_name(scheme))
        elif "a8" in scheme:
            kept = weight.outlier_columns
            wide = rounded_rows(x.astype(np.float32), None if kept is None else np.atleast_2d(kept)[0])
        expected = np.einsum("rk,rnk->rn", wide, values.astype(np.float64)[ids])
        check(y.numpy(), expected + (b.astype(np.float64)[ids] if bias else 0))


def ids_of(rows: int, experts: int = 5) -> np.ndarray:
    """Random experts, the last of which stays without rows."""
    return np.random.default_rng(rows).integers(0, experts - 1, rows)


def _slow(cases: list[Any]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("scheme", "dtype", "bias", "preset"),
    [
        ("", "bfloat16", True, "sm_90"),
        ("q4g32", "bfloat16", True, "sm_90"),
        ("w4a8", "bfloat16", False, "sm_90"),
        *_slow(
            [
                ("", "float32", True, "sm_90"),
                ("", "float16", False, "sm_75"),
                ("mxfp4", "bfloat16", True, "sm_90"),
                ("q2g96afp", "bfloat16", False, "sm_90"),
                ("w8a8", "float32", True, "sm_75"),
                ("w8a8o", "bfloat16", True, "sm_90"),
            ]
        ),
    ],
)
def test_every_kind_of_weight(scheme: str, dtype: str, bias: bool, preset: str) -> None:
    """One row, a few, more than a tile, and so many that tiles are larger."""
    run(scheme, dtype, bias, gpu(preset), [ids_of(rows) for rows in (1, 7, 50, 90)])


@pytest.mark.parametrize("scheme", ["", "q4g32"])
def test_one_expert_takes_all(scheme: str) -> None:
    ids = [np.full(rows, expert) for rows, expert in ((9, 4), (131, 0))]
    run(scheme, "bfloat16", True, gpu("sm_90"), ids)


@pytest.mark.parametrize(
    ("scheme", "dtype", "bias"),
    [
        ("", "bfloat16", True),
        ("q4g32", "bfloat16", True),
        *_slow(
            [
                ("", "float16", False),
                ("q8", "bfloat16", True),
                ("w8a8", "bfloat16", True),
                ("fp8", "float16", False),
                ("fp8a8", "bfloat16", True),
                ("fp8a8g128", "bfloat16", False),
            ]
        ),
    ],
)
def test_warpgroups(scheme: str, dtype: str, bias: bool) -> None:
    """Two tiles of an expert, one of another, none of the third; rows and columns that do not fill them."""
    ids = np.random.default_rng(0).permutation(np.repeat([0, 1], [150, 41]))
    run(scheme, dtype, bias, GROUPS, [ids], shape=(3, 136, 320))


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        GpuExpertSchedule(Way.THREADS, rows=2, warps=2),
        GpuExpertSchedule(Way.UNITS, tiles=2, warps=8),
        GpuExpertSchedule(Way.WARPGROUPS, tile_columns=256, stages=4),
    ],
)
def test_schedules(schedule: GpuExpertSchedule) -> None:
    run("", "bfloat16", True, GROUPS, [ids_of(70)], schedule, (5, 40, 192))
