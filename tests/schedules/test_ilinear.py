"""Integer-activation kernels against exact arithmetic on the rounded activations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmc.caps import ByteDot
from llmc.errors import LlmcError
from llmc.quant.rtn import quantize
from llmc.quant.schemes import SCHEMES
from llmc.quant.weight import QuantizedWeight
from llmc.schedules.iexperts import int_expert_linear
from llmc.schedules.ilinear import int_linear
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qgather import QuantEmbeddingConfig, quant_embedding
from llmc.schedules.qlayout import INT_COLUMNS, in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.targets.cpu.backend import capabilities

# (scheme, n, k, dtype, bias): outputs that fill no block, columns that fill no group, several pieces of columns
CASES = [
    ("w8a8", 130, 67, "bfloat16", True),
    ("w8a8", 64, 640, "float32", False),
    ("w4a8", 70, 300, "bfloat16", False),
    ("w4a8g64", 33, 20, "float32", True),
    ("w4a8g128", 40, 260, "float16", False),
]
ROWS = (1, 2, 3, 5, 7, 17)


def weight_of(scheme, *shape, seed=0):
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    weight[..., 1, :] = 0  # a row of zeros
    return quantize(weight, SCHEMES[scheme])


def rounded(x):
    """int8 rows and their scales, as the kernels are to make them."""
    wide = x.astype(np.float32)
    most = np.abs(wide).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(most > 1e-30, np.float32(127) / most, np.float32(0))
    # the product of two float32 is exact in float64: a tie is a tie
    return np.rint(wide.astype(np.float64) * inverse.astype(np.float64)), most / np.float32(127)


def check(y, expected):
    error = np.abs(y.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-9)
    assert error < 1e-6


def layouts_and_kernels(cases, caps):
    layouts = [quant_layout(SCHEMES[s], n, k, caps) for s, n, k, _, _ in cases]
    return layouts, {
        f"k{i}": int_linear(QuantLinearConfig(n, layouts[i], dtype, "float32", bias, lead=1), caps)
        for i, (_, n, _, dtype, bias) in enumerate(cases)
    }


def test_linear_matches_rounded_activations(caps, tools):
    layouts, funcs = layouts_and_kernels(CASES, caps)
    library = tools.build(caps, **funcs)
    rng = np.random.default_rng(1)
    for i, (scheme, n, k, dtype, bias) in enumerate(CASES):
        weight = weight_of(scheme, n, k)
        packed, values = tools.tensor(layouts[i].pack(weight)), weight.dequantize().astype(np.float64)
        b = tools.random(rng, (n,), dtype)
        for rows in ROWS:
            x = tools.random(rng, (1, rows, k), dtype)
            x[0, rows // 2] *= 1000  # each row has a scale of its own
            y = tools.tensor(np.full((1, rows, n), np.nan, np.float32))
            library[f"k{i}"](tools.tensor(x), packed, *([tools.tensor(b)] if bias else []), y)
            q, scale = rounded(x[0])
            check(y.numpy()[0], q @ values.T * scale + (b.astype(np.float64) if bias else 0))


@pytest.mark.parametrize("preset", ["x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "plain"])
def test_integer_sums_are_exact_on_every_machine(best, tools, preset):
    """Scales of 1, so that the result is the integer sum itself; the largest values that there are."""
    if best.target != "cpu" or not best.preset.startswith("cpu/x86-64-v4-bf16"):
        pytest.skip("needs a machine that runs all of these presets")
    caps = replace(best, byte_dot=ByteDot.NONE) if preset == "plain" else capabilities(preset)
    cases = [("w8a8", 40, 1000, "float32", False), ("w4a8", 40, 96, "float32", False)]
    layouts, funcs = layouts_and_kernels(cases, caps)
    library = tools.build(caps, **funcs)
    rng = np.random.default_rng(7)
    for i, (scheme, n, k, _, _) in enumerate(cases):
        top = 1 << SCHEMES[scheme].bits
        codes = rng.integers(0, top, (n, k)).astype(np.uint8)
        codes[0], codes[1] = 0, top - 1
        scales = np.ones((n, -(-k // (SCHEMES[scheme].group_size or k))), np.float32)
        packed = tools.tensor(layouts[i].pack(QuantizedWeight(SCHEMES[scheme], codes, scales)))
        for rows in (1, 3, 9):
            x = rng.integers(-127, 128, (1, rows, k)).astype(np.float32)
            x[0, 0] = 127
            x[..., 0] = -127
            y = tools.tensor(np.zeros((1, rows, n), np.float32))
            library[f"k{i}"](tools.tensor(x), packed, y)
            expected = x[0].astype(np.int64) @ (codes.astype(np.int64) - top // 2).T
            np.testing.assert_array_equal(y.numpy()[0], expected.astype(np.float32))


def test_gate_and_residual(best, tools):
    n, k = 50, 64
    weight = weight_of("w4a8", 2 * n, k)
    layout = quant_layout(SCHEMES["w4a8"], n, k, best, gated=True)
    cfg = QuantLinearConfig(n, layout, "float32", "float32", activation="relu", gated=True, has_residual=True)
    kernel = tools.build(best, k=int_linear(cfg, best))["k"]
    rng = np.random.default_rng(2)
    packed = tools.tensor(layout.pack(in_turns(weight, layout.n_block)))
    for rows in (1, 9):
        x, residual = (rng.standard_normal((rows, size)).astype(np.float32) for size in (k, n))
        y = tools.tensor(np.full((rows, n), np.nan, np.float32))
        kernel(tools.tensor(x), packed, tools.tensor(residual), y)
        q, scale = rounded(x)
        both = q @ weight.dequantize().astype(np.float64).T * scale
        check(y.numpy(), np.maximum(both[:, :n], 0) * both[:, n:] + residual)


def test_zeros_nan_and_infinity(best, tools):
    """A row of zeros gives zeros, NaN and infinity show in their own row only."""
    layout = quant_layout(SCHEMES["w8a8"], 8, 33, best)
    kernel = tools.build(best, k=int_linear(QuantLinearConfig(8, layout, "float32", "float32"), best))["k"]
    packed = tools.tensor(layout.pack(weight_of("w8a8", 8, 33)))
    x = np.ones((6, 33), np.float32)
    x[0], x[1, 0], x[2, 32], x[3], x[4] = 0, np.nan, np.inf, 1e-38, 3e38
    y = tools.tensor(np.full((6, 8), np.nan, np.float32))
    kernel(tools.tensor(x), packed, y)
    got = y.numpy()
    assert (got[0] == 0).all() and (got[3] == 0).all()
    assert np.isnan(got[1]).all() and not np.isfinite(got[2]).any()
    assert np.isfinite(got[5]).all() and np.abs(got[5]).max() > 0


def test_experts(caps, tools):
    experts, n, k = 5, 40, 70
    cases = [("w8a8", "bfloat16", True, "int64"), ("w4a8", "float32", False, "int32")]
    funcs, layouts = {}, []
    for scheme, dtype, bias, ids_dtype in cases:
        layouts.append(quant_layout(SCHEMES[scheme], n, k, caps))
        cfg = QuantExpertConfig(experts, layouts[-1], dtype, "float32", ids_dtype, bias)
        funcs[scheme] = int_expert_linear(cfg, caps)
    library = tools.build(caps, **funcs)
    rng = np.random.default_rng(3)
    for layout, (scheme, dtype, bias, ids_dtype) in zip(layouts, cases, strict=True):
        weight = weight_of(scheme, experts, n, k)
        packed, values = tools.tensor(layout.pack(weight)), weight.dequantize().astype(np.float64)
        b = tools.random(rng, (experts, n), dtype)
        for rows in (1, 31):
            x = tools.random(rng, (rows, k), dtype)
            ids = rng.integers(0, experts - 1, rows).astype(ids_dtype)  # the last one stays without rows
            y = tools.tensor(np.full((rows, n), np.nan, np.float32))
            extra = [tools.tensor(b)] if bias else []
            library[scheme](tools.tensor(x), tools.tensor(ids), packed, *extra, y)
            q, scale = rounded(x)
            expected = np.einsum("rnk,rk->rn", values[ids], q) * scale
            check(y.numpy(), expected + (b[ids].astype(np.float64) if bias else 0))


def test_embedding_is_a_row_of_the_same_table(caps, tools):
    cases = [("w8a8", 67), ("w4a8", 70)]
    layouts = {s: quant_layout(SCHEMES[s], 130, k, caps) for s, k in cases}
    funcs = {s: quant_embedding(QuantEmbeddingConfig(layouts[s], "float32"), caps) for s, _ in cases}
    library = tools.build(caps, **funcs)
    for scheme, k in cases:
        weight = weight_of(scheme, 130, k)
        ids = np.array([0, 129, 64, 7, 63], np.int32)
        out = tools.tensor(np.full((5, k), np.nan, np.float32))
        library[scheme](tools.tensor(ids), tools.tensor(layouts[scheme].pack(weight)), out)
        np.testing.assert_array_equal(out.numpy(), weight.dequantize()[ids])


@pytest.mark.parametrize(
    ("preset", "instruction"),
    [("aarch64-dotprod", "sdot"), ("x86-64-v4", "vpmaddwd"), ("x86-64-v4-bf16", "vpdpbusd")],
)
def test_compiles_to_the_machines_dot_product(preset, instruction, tools):
    caps = capabilities(preset)
    layout = quant_layout(SCHEMES["w4a8"], 64, 64, caps)
    text = tools.assembly(caps, k=int_linear(QuantLinearConfig(64, layout, "bfloat16", "bfloat16"), caps))
    assert text.count(instruction) > 50


def test_too_many_columns_are_refused(best):
    with pytest.raises(LlmcError, match="32 bits"):
        quant_layout(SCHEMES["w8a8"], 64, INT_COLUMNS + 1, best)
