"""GPU kernels on quantized weights in the simulator against dequantize() in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.quant.schemes import by_name
from llmc.schedules.gpu.gather import quant_embedding
from llmc.schedules.gpu.qlinear import quant_linear
from llmc.schedules.qgather import QuantEmbeddingConfig
from llmc.schedules.qlayout import in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from tests.quant.random_weight import random_weight
from tests.simulate.gpu import SimulatedTools, gpu

TOOLS = SimulatedTools()

# (scheme, n, k, dtype, bias): both matmuls, codes of every kind, odd sizes, groups that are cut short
CASES = [
    ("q4g32", 70, 96, "bfloat16", False),
    ("q8", 130, 64, "bfloat16", True),
    ("q6g128a", 40, 256, "float16", True),
    ("q4k", 40, 512, "bfloat16", True),
    ("q4g64a", 64, 130, "float32", True),
    ("q6k", 40, 256, "bfloat16", False),
]
MORE = [
    ("q3g64", 40, 192, "bfloat16", False),
    ("q8", 40, 67, "bfloat16", True),
    ("nf4", 33, 128, "bfloat16", False),
    ("fp8", 64, 72, "bfloat16", False),
    ("mxfp4", 130, 40, "float16", False),
    ("nf4f", 33, 128, "bfloat16", False),
    ("q5g16o", 64, 104, "bfloat16", False),
    ("q2g96afp", 40, 200, "bfloat16", True),
    ("q8g32a", 64, 96, "float16", False),
]


def rounded_rows(x: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """float32 rows as the kernels round them, in float64; columns that are kept stay as they are."""
    rest = x.copy()
    if kept is not None:
        rest[:, kept] = 0
    most = np.abs(rest).max(-1, keepdims=True)
    factor = np.where(most > 1e-30, 127 / np.maximum(most, 1e-30), 0).astype(np.float32)
    out = np.rint(rest.astype(np.float64) * factor) * (most / np.float32(127)).astype(np.float64)
    if kept is not None:
        out[:, kept] = x[:, kept]
    return out


def _slow(cases: list[Any]) -> list[Any]:
    return [pytest.param(c, marks=pytest.mark.slow) for c in cases]


def check(y: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(y.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error < 2e-6


@pytest.mark.parametrize("preset", ["sm_90", pytest.param("sm_75", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [*CASES, *_slow(MORE)], ids=lambda c: f"{c[0]}-{c[2]}-{c[3]}")
def test_linear_matches_dequantized_weight(case: tuple[str, int, int, str, bool], preset: str) -> None:
    scheme, n, k, dtype, bias = case
    caps, rng = gpu(preset), np.random.default_rng(1)
    layout = quant_layout(by_name(scheme), n, k, caps)
    kernel = TOOLS.build(caps, k=quant_linear(QuantLinearConfig(n, layout, dtype, "float32", bias, 1), caps))[
        "k"
    ]
    weight = random_weight(scheme, n, k)
    packed = TOOLS.tensor(layout.pack(weight))
    b = TOOLS.random(rng, (n,), dtype)
    for rows in (1, 3, 37):
        x = TOOLS.random(rng, (1, rows, k), dtype)
        y = TOOLS.tensor(np.full((1, rows, n), np.nan, np.float32))
        kernel(TOOLS.tensor(x), packed, *([TOOLS.tensor(b)] if bias else []), y)
        expected = x[0].astype(np.float64) @ weight.dequantize().astype(np.float64).T
        check(y.numpy()[0], expected + (b.astype(np.float64) if bias else 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_and_residual(dtype: str) -> None:
    n, k, caps = 50, 64, gpu()
    weight = random_weight("q4g32", 2 * n, k)
    layout = quant_layout(by_name("q4g32"), n, k, caps, gated=True)
    cfg = QuantLinearConfig(n, layout, dtype, "float32", activation="relu", gated=True, has_residual=True)
    kernel = TOOLS.build(caps, k=quant_linear(cfg, caps))["k"]
    rng = np.random.default_rng(2)
    packed = TOOLS.tensor(layout.pack(in_turns(weight, layout.n_block)))
    for rows in (1, 9):
        x, residual = (TOOLS.random(rng, (rows, size), dtype) for size in (k, n))
        y = TOOLS.tensor(np.full((rows, n), np.nan, np.float32))
        kernel(TOOLS.tensor(x), packed, TOOLS.tensor(residual), y)
        both = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
        check(y.numpy(), np.maximum(both[:, :n], 0) * both[:, n:] + residual.astype(np.float64))


@pytest.mark.parametrize(
    "scheme", ["q4g32", *_slow(["q8", "q6k", "nf4", "q4g64a", "q4k", "q2g96afp", "fp8"])]
)
def test_embedding(scheme: str) -> None:
    n, k, caps = 70, 512 if scheme == "q4k" else 200, gpu()
    layout = quant_layout(by_name(scheme), n, k, caps)
    weight = random_weight(scheme, n, k)
    kernel = TOOLS.build(caps, k=quant_embedding(QuantEmbeddingConfig(layout, "float32", lead=1), caps))["k"]
    ids = np.array([[69, 0, 3, 33]], np.int32)
    out = TOOLS.tensor(np.full((1, 4, k), np.nan, np.float32))
    kernel(TOOLS.tensor(ids), TOOLS.tensor(layout.pack(weight)), out)
    np.testing.assert_allclose(out.numpy(), weight.dequantize()[ids], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("preset", ["sm_90", pytest.param("sm_75", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("scheme", "k"), [("w4a8", 96), ("w8a8", 130), ("w8a8o", 200)])
def test_int8_activations(scheme: str, k: int, preset: str) -> None:
    n, caps, rng = 70, gpu(preset), np.random.default_rng(3)
    layout = quant_layout(by_name(scheme), n, k, caps)
    kernel = TOOLS.build(
        caps, k=quant_linear(QuantLinearConfig(n, layout, "bfloat16", "float32", True), caps)
    )["k"]
    weight = random_weight(scheme, n, k)
    b = TOOLS.random(rng, (n,), "bfloat16")
    for rows in (1, 5, 37):
        x = TOOLS.random(rng, (rows, k), "bfloat16")
        x[0] = 0
        y = TOOLS.tensor(np.full((rows, n), np.nan, np.float32))
        kernel(TOOLS.tensor(x), TOOLS.tensor(layout.pack(weight)), TOOLS.tensor(b), y)
        rounded = rounded_rows(x.astype(np.float32), weight.outlier_columns)
        check(y.numpy(), rounded @ weight.dequantize().astype(np.float64).T + b.astype(np.float64))
