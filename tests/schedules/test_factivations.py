"""Kernels that round activations to e4m3 against float64 on the rounded numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from llmc.products import InputRounding
from llmc.quant.schemes import SCHEMES
from llmc.schedules import e4m3
from llmc.schedules import emit as e
from llmc.schedules.qexperts import QuantExpertConfig, quant_expert_linear
from llmc.schedules.qlayout import in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig, quant_linear
from llmc.schedules.tile_qlinear import quant_tiles_from
from tests.quant.random_weight import random_weight
from tests.quant.rounded_rows import e4m3_rows

# (scheme, n, k, dtype, bias): outputs that fill no block, columns that fill no piece, several passes over columns
CASES = [("fp8a8", 130, 667, "bfloat16", True), ("fp8a8g128", 70, 300, "float32", False)]
MORE_CASES = [("fp8a8", 40, 64, "float32", False), ("fp8a8g128", 64, 512, "float16", True)]


def check(y: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(y.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-9)
    assert error < 2e-6


def test_nearest_numbers(caps, tools):
    """All bf16 numbers up to 448, and float32 ones on and beside each tie."""
    table = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (table[1:] + table[:-1]) / 2
    short = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    values = np.concatenate(
        [short[np.abs(short) <= 448], table, *(np.nextafter(ties, f) for f in (0, 500)), ties, -ties]
    )
    values = np.resize(values, -(-len(values) // 64) * 64).astype(np.float32)
    built = []
    lanes, count = caps.lanes_f32, len(values)
    with e.kernel(built):
        x, y = (e.tensor(name, [count], "float32") for name in "xy")
        with e.root(), e.parallel(count // lanes, caps) as i:
            flat = [e.flat(b, count) for b in (x, y)]
            e.store(flat[1], i * lanes, e4m3.nearest(e.load(flat[0], i * lanes, lanes), lanes), lanes)
    out = tools.tensor(np.full(count, np.nan, np.float32))
    tools.build(caps, k=built[0])["k"](tools.tensor(values), out)
    np.testing.assert_array_equal(out.numpy(), values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize(
    "cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.slow)], ids=["usual", "more"]
)
def test_linear(caps, tools, cases):
    layouts = [quant_layout(SCHEMES[s], n, k, caps) for s, n, k, _, _ in cases]
    funcs = {
        f"k{i}": quant_linear(QuantLinearConfig(n, layouts[i], dtype, "float32", bias, lead=1), caps)
        for i, (_, n, _, dtype, bias) in enumerate(cases)
    }
    library, rng = tools.build(caps, **funcs), np.random.default_rng(1)
    for i, (scheme, n, k, dtype, bias) in enumerate(cases):
        weight, b = random_weight(scheme, n, k), tools.random(rng, (n,), dtype)
        packed = tools.tensor(layouts[i].pack(weight))

        def run(x, kernel=library[f"k{i}"], packed=packed, bias=bias, n=n, b=b):
            y = tools.tensor(np.full((1, len(x), n), np.nan, np.float32))
            kernel(tools.tensor(x[None]), packed, *([tools.tensor(b)] if bias else []), y)
            return y.numpy()[0]

        for rows in (1, 3, 17, 70):
            x = tools.random(rng, (rows, k), dtype)
            x[rows // 2] *= 100  # each row has scales of its own
            x[:, : k // 2] /= 50
            expected = e4m3_rows(x, SCHEMES[scheme]) @ weight.dequantize().astype(np.float64).T
            check(run(x), expected + (b.astype(np.float64) if bias else 0))
        # zeros give zeros; NaN and infinity show in their own rows only
        x = np.ones((4, k), tools.dtypes[dtype])
        x[0], x[1, 0], x[2, -1] = 0, np.nan, np.inf
        got = run(x) - (b.astype(np.float32) if bias else 0)
        assert (got[0] == 0).all() and np.isnan(got[1]).all()
        assert np.isnan(got[2]).all() and np.isfinite(got[3]).all()


@pytest.mark.slow
def test_gate_and_residual(best, tools):
    n, k = 50, 64
    weight = random_weight("fp8a8", 2 * n, k)
    layout = quant_layout(SCHEMES["fp8a8"], n, k, best, gated=True)
    cfg = QuantLinearConfig(
        n, layout, "bfloat16", "float32", activation="relu", gated=True, has_residual=True
    )
    kernel, rng = tools.build(best, k=quant_linear(cfg, best))["k"], np.random.default_rng(2)
    packed = tools.tensor(layout.pack(in_turns(weight, layout.n_block)))
    for rows in (1, 9):
        x, residual = (tools.random(rng, (rows, size), "bfloat16") for size in (k, n))
        y = tools.tensor(np.full((rows, n), np.nan, np.float32))
        kernel(tools.tensor(x), packed, tools.tensor(residual), y)
        both = e4m3_rows(x, SCHEMES["fp8a8"]) @ weight.dequantize().astype(np.float64).T
        check(y.numpy(), np.maximum(both[:, :n], 0) * both[:, n:] + residual.astype(np.float64))


@pytest.mark.parametrize("scheme", ["fp8a8", pytest.param("fp8a8g128", marks=pytest.mark.slow)])
def test_experts(best, tools, scheme):
    experts, n, k = 5, 40, 200
    layout = quant_layout(SCHEMES[scheme], n, k, best)
    cfg = QuantExpertConfig(experts, layout, "bfloat16", "float32", "int64", True)
    kernel, rng = tools.build(best, k=quant_expert_linear(cfg, best))["k"], np.random.default_rng(3)
    weight = random_weight(scheme, experts, n, k)
    packed, values = tools.tensor(layout.pack(weight)), weight.dequantize().astype(np.float64)
    b = tools.random(rng, (experts, n), "bfloat16")
    for rows in (1, 60):
        x = tools.random(rng, (rows, k), "bfloat16")
        ids = rng.integers(0, experts - 1, rows)  # the last one stays without rows
        y = tools.tensor(np.full((rows, n), np.nan, np.float32))
        kernel(tools.tensor(x), tools.tensor(ids), packed, tools.tensor(b), y)
        expected = np.einsum("rk,rnk->rn", e4m3_rows(x, SCHEMES[scheme]), values[ids])
        check(y.numpy(), expected + b[ids].astype(np.float64))


@pytest.mark.parametrize("scheme", ["fp8a8", "fp8a8g128"])
def test_the_reference_rounds_in_the_same_way(scheme):
    x = np.random.default_rng(4).standard_normal((3, 300)).astype(np.float32)
    x[0], x[1, :10] = 0, 1000
    got = InputRounding.of(SCHEMES[scheme])(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, e4m3_rows(x, SCHEMES[scheme]), rtol=1e-6)


def test_layout_is_that_of_the_weight_alone(best):
    """fp8 and fp8a8 hold the same bytes; tile registers, which round weights with their scales, are left alone."""
    weight = random_weight("fp8a8", 40, 70)
    layout = quant_layout(SCHEMES["fp8a8"], 40, 70, best)
    plain = quant_layout(SCHEMES["fp8"], 40, 70, best)
    np.testing.assert_array_equal(
        layout.pack(weight), plain.pack(type(weight)(SCHEMES["fp8"], weight.codes, weight.scales))
    )
    assert (
        quant_tiles_from(QuantLinearConfig(40, layout, "bfloat16", "bfloat16"), best, QuantLinearConfig) == 0
    )
