"""Quantized weights on warpgroups' matrix units in the simulator against dequantize() in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.quant.schemes import by_name
from llmc.schedules import emit as e
from llmc.schedules.gpu import qint, warpgroup_qgemm
from llmc.schedules.gpu.qlinear import quant_linear
from llmc.schedules.gpu.qoperands import QuantOperands
from llmc.schedules.qlayout import in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from tests.quant.random_weight import random_weight
from tests.simulate.gpu import SimulatedTools, gpu
from tests.simulate.test_gpu_quant import check, rounded_rows

TOOLS = SimulatedTools()
CAPS = replace(gpu("sm_90a"), multiprocessors=2)  # each block of threads has several tiles


def config(scheme: str, n: int, k: int, dtype: str, **options: Any) -> QuantLinearConfig:
    layout = quant_layout(by_name(scheme), n, k, CAPS, gated=options.get("gated", False))
    return QuantLinearConfig(n, layout, dtype, "float32", **options)


def only(cfg: QuantLinearConfig) -> Any:
    """The kernel by itself, for any number of rows."""
    built: list[Any] = []
    with e.kernel(built):
        ops = QuantOperands(cfg, e.dim("T"))
        with e.root():
            ops.view()
            if cfg.layout.of.activation_bits:
                qint.quantize_rows(ops)
            warpgroup_qgemm.gemm(ops, CAPS)
    return built[0]


CASES = [
    # groups that are half a stage, and integers with a scale per row; what does not fill tiles
    ("q4g32", 72, 160, "bfloat16", {"gated": True, "activation": "relu"}),
    ("w8a8", 136, 320, "bfloat16", {}),
]
MORE = [
    ("q4g128", 72, 384, "float16", {}),
    ("q8", 264, 320, "bfloat16", {"has_residual": True}),
    ("q4g64a", 136, 320, "bfloat16", {"has_bias": True}),
    ("q3g32a", 40, 96, "float16", {}),
    ("q6g128", 40, 200, "bfloat16", {}),
    ("q8g64a", 40, 128, "bfloat16", {}),
    ("fp8", 72, 104, "bfloat16", {}),
    ("w4a8", 136, 288, "float16", {"gated": True, "activation": "relu"}),
    ("w4a8g64", 40, 320, "bfloat16", {"has_residual": True}),
    ("w4a8g128", 40, 320, "bfloat16", {"has_bias": True}),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)], ids=lambda c: c[0]
)
def test_numbers(case: tuple[Any, ...]) -> None:
    scheme, n, k, dtype, options = case
    cfg, rng, rows = config(scheme, n, k, dtype, **options), np.random.default_rng(1), 150
    weight = random_weight(scheme, 2 * n if cfg.gated else n, k)
    packed = cfg.layout.pack(in_turns(weight, cfg.layout.n_block) if cfg.gated else weight)
    x, residual = TOOLS.random(rng, (rows, k), dtype), TOOLS.random(rng, (rows, n), dtype)
    bias = TOOLS.random(rng, (n,), dtype)
    y = TOOLS.tensor(np.full((rows, n), np.nan, np.float32))
    extra = [bias] * cfg.has_bias + [residual] * cfg.has_residual
    assert warpgroup_qgemm.takes(operands(cfg), CAPS)
    TOOLS.build(CAPS, k=only(cfg))["k"](TOOLS.tensor(x), TOOLS.tensor(packed), *map(TOOLS.tensor, extra), y)
    left = rounded_rows(x.astype(np.float32)) if cfg.layout.of.activation_bits else x.astype(np.float64)
    sums = left @ weight.dequantize().astype(np.float64).T
    if cfg.has_bias:
        sums = sums + bias.astype(np.float64)
    if cfg.gated:
        sums = np.maximum(sums[:, :n], 0) * sums[:, n:]
    check(y.numpy(), sums + (residual.astype(np.float64) if cfg.has_residual else 0))


def operands(cfg: QuantLinearConfig) -> Any:
    """What takes() looks at."""
    found = QuantOperands.__new__(QuantOperands)
    found.cfg = cfg
    return found


@pytest.mark.parametrize(
    ("scheme", "n", "k", "dtype"),
    [
        ("q4k", 64, 256, "bfloat16"),  # offsets
        ("w8a8o", 64, 256, "bfloat16"),  # outliers
        ("nf4", 64, 256, "bfloat16"),  # codes that are indices
        ("q2g96afp", 64, 192, "bfloat16"),  # an order, and groups across stages
        ("q4g32", 60, 256, "bfloat16"),
        ("q4g32", 64, 260, "bfloat16"),
        ("q4g32", 64, 256, "float32"),
    ],
)
def test_the_others_are_left_to_other_kernels(scheme: str, n: int, k: int, dtype: str) -> None:
    assert not warpgroup_qgemm.takes(operands(config(scheme, n, k, dtype)), CAPS)


def test_the_kernel_is_chosen_above_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(warpgroup_qgemm, "gemm", lambda ops, caps: calls.append(ops.cfg.layout.scheme))
    for scheme in ("q4g32", "w8a8", "nf4"):
        quant_linear(config(scheme, 64, 256, "bfloat16"), CAPS)
    quant_linear(config("q4g32", 64, 256, "bfloat16"), gpu("sm_90"))
    assert calls == ["q4g32", "w8a8"]
