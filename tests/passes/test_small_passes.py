"""CancelTransposes, ShareCoefficients, RaiseActivations, ViewReshapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tvm import relax, tirx

from llmc import ir
from llmc.passes.cancel_transposes import CancelTransposes
from llmc.passes.raise_activations import RaiseActivations
from llmc.passes.rewrite import bindings_of
from llmc.passes.share_coefficients import ShareCoefficients
from tests.passes.graphs import Model, assert_same

K = 32


def model(body, *, dtype="float32"):
    """`body(m, emit, x)`: x [1, T, K] is a computed tensor."""
    m = Model(dtype)
    table = m.param("table", 50, K)

    def whole(emit):
        rows = relax.ShapeExpr([1, m.tokens, K])
        return body(m, emit, emit(relax.op.reshape(emit(relax.op.take(table, m.ids, axis=0)), rows)))

    return m.build(whole)


def shaped(m, emit, x, *dims):
    return emit(relax.op.reshape(x, relax.ShapeExpr([m.tokens if d == "T" else d for d in dims])))


def turned(emit, x, axes=(0, 2, 1, 3)):
    return emit(relax.op.permute_dims(x, list(axes)))


# --- CancelTransposes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [False, True])
def test_transpose_of_a_transpose_goes(between):
    def body(m, emit, x):
        y = turned(emit, shaped(m, emit, x, 1, "T", 4, 8))
        if between:
            y = shaped(m, emit, shaped(m, emit, y, 4, "T", 8), 1, 4, "T", 8)
        return emit(relax.op.negative(turned(emit, y)))

    expected = model(lambda m, emit, x: emit(relax.op.negative(shaped(m, emit, x, 1, "T", 4, 8))))
    assert_same(CancelTransposes()(model(body)), expected)


def test_cast_between_transposes_stays():
    def body(m, emit, x):
        y = emit(relax.op.astype(turned(emit, shaped(m, emit, x, 1, "T", 4, 8)), "float32"))
        return turned(emit, y)

    def expected(m, emit, x):
        return emit(relax.op.astype(shaped(m, emit, x, 1, "T", 4, 8), "float32"))

    after = CancelTransposes()(model(body, dtype="bfloat16"))
    assert_same(after, model(expected, dtype="bfloat16"))


def test_other_orders_stay():
    def rotated(m, emit, x):
        y = turned(emit, shaped(m, emit, x, 1, "T", 4, 8), (0, 2, 3, 1))
        return turned(emit, y, (0, 2, 3, 1))

    def reshaped(m, emit, x):  # the reshape mixes what the transposes moved
        y = turned(emit, shaped(m, emit, x, 1, "T", 4, 8))
        return turned(emit, shaped(m, emit, y, 1, "T", 4, 8))

    for body in (rotated, reshaped):
        before = model(body)
        assert CancelTransposes()(before) is before


# --- ShareCoefficients --------------------------------------------------------------------------------------------


def angles(m, emit, factor):
    at = emit(relax.op.astype(shaped(m, emit, m.positions, 1, "T", 1), "float32"))
    table = relax.const(factor ** np.arange(K, dtype=np.float32))
    return emit(relax.op.cos(emit(relax.op.multiply(at, table))))


def test_layers_share_what_depends_on_positions():
    def body(m, emit, x):
        for _ in range(3):
            x = emit(relax.op.multiply(x, angles(m, emit, 0.5)))
        return x

    def expected(m, emit, x):
        c = angles(m, emit, 0.5)
        for _ in range(3):
            x = emit(relax.op.multiply(x, c))
        return x

    assert_same(ShareCoefficients()(model(body)), model(expected))


def test_other_constants_and_tokens_are_not_shared():
    def body(m, emit, x):
        x = emit(relax.op.multiply(emit(relax.op.multiply(x, angles(m, emit, 0.5))), angles(m, emit, 0.25)))
        return emit(relax.op.add(emit(relax.op.negative(x)), emit(relax.op.negative(x))))

    after = ShareCoefficients()(model(body))
    names = [ir.op_name(b.value) for b in bindings_of(after.module["main"])]
    assert names.count("relax.cos") == 2  # their common beginning is shared
    assert names.count("relax.astype") == 1
    assert names.count("relax.negative") == 2


# --- RaiseActivations ---------------------------------------------------------------------------------------------


def number(value, dtype):
    return relax.const(value, dtype)


def gpt2_gelu(emit, x, d):
    cube = emit(relax.op.multiply(emit(relax.op.multiply(x, x)), x))
    inner = emit(relax.op.add(x, emit(relax.op.multiply(number(0.044715, d), cube))))
    inner = emit(relax.op.tanh(emit(relax.op.multiply(inner, number(math.sqrt(2 / math.pi), d)))))
    return emit(
        relax.op.multiply(
            emit(relax.op.multiply(x, number(0.5, d))), emit(relax.op.add(inner, number(1.0, d)))
        )
    )


def bloom_gelu(emit, x, d):
    square = emit(relax.op.multiply(emit(relax.op.multiply(x, number(0.044715, d))), x))
    inner = emit(
        relax.op.multiply(
            emit(relax.op.multiply(x, number(0.79788456, d))), emit(relax.op.add(number(1.0, d), square))
        )
    )
    one = emit(relax.op.add(emit(relax.op.tanh(inner)), number(1.0, d)))
    return emit(relax.op.multiply(emit(relax.op.multiply(x, number(0.5, d))), one))


def erf_gelu(emit, x, d):
    inner = emit(relax.op.erf(emit(relax.op.divide(x, number(math.sqrt(2.0), d)))))
    one = emit(relax.op.add(inner, number(1.0, d)))
    return emit(relax.op.multiply(emit(relax.op.multiply(x, number(0.5, d))), one))


def written_silu(emit, x, d):
    return emit(relax.op.multiply(x, emit(relax.op.sigmoid(x))))


FORMS = {gpt2_gelu: "gelu_tanh", bloom_gelu: "gelu_tanh", erf_gelu: "gelu", written_silu: "silu"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_activations_are_known_by_their_values(form, dtype):
    before = model(lambda m, emit, x: form(emit, x, dtype), dtype=dtype)
    operator = getattr(relax.op.nn, FORMS[form])
    expected = model(lambda m, emit, x: emit(operator(x)), dtype=dtype)
    assert_same(RaiseActivations()(before), expected)


def quick_gelu(emit, x, d):
    return emit(relax.op.multiply(x, emit(relax.op.sigmoid(emit(relax.op.multiply(x, number(1.702, d)))))))


def other_constant(emit, x, d):
    return emit(relax.op.multiply(x, emit(relax.op.sigmoid(emit(relax.op.multiply(x, number(1.01, d)))))))


def gated(emit, x, d):
    return emit(relax.op.multiply(emit(relax.op.negative(x)), emit(relax.op.sigmoid(x))))


@pytest.mark.parametrize("form", [quick_gelu, other_constant, gated])
def test_other_functions_stay(form):
    before = model(lambda m, emit, x: form(emit, x, "float32"))
    assert RaiseActivations()(before) is before


def test_two_tensors_are_no_activation():
    def body(m, emit, x):
        y = emit(relax.op.matmul(x, relax.const(np.eye(K, dtype=np.float32))))
        return emit(relax.op.multiply(x, emit(relax.op.sigmoid(y))))

    before = model(body)
    assert RaiseActivations()(before) is before


def test_dimensions_may_be_symbolic():
    after = RaiseActivations()(model(lambda m, emit, x: written_silu(emit, x, "float32")))
    (call,) = [b for b in bindings_of(after.module["main"]) if ir.is_op(b.value, "relax.nn.silu")]
    assert isinstance(call.var.ty.shape[1], tirx.Var)
