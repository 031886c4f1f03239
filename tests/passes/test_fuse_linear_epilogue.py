"""FuseLinearEpilogue: activations and residual additions go into the matmul before them."""

from __future__ import annotations

import pytest
from tvm import relax

from llmc import ir
from llmc.ops import LINEAR, LinearAttrs
from llmc.passes.fuse_linear_epilogue import FuseLinearEpilogue
from tests.passes.graphs import Model, assert_same, linear

N, K = 48, 32


def model(body, *, dtype="float32"):
    """`body(emit, x, w, b, r)`: x [1, T, K] and r [1, T, N] are computed tensors."""
    m = Model(dtype)
    table, wide = m.param("table", 50, K), m.param("wide", 50, N)
    w, b = m.param("w", N, K), m.param("b", N)

    def whole(emit):
        rows = relax.ShapeExpr([1, m.tokens, K])
        x = emit(relax.op.reshape(emit(relax.op.take(table, m.ids, axis=0)), rows))
        rows = relax.ShapeExpr([1, m.tokens, N])
        r = emit(relax.op.reshape(emit(relax.op.take(wide, m.ids, axis=0)), rows))
        return body(emit, x, w, b, r)

    return m.build(whole)


def fused(emit, x, operands, attrs):
    """An llmc.linear with N results."""
    out = ir.tensor_type([*ir.dims(x)[:-1], N], str(x.ty.dtype))
    return emit(ir.opaque_call(LINEAR, [x, *operands], attrs.to_json(), out))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activation_and_bias(name, dtype):
    act = getattr(relax.op.nn, name)
    before = model(lambda emit, x, w, b, r: emit(act(emit(relax.op.add(linear(emit, x, w), b)))), dtype=dtype)
    expected = model(
        lambda emit, x, w, b, r: fused(emit, x, [w, b], LinearAttrs(activation=name, has_bias=True)),
        dtype=dtype,
    )
    assert_same(FuseLinearEpilogue()(before), expected)


@pytest.mark.parametrize("write", ["square", "multiply"])
def test_squared_relu_in_both_spellings(write):
    def body(emit, x, w, b, r):
        y = emit(relax.op.nn.relu(linear(emit, x, w)))
        return emit(relax.op.square(y) if write == "square" else relax.op.multiply(y, y))

    expected = model(lambda emit, x, w, b, r: fused(emit, x, [w], LinearAttrs(activation="relu2")))
    assert_same(FuseLinearEpilogue()(model(body)), expected)


@pytest.mark.parametrize("swapped", [False, True])
def test_residual_on_either_side(swapped):
    def body(emit, x, w, b, r):
        y = emit(relax.op.add(linear(emit, x, w), b))
        return emit(relax.op.add(*((y, r) if swapped else (r, y))))

    attrs = LinearAttrs(has_bias=True, has_residual=True)
    expected = model(lambda emit, x, w, b, r: fused(emit, x, [w, b, r], attrs))
    assert_same(FuseLinearEpilogue()(model(body)), expected)


def test_second_residual_stays_an_addition():
    def body(emit, x, w, b, r):
        y = emit(relax.op.add(linear(emit, x, w), r))
        return emit(relax.op.add(y, r))

    def expected(emit, x, w, b, r):
        return emit(relax.op.add(fused(emit, x, [w, r], LinearAttrs(has_residual=True)), r))

    assert_same(FuseLinearEpilogue()(model(body)), model(expected))


def _used_twice(emit, x, w, b, r):
    y = linear(emit, x, w)
    return emit(relax.op.add(emit(relax.op.nn.silu(y)), y))


def _of_another_dtype(emit, x, w, b, r):
    wide = emit(relax.op.astype(linear(emit, x, w), "float64"))
    return emit(relax.op.nn.silu(wide))


def _without_matmul(emit, x, w, b, r):
    return emit(relax.op.add(emit(relax.op.nn.silu(r)), r))


@pytest.mark.parametrize("body", [_used_twice, _of_another_dtype, _without_matmul])
def test_near_misses_stay(body):
    before = model(body)
    assert FuseLinearEpilogue()(before) is before


def test_residual_that_broadcasts_stays():
    def body(emit, x, w, b, r):
        row = emit(relax.op.reshape(emit(relax.op.negative(b)), relax.ShapeExpr([1, 1, N])))
        return emit(relax.op.add(linear(emit, x, w), row))

    before = model(body)
    assert FuseLinearEpilogue()(before) is before
