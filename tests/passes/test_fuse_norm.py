"""FuseNorm: the arithmetic of a norm becomes one op, in the spellings and dtypes that models use."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from llmc import ir
from llmc.ops import NORM, NormAttrs
from llmc.passes.fuse_norm import FuseNorm
from tests.passes.graphs import Model, assert_same

K = 32
EPS = 1e-5


def const(value, dtype="float32"):
    return relax.const(value, dtype)


def model(body, *, dtype="float32"):
    """`body(emit, x, w, b)`: x [1, T, K] is a computed tensor."""
    m = Model(dtype)
    table, w, b = m.param("table", 50, K), m.param("w", K), m.param("b", K)

    def whole(emit):
        rows = relax.ShapeExpr([1, m.tokens, K])
        return body(emit, emit(relax.op.reshape(emit(relax.op.take(table, m.ids, axis=0)), rows)), w, b)

    return m.build(whole)


def normed(emit, x, vectors, attrs):
    return emit(ir.opaque_call(NORM, [x, *vectors], attrs.to_json(), x.ty))


def root(emit, x, *, axis=-1):
    """1 / sqrt(mean(x * x) + eps)"""
    mean = emit(relax.op.mean(emit(relax.op.multiply(x, x)), axis=[axis], keepdims=True))
    return emit(relax.op.rsqrt(emit(relax.op.add(mean, const(EPS)))))


def eps():
    """As float32 holds it."""
    return ir.scalar_of(const(EPS))


def test_llama_in_float32():
    def body(emit, x, w, b):
        return emit(relax.op.multiply(w, emit(relax.op.multiply(x, root(emit, x)))))

    expected = model(lambda emit, x, w, b: normed(emit, x, [w], NormAttrs(eps(), has_weight=True)))
    assert_same(FuseNorm()(model(body)), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_llama_rounds_before_the_weight(dtype):
    def body(emit, x, w, b):
        f = emit(relax.op.astype(x, "float32"))
        y = emit(relax.op.astype(emit(relax.op.multiply(f, root(emit, f))), dtype))
        return emit(relax.op.multiply(w, y))

    attrs = NormAttrs(eps(), rounds_first=True, has_weight=True)
    expected = model(lambda emit, x, w, b: normed(emit, x, [w], attrs), dtype=dtype)
    assert_same(FuseNorm()(model(body, dtype=dtype)), expected)


def test_gemma_adds_one_and_rounds_last():
    def body(emit, x, w, b):
        f = emit(relax.op.astype(x, "float32"))
        y = emit(relax.op.multiply(f, root(emit, f)))
        one = emit(relax.op.add(emit(relax.op.astype(w, "float32")), const(1.0)))
        return emit(relax.op.astype(emit(relax.op.multiply(y, one)), "bfloat16"))

    attrs = NormAttrs(eps(), plus_one=True, has_weight=True)
    expected = model(lambda emit, x, w, b: normed(emit, x, [w], attrs), dtype="bfloat16")
    assert_same(FuseNorm()(model(body, dtype="bfloat16")), expected)


def layer_norm(dtype):
    def body(emit, x, w, b):
        cast = (lambda v: v) if dtype == "float32" else (lambda v: emit(relax.op.astype(v, "float32")))
        y = emit(relax.op.nn.layer_norm(cast(x), cast(w), cast(b), axes=[-1], epsilon=1e-5))
        return y if dtype == "float32" else emit(relax.op.astype(y, dtype))

    return body


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_layer_norm_with_its_casts(dtype):
    attrs = NormAttrs(1e-5, center=True, has_weight=True, has_bias=True)
    expected = model(lambda emit, x, w, b: normed(emit, x, [w, b], attrs), dtype=dtype)
    assert_same(FuseNorm()(model(layer_norm(dtype), dtype=dtype)), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight", [True, False])
def test_layer_norm_without_bias_comes_with_zeros(dtype, weight):
    # ModernBERT, MPT; without a weight too: OLMo
    def constant(emit, value):
        vector = relax.const(np.full(K, value, np.float32))
        return vector if dtype == "float32" else emit(relax.op.astype(vector, dtype))

    def body(emit, x, w, b):
        w = w if weight else constant(emit, 1.0)
        return layer_norm(dtype)(emit, x, w, constant(emit, 0.0))

    attrs = NormAttrs(1e-5, center=True, has_weight=weight)
    expected = model(lambda emit, x, w, b: normed(emit, x, [w] if weight else [], attrs), dtype=dtype)
    assert_same(FuseNorm()(model(body, dtype=dtype)), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_with_one_more_than_its_weight(dtype):
    # Nemotron
    def body(emit, x, w, b):
        return layer_norm(dtype)(emit, x, emit(relax.op.add(w, const(1.0, dtype))), b)

    attrs = NormAttrs(1e-5, center=True, has_weight=True, has_bias=True, plus_one=True)
    expected = model(lambda emit, x, w, b: normed(emit, x, [w, b], attrs), dtype=dtype)
    assert_same(FuseNorm()(model(body, dtype=dtype)), expected)


def _other_axis(emit, x, w, b):
    return emit(relax.op.multiply(x, root(emit, x, axis=1)))


def _of_something_else(emit, x, w, b):
    return emit(relax.op.multiply(emit(relax.op.negative(x)), root(emit, x)))


def _root_used_twice(emit, x, w, b):
    r = root(emit, x)
    return emit(relax.op.multiply(emit(relax.op.multiply(x, r)), r))


def _computed_weight(emit, x, w, b):
    # the norm itself is recognised, its product with something that is no weight is not
    y = emit(relax.op.nn.layer_norm(x, emit(relax.op.negative(w)), b, axes=[-1], epsilon=1e-5))
    return emit(relax.op.negative(y))


@pytest.mark.parametrize("body", [_other_axis, _of_something_else, _root_used_twice, _computed_weight])
def test_near_misses_stay(body):
    before = model(body)
    assert FuseNorm()(before) is before


def test_layer_norm_that_stays_in_float32_keeps_its_cast():
    # a result that is read in float32 must not be rounded
    def body(emit, x, w, b):
        y = layer_norm("float32")(emit, *(emit(relax.op.astype(v, "float32")) for v in (x, w, b)))
        return emit(relax.op.negative(y))

    before = model(body, dtype="bfloat16")
    assert FuseNorm()(before) is before
