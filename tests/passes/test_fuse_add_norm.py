"""FuseAddNorm: a residual addition and the norm of its sum become one op."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tvm import relax

from llmc import ir
from llmc.ops import NORM, NormAttrs
from llmc.passes.fuse_add_norm import FuseAddNorm
from tests.passes.graphs import Model, assert_same

K = 32
RMS = NormAttrs(1e-5, has_weight=True)
LAYER = NormAttrs(1e-5, center=True, has_weight=True, has_bias=True)
ONLY_SUM = NormAttrs(0.0, adds=True, only_sum=True)
GEMMA = NormAttrs(1e-6, plus_one=True, has_weight=True)


def model(body):
    """`body(emit, a, c, w, b)`: a and c [1, T, K] are computed tensors."""
    m = Model()
    tables = m.param("t0", 50, K), m.param("t1", 50, K)
    w, b = m.param("w", K), m.param("b", K)

    def whole(emit):
        rows = relax.ShapeExpr([1, m.tokens, K])
        a, c = (emit(relax.op.reshape(emit(relax.op.take(t, m.ids, axis=0)), rows)) for t in tables)
        return body(emit, a, c, w, b)

    return m.build(whole)


def norm(emit, x, attrs, w, b):
    vectors = [w, b][: attrs.has_weight + attrs.has_bias]
    return emit(ir.opaque_call(NORM, [x, *vectors], attrs.to_json(), x.ty))


def add_norm(emit, x, addend, attrs, w, b):
    vectors = [w, b][: attrs.has_weight + attrs.has_bias]
    text = replace(attrs, adds=True).to_json()
    both = emit(ir.opaque_call(NORM, [x, addend, *vectors], text, relax.TupleType([x.ty, x.ty])))
    return emit(relax.TupleGetItem(both, 0)), emit(relax.TupleGetItem(both, 1))


@pytest.mark.parametrize("attrs", [RMS, LAYER, GEMMA], ids=["rms", "layer", "gemma"])
def test_sum_and_norm(attrs):
    def body(emit, a, c, w, b):
        s = emit(relax.op.add(a, c))
        return emit(relax.op.multiply(s, norm(emit, s, attrs, w, b)))

    def expected(emit, a, c, w, b):
        s, y = add_norm(emit, a, c, attrs, w, b)
        return emit(relax.op.multiply(s, y))

    assert_same(FuseAddNorm()(model(body)), model(expected))


def test_second_norm_of_the_sum_stays():
    # a parallel block with two norms (GPT-NeoX): one goes with the addition
    def body(emit, a, c, w, b):
        s = emit(relax.op.add(a, c))
        return emit(relax.op.add(norm(emit, s, LAYER, w, b), norm(emit, s, RMS, w, b)))

    def expected(emit, a, c, w, b):
        s, y = add_norm(emit, a, c, LAYER, w, b)
        attrs = replace(ONLY_SUM, before=RMS)
        return emit(ir.opaque_call(NORM, [y, s, w], attrs.to_json(), y.ty))

    assert_same(FuseAddNorm()(model(body)), model(expected))


@pytest.mark.parametrize("swapped", [False, True])
def test_norm_of_the_addend_goes_too(swapped):
    # Gemma 2: behind the attention block and before the feed-forward layer
    def body(emit, a, c, w, b):
        n = norm(emit, c, GEMMA, w, b)
        s = emit(relax.op.add(*((n, a) if swapped else (a, n))))
        return emit(relax.op.multiply(s, norm(emit, s, LAYER, w, b)))

    def expected(emit, a, c, w, b):
        text = replace(LAYER, adds=True, before=GEMMA).to_json()
        both = emit(ir.opaque_call(NORM, [a, c, w, w, b], text, relax.TupleType([a.ty, a.ty])))
        return emit(relax.op.multiply(emit(relax.TupleGetItem(both, 0)), emit(relax.TupleGetItem(both, 1))))

    assert_same(FuseAddNorm()(model(body)), model(expected))


def test_norm_of_the_addend_alone():
    # OLMo 2: nothing is normalised before a layer
    def body(emit, a, c, w, b):
        return emit(relax.op.add(a, norm(emit, c, RMS, w, b)))

    def expected(emit, a, c, w, b):
        return emit(ir.opaque_call(NORM, [a, c, w], replace(ONLY_SUM, before=RMS).to_json(), a.ty))

    assert_same(FuseAddNorm()(model(body)), model(expected))


def test_norm_that_is_read_twice_stays():
    def body(emit, a, c, w, b):
        n = norm(emit, c, RMS, w, b)
        return emit(relax.op.multiply(emit(relax.op.add(a, n)), n))

    before = model(body)
    assert FuseAddNorm()(before) is before


def test_norm_of_something_else_stays():
    before = model(lambda emit, a, c, w, b: norm(emit, emit(relax.op.subtract(a, c)), RMS, w, b))
    assert FuseAddNorm()(before) is before


def test_sum_that_broadcasts_stays():
    def body(emit, a, c, w, b):
        row = emit(relax.op.reshape(emit(relax.op.negative(w)), relax.ShapeExpr([1, 1, K])))
        return norm(emit, emit(relax.op.add(a, row)), RMS, w, b)

    before = model(body)
    assert FuseAddNorm()(before) is before
