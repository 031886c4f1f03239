"""Integer-activation kernels against exact arithmetic on the rounded activations."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from llmc.caps import ByteDot
from llmc.errors import LlmcError
from llmc.quant.schemes import SCHEMES
from llmc.quant.weight import QuantizedWeight
from llmc.schedules.iexperts import int_expert_linear
from llmc.schedules.ilinear import int_linear
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qgather import QuantEmbeddingConfig, quant_embedding
from llmc.schedules.qlayout import INT_COLUMNS, in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.targets.cpu.backend import capabilities, missing
from tests.quant.random_weight import random_weight

# (scheme, n, k, dtype, bias): outputs that fill no block, columns that fill no group, several passes over columns
CASES = [
    ("w8a8", 130, 667, "bfloat16", True),
    ("w4a8", 70, 300, "float32", False),
    ("w8a8o", 70, 150, "bfloat16", True),
]
MORE_CASES = [
    ("w4a8g64", 33, 20, "float16", True),
    ("w4a8g128", 64, 512, "bfloat16", False),
    ("w8a8o", 130, 1100, "float16", False),
    ("w4a8o", 40, 96, "float32", False),
]
ROWS = (1, 2, 3, 7, 17, 70, 140)


def weight_of(scheme, *shape, seed=0):
    return random_weight(scheme, *shape, seed=seed)


def rounded(x, weight=None):
    """int8 rows and their scales, as the kernels are to make them; without the outlier columns of `weight`."""
    wide = x.astype(np.float32)
    if weight is not None and weight.outlier_columns is not None:
        wide[..., weight.outlier_columns] = 0
    most = np.abs(wide).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(most > 1e-30, np.float32(127) / most, np.float32(0))
    # the product of two float32 is exact in float64: a tie is a tie
    return np.rint(wide.astype(np.float64) * inverse.astype(np.float64)), most / np.float32(127)


def outlier_part(x, weight):
    """float64 [rows, n]: what the outlier columns add."""
    if weight.outlier_columns is None:
        return 0
    kept = x[..., weight.outlier_columns].astype(np.float64)
    return kept @ np.swapaxes(weight.outlier_weights.astype(np.float64), -1, -2)


def check(y, expected):
    error = np.abs(y.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-9)
    assert error < 1e-6


@pytest.fixture(
    params=["best", "x86-64-v3", *(pytest.param(p, marks=pytest.mark.slow) for p in ("x86-64-v4", "plain"))]
)
def machine(request, best):
    """Every form of the dot product that this machine can run."""
    if request.param in ("best", "plain"):
        return best if request.param == "best" else replace(best, byte_dot=ByteDot.NONE)
    caps = capabilities(request.param)
    if missing(caps):
        pytest.skip(f"this machine has no {', '.join(missing(caps))}")
    return caps


@pytest.mark.parametrize(
    "cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.slow)], ids=["usual", "more"]
)
def test_linear(machine, tools, cases):
    """Against float64 on the rounded activations; integer sums exactly."""
    layouts = [quant_layout(SCHEMES[s], n, k, machine) for s, n, k, _, _ in cases]
    funcs = {
        f"k{i}": int_linear(QuantLinearConfig(n, layouts[i], dtype, "float32", bias, lead=1), machine)
        for i, (_, n, _, dtype, bias) in enumerate(cases)
    }
    library = tools.build(machine, **funcs)
    rng = np.random.default_rng(1)
    for i, (scheme, n, k, dtype, bias) in enumerate(cases):

        def run(weight, x, b, kernel=library[f"k{i}"], layout=layouts[i], bias=bias, n=n):
            y = tools.tensor(np.full((1, len(x), n), np.nan, np.float32))
            args = [tools.tensor(x[None]), tools.tensor(layout.pack(weight))]
            kernel(*args, *([tools.tensor(b)] if bias else []), y)
            return y.numpy()[0]

        weight, b = weight_of(scheme, n, k), tools.random(rng, (n,), dtype)
        values = weight.dequantize().astype(np.float64)
        for rows in ROWS:
            x = tools.random(rng, (rows, k), dtype)
            x[rows // 2] *= 100  # each row has a scale of its own
            if weight.outlier_columns is not None:  # which has nothing to do with the outliers
                x[:, weight.outlier_columns[::2]] *= 100 if dtype == "float16" else 1000
            q, scale = rounded(x, weight)
            whole = q @ values.T * scale + outlier_part(x, weight)
            check(run(weight, x, b), whole + (b.astype(np.float64) if bias else 0))
        if (
            weight.outlier_columns is not None
        ):  # infinity in an outlier column leaves the rest of the row as it is
            x = np.zeros((1, k), tools.dtypes[dtype])
            x[0, weight.outlier_columns[0]] = np.inf
            got = run(weight, x, np.zeros_like(b))[0]
            kept = weight.outlier_weights[:, 0]
            assert (got[kept > 0] == np.inf).all() and np.isnan(got[kept == 0]).all()
            continue
        # scales of 1 and the largest values that there are: the result is the integer sum itself
        top = 1 << SCHEMES[scheme].bits
        codes = rng.integers(0, top, (n, k)).astype(np.uint8)
        codes[0], codes[1] = 0, top - 1
        ones = QuantizedWeight(SCHEMES[scheme], codes, np.ones(weight.scales.shape, np.float32))
        for rows in (1, 9):
            x = rng.integers(-127, 128, (rows, k)).astype(tools.dtypes[dtype])
            x[0] = 127
            x[:, 0] = -127
            exact = x.astype(np.int64) @ (codes.astype(np.int64) - top // 2).T
            np.testing.assert_array_equal(run(ones, x, np.zeros_like(b)), exact.astype(np.float32))
        # zeros give zeros (and the bias); NaN and infinity show in their own rows only
        x = np.ones((6, k), tools.dtypes[dtype])
        x[0], x[1, 0], x[2, -1], x[3], x[4] = 0, np.nan, np.inf, 1e-38, 6e4
        got = run(weight, x, np.zeros_like(b))
        assert (got[0] == 0).all() and (got[3] == 0).all()
        assert np.isnan(got[1]).all() and not np.isfinite(got[2]).any()
        assert np.isfinite(got[4:]).all() and np.abs(got[5]).max() > 0


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


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8o", pytest.param("w8a8", marks=pytest.mark.slow)])
def test_experts(best, tools, scheme):
    experts, n, k = 5, 40, 70
    layout = quant_layout(SCHEMES[scheme], n, k, best)
    cfg = QuantExpertConfig(experts, layout, "bfloat16", "float32", "int64", True)
    kernel = tools.build(best, k=int_expert_linear(cfg, best))["k"]
    rng = np.random.default_rng(3)
    weight = weight_of(scheme, experts, n, k)
    packed, values = tools.tensor(layout.pack(weight)), weight.dequantize().astype(np.float64)
    b = tools.random(rng, (experts, n), "bfloat16")
    for rows in (1, 31, 400):
        x = tools.random(rng, (rows, k), "bfloat16")
        ids = rng.integers(0, experts - 1, rows)  # the last one stays without rows
        y = tools.tensor(np.full((rows, n), np.nan, np.float32))
        kernel(tools.tensor(x), tools.tensor(ids), packed, tools.tensor(b), y)
        q, scale = rounded(x, weight)
        whole = np.einsum("rnk,rk->rn", values[ids], q) * scale + b[ids].astype(np.float64)
        if weight.outlier_columns is not None:
            kept = x[:, weight.outlier_columns].astype(np.float64)
            whole += np.einsum("rnk,rk->rn", weight.outlier_weights[ids].astype(np.float64), kept)
        check(y.numpy(), whole)


def test_embedding_is_a_row_of_the_same_table(best, tools):
    cases = [("w8a8", 67), ("w4a8", 70), ("w8a8o", 67)]
    layouts = {s: quant_layout(SCHEMES[s], 130, k, best) for s, k in cases}
    funcs = {s: quant_embedding(QuantEmbeddingConfig(layouts[s], "float32"), best) for s, _ in cases}
    library = tools.build(best, **funcs)
    for scheme, k in cases:
        weight = weight_of(scheme, 130, k)
        ids = np.array([0, 129, 64, 7, 63], np.int32)
        out = tools.tensor(np.full((5, k), np.nan, np.float32))
        library[scheme](tools.tensor(ids), tools.tensor(layouts[scheme].pack(weight)), out)
        np.testing.assert_array_equal(out.numpy(), weight.dequantize()[ids])


@pytest.mark.parametrize(
    ("preset", "instruction"),
    [
        ("aarch64-dotprod", "sdot"),
        pytest.param("aarch64", "mla", marks=pytest.mark.slow),
        pytest.param("x86-64-v4", "vpmaddwd", marks=pytest.mark.slow),
    ],
)
def test_compiles_to_the_machines_dot_product(preset, instruction, tools):
    caps = capabilities(preset)
    layout = quant_layout(SCHEMES["w4a8"], 64, 64, caps)
    text = tools.assembly(caps, k=int_linear(QuantLinearConfig(64, layout, "bfloat16", "bfloat16"), caps))
    assert text.count(instruction) > 50


def test_too_many_columns_are_refused(best):
    with pytest.raises(LlmcError, match="32 bits"):
        quant_layout(SCHEMES["w8a8"], 64, INT_COLUMNS + 1, best)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_builds_in_seconds(best, tools, scheme):
    """TVM's simplifier must not get to see what task and row numbers are made of: it took 48 s of this (see e.opaque)."""
    layout = quant_layout(SCHEMES[scheme], 16384, 2048, best)
    start = time.process_time()
    tools.build(best, k=int_linear(QuantLinearConfig(16384, layout, "bfloat16", "bfloat16"), best))
    assert time.process_time() - start < 5
