"""Kernels of a machine with few registers on weights that are packed for one with many: levels share a file of weights."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmc.caps import Capabilities
from llmc.quant.schemes import by_name
from llmc.schedules.choice import ByRows
from llmc.schedules.experts import ExpertConfig, expert_linear
from llmc.schedules.ilinear import int_linear
from llmc.schedules.layout import BlockedLayout, linear_layout, own_vectors
from llmc.schedules.linear import LinearConfig, LinearSchedule, linear
from llmc.schedules.qlayout import in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig, quant_linear
from llmc.schedules.tunable import Bucket
from llmc.schedules.tune_linear import TunableLinear
from llmc.targets.cpu.backend import capabilities
from tests.quant.random_weight import random_weight
from tests.schedules.conftest import PRESETS, Tools
from tests.schedules.test_ilinear import rounded

WIDE, NARROW = capabilities("x86-64-v4-bf16"), capabilities("x86-64-v3")
here = pytest.mark.skipif("x86-64-v3" not in PRESETS, reason="this machine has no AVX2")
ROWS = (1, 2, 3, 7, 13, 40)
# (scheme, n, k): one group, several, groups of half a piece; bytes, bit planes, quads
QUANTIZED = [("q4g32", 70, 96), ("q8", 130, 67), ("w4a8", 70, 300)]
MORE = [
    ("w8a8", 130, 167),
    ("q4g64a", 64, 130),
    ("q3g64", 40, 192),
    ("q6g128a", 70, 256),
    ("nf4", 33, 128),
    ("mxfp4", 130, 33),
]
MORE += [("q4k", 70, 512), ("q5g16o", 64, 100), ("w4a8g128", 64, 512)]


def close(y: np.ndarray, expected: np.ndarray, bound: float = 1e-6) -> None:
    assert np.abs(y.astype(np.float64) - expected).max() < bound * np.abs(expected).max()


@here
@pytest.mark.parametrize(
    ("dtype", "n", "k", "schedule"),
    [
        ("bfloat16", 130, 167, LinearSchedule(t_block=12)),
        ("float32", 64, 100, LinearSchedule(k_block=48)),
        pytest.param("float16", 70, 33, LinearSchedule(), marks=pytest.mark.slow),
    ],
)
def test_linear(dtype: str, n: int, k: int, schedule: LinearSchedule, tools: Tools) -> None:
    layout = linear_layout(dtype, WIDE)
    cfg = LinearConfig(n, k, dtype, dtype, "float32", True, layout=layout, schedule=ByRows((schedule,)))
    kernel = tools.build(NARROW, k=linear(cfg, NARROW))["k"]
    rng = np.random.default_rng(0)
    weight, bias = tools.random(rng, (n, k), dtype), tools.random(rng, (n,), dtype)
    for rows in ROWS:
        x = tools.random(rng, (rows, k), dtype)
        y = tools.tensor(np.full((rows, n), np.nan, np.float32))
        kernel(tools.tensor(x), tools.tensor(layout.pack(weight)), tools.tensor(bias), y)
        close(y.numpy(), x.astype(np.float64) @ weight.astype(np.float64).T + bias.astype(np.float64))


@here
def test_experts(tools: Tools) -> None:
    experts, n, k = 4, 70, 34
    layout = linear_layout("bfloat16", WIDE)
    cfg = ExpertConfig(experts, n, k, "bfloat16", "bfloat16", "float32", layout=layout)
    kernel = tools.build(NARROW, k=expert_linear(cfg, NARROW))["k"]
    rng = np.random.default_rng(0)
    weight = tools.random(rng, (experts, n, k), "bfloat16")
    for rows in (1, 31):
        x, ids = tools.random(rng, (rows, k), "bfloat16"), rng.integers(0, experts, rows)
        y = tools.tensor(np.full((rows, n), np.nan, np.float32))
        kernel(tools.tensor(x), tools.tensor(ids), tools.tensor(layout.pack(weight)), y)
        close(y.numpy(), np.einsum("rnk,rk->rn", weight[ids].astype(np.float64), x.astype(np.float64)))


@here
@pytest.mark.parametrize(
    "cases", [QUANTIZED, pytest.param(MORE, marks=pytest.mark.slow)], ids=["usual", "more"]
)
def test_quantized(cases: list[tuple[str, int, int]], tools: Tools) -> None:
    """Gated, so that both halves of a wide block are taken."""
    layouts = {s: quant_layout(by_name(s), n, k, WIDE, gated=True) for s, n, k in cases}
    funcs = {}
    for scheme, n, _ in cases:
        cfg = QuantLinearConfig(n, layouts[scheme], "float32", "float32", activation="relu", gated=True)
        funcs[scheme] = (int_linear if layouts[scheme].quads else quant_linear)(cfg, NARROW)
    library = tools.build(NARROW, **funcs)
    rng = np.random.default_rng(1)
    for scheme, n, k in cases:
        layout, weight = layouts[scheme], random_weight(scheme, 2 * n, k)
        packed, values = tools.tensor(layout.pack(in_turns(weight, layout.n_block))), weight.dequantize()
        for rows in (*ROWS, 70):
            x = rng.standard_normal((rows, k)).astype(np.float32)
            y = tools.tensor(np.full((rows, n), np.nan, np.float32))
            library[scheme](tools.tensor(x), packed, y)
            q, scale = rounded(x) if layout.quads else (x.astype(np.float64), 1)
            both = q @ values.astype(np.float64).T * scale
            close(y.numpy(), np.maximum(both[:, :n], 0) * both[:, n:], 2e-6)


def test_which_layouts_are_a_machines_own() -> None:
    for caps, blocks in (
        (WIDE, {16: 1, 32: 2, 64: 0, 128: 8, 8: None, 256: None}),
        (NARROW, {16: 0, 32: 4, 64: None}),
    ):
        for n_block, vectors in blocks.items():
            assert own_vectors(BlockedLayout(n_block, 2), "bfloat16", caps) == vectors
    assert own_vectors(BlockedLayout(64, 1), "bfloat16", WIDE) is None


def test_a_given_layout_is_a_task_of_its_own() -> None:
    """Records of the machine's own layout do not count for another one's, and the tuner cannot change it."""
    tunable, caps = TunableLinear(), NARROW
    own = LinearConfig(64, 64, "bfloat16", "bfloat16", "bfloat16")
    given = LinearConfig(64, 64, "bfloat16", "bfloat16", "bfloat16", layout=linear_layout("bfloat16", WIDE))
    values = [json.loads(json.dumps(tunable.to_values(tunable.task(config)))) for config in (own, given)]
    assert values[0] != values[1] and "layout" not in values[0]
    assert tunable.from_values(values[1]) == tunable.task(given)
    space = {schedule.vectors for schedule in tunable.space(tunable.task(given), Bucket(1, 1), caps)}
    assert space == {0}


def test_no_layout_changes_for_a_machine_alone(caps: Capabilities) -> None:
    assert own_vectors(linear_layout("bfloat16", caps), "bfloat16", caps) == 0
