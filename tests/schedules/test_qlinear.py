"""Kernels on quantized weights against dequantize() in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmc.quant.schemes import by_name
from llmc.schedules.qexperts import QuantExpertConfig, quant_expert_linear
from llmc.schedules.qgather import QuantEmbeddingConfig, quant_embedding
from llmc.schedules.qlayout import in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig, quant_linear
from llmc.targets.cpu.backend import capabilities
from tests.quant.random_weight import random_weight

# (scheme, n, k, dtype, bias): odd sizes, one group, several, a last group that is cut short
CASES = [
    ("q8", 130, 67, "bfloat16", True),
    ("q4g32", 70, 96, "bfloat16", False),
    ("q4g64a", 64, 130, "float32", True),
    ("q3g64", 40, 192, "bfloat16", False),
    ("q6g128a", 70, 256, "float16", True),
    ("nf4", 33, 128, "bfloat16", False),
    ("fp8", 64, 70, "bfloat16", False),
    ("mxfp4", 130, 33, "float16", False),
    ("q4k", 70, 512, "bfloat16", True),
    ("q6k", 40, 256, "bfloat16", False),
    ("nf4f", 33, 128, "bfloat16", False),
    ("q5g16o", 64, 100, "bfloat16", False),
    ("q2g96afp", 40, 200, "bfloat16", True),
]
ROWS = (1, 2, 3, 4, 5, 8, 13, 16, 17, 70, 250)


weight_of = random_weight


def check(y, expected):
    error = np.abs(y.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error < 1e-6


def test_linear_matches_dequantized_weight(caps, tools):
    layouts = [quant_layout(by_name(s), n, k, caps) for s, n, k, _, _ in CASES]
    funcs = {
        f"k{i}": quant_linear(QuantLinearConfig(n, layouts[i], dtype, "float32", bias, lead=1), caps)
        for i, (_, n, _, dtype, bias) in enumerate(CASES)
    }
    library = tools.build(caps, **funcs)
    rng = np.random.default_rng(1)
    for i, (scheme, n, k, dtype, bias) in enumerate(CASES):
        weight = weight_of(scheme, n, k)
        packed = tools.tensor(layouts[i].pack(weight))
        b = tools.random(rng, (n,), dtype)
        for rows in ROWS:
            x = tools.random(rng, (1, rows, k), dtype)
            y = tools.tensor(np.full((1, rows, n), np.nan, np.float32))
            library[f"k{i}"](tools.tensor(x), packed, *([tools.tensor(b)] if bias else []), y)
            expected = x[0].astype(np.float64) @ weight.dequantize().astype(np.float64).T
            check(y.numpy()[0], expected + (b.astype(np.float64) if bias else 0))


def test_gate_and_residual(best, tools):
    n, k = 50, 64
    weight = weight_of("q4g32", 2 * n, k)
    layout = quant_layout(by_name("q4g32"), n, k, best, gated=True)
    cfg = QuantLinearConfig(n, layout, "float32", "float32", activation="relu", gated=True, has_residual=True)
    kernel = tools.build(best, k=quant_linear(cfg, best))["k"]
    rng = np.random.default_rng(2)
    packed = tools.tensor(layout.pack(in_turns(weight, layout.n_block)))
    for rows in (1, 9):
        x, residual = (rng.standard_normal((rows, size)).astype(np.float32) for size in (k, n))
        y = tools.tensor(np.full((rows, n), np.nan, np.float32))
        kernel(tools.tensor(x), packed, tools.tensor(residual), y)
        both = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
        check(y.numpy(), np.maximum(both[:, :n], 0) * both[:, n:] + residual)


def test_experts(caps, tools):
    experts, n, k = 5, 40, 70
    cases = [("q4g32a", "bfloat16", True, "int64"), ("fp8", "float32", False, "int32")]
    cases += [("q4g32p", "bfloat16", False, "int64")]
    funcs, layouts = {}, []
    for scheme, dtype, bias, ids_dtype in cases:
        layouts.append(quant_layout(by_name(scheme), n, k, caps))
        cfg = QuantExpertConfig(experts, layouts[-1], dtype, "float32", ids_dtype, bias)
        funcs[scheme] = quant_expert_linear(cfg, caps)
    library = tools.build(caps, **funcs)
    rng = np.random.default_rng(3)
    for layout, (scheme, dtype, bias, ids_dtype) in zip(layouts, cases, strict=True):
        weight = weight_of(scheme, experts, n, k)
        packed, values = tools.tensor(layout.pack(weight)), weight.dequantize().astype(np.float64)
        b = tools.random(rng, (experts, n), dtype)
        for rows in (1, 31, 600):
            x = tools.random(rng, (rows, k), dtype)
            ids = rng.integers(0, experts - 1, rows).astype(ids_dtype)  # the last one stays without rows
            y = tools.tensor(np.full((rows, n), np.nan, np.float32))
            extra = [tools.tensor(b)] if bias else []
            library[scheme](tools.tensor(x), tools.tensor(ids), packed, *extra, y)
            expected = np.einsum("rnk,rk->rn", values[ids], x.astype(np.float64))
            check(y.numpy(), expected + (b[ids].astype(np.float64) if bias else 0))


def test_embedding_is_a_row_of_the_dequantized_table(caps, tools):
    cases = [("q8", 67, "bfloat16"), ("q4g32a", 70, "float32"), ("q3g64", 128, "float16")]
    cases += [
        ("q6g32", 64, "float32"),
        ("nf4", 33, "float32"),
        ("fp8", 40, "float32"),
        ("mxfp4", 64, "float32"),
        ("q4k", 256, "float32"),
        ("q6k", 300, "float32"),
        ("q4g32ap", 70, "float32"),
    ]
    rows, funcs = 130, {}
    for scheme, k, dtype in cases:
        layout = quant_layout(by_name(scheme), rows, k, caps)
        funcs[scheme] = quant_embedding(QuantEmbeddingConfig(layout, dtype, lead=1), caps)
    library = tools.build(caps, **funcs)
    for scheme, k, dtype in cases:
        weight = weight_of(scheme, rows, k)
        packed = tools.tensor(quant_layout(by_name(scheme), rows, k, caps).pack(weight))
        for count in (1, 9):
            ids = np.random.default_rng(count).integers(0, rows, (1, count)).astype(np.int32)
            out = tools.tensor(np.full((1, count, k), np.nan, tools.dtypes[dtype]))
            library[scheme](tools.tensor(ids), packed, out)
            expected = weight.dequantize()[ids[0]].astype(tools.dtypes[dtype])
            np.testing.assert_array_equal(out.numpy()[0].astype(np.float32), expected.astype(np.float32))


def test_nan_and_padding(best, tools):
    """What lies past the columns of x is not seen; a NaN in x is."""
    layout = quant_layout(by_name("q4g32"), 8, 33, best)
    kernel = tools.build(best, k=quant_linear(QuantLinearConfig(8, layout, "float32", "float32"), best))["k"]
    packed = tools.tensor(layout.pack(weight_of("q4g32", 8, 33)))
    x = np.ones((2, 33), np.float32)
    x[1, 0] = np.nan
    y = tools.tensor(np.zeros((2, 8), np.float32))
    kernel(tools.tensor(x), packed, y)
    assert np.isfinite(y.numpy()[0]).all()
    assert np.isnan(y.numpy()[1, 0])


@pytest.mark.parametrize("preset", ["aarch64", "x86-64-v4"])
def test_compiles_for_other_processors(preset, tools):
    caps = capabilities(preset)
    funcs = {}
    for scheme in ("q8", "nf4"):
        layout = quant_layout(by_name(scheme), 64, 64, caps)
        funcs[scheme] = quant_linear(QuantLinearConfig(64, layout, "bfloat16", "bfloat16"), caps)
    layout = quant_layout(by_name("q3g64"), 64, 64, caps)
    funcs["embedding"] = quant_embedding(QuantEmbeddingConfig(layout, "bfloat16"), caps)
    text = tools.assembly(caps, **funcs)
    assert text.count("fmla" if preset == "aarch64" else "vfmadd") > 50


def test_config_json_round_trip(best):
    layout = quant_layout(by_name("q4g32"), 8, 32, best)
    for cfg in (
        QuantLinearConfig(8, layout, "float32", "float32"),
        QuantExpertConfig(4, layout, "float32", "float32"),
        QuantEmbeddingConfig(layout, "float32"),
    ):
        assert type(cfg).from_json(json.loads(json.dumps(cfg.to_json()))) == cfg
