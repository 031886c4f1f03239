"""LowerLinear and LowerEmbedding: which matmuls become kernels on packed weights, and which stay."""

from __future__ import annotations

import pytest
from tvm import relax, tirx

from llmc import ir
from llmc.passes.lower_embedding import LowerEmbedding
from llmc.passes.lower_linear import LowerLinear
from llmc.passes.rewrite import bindings_of
from llmc.targets.backend import get
from tests.passes.graphs import Model, linear

CAPS = get("cpu/x86-64-v3")[1]


def lowered(body, *params, dtype="float32", hidden=32):
    """Names of the operators and kernels that are left, and the result."""
    m = Model(dtype)
    weights = [m.param(name, *shape) for name, *shape in params]
    x = m.param("x", 1, 8, hidden)

    def build(emit):
        return body(emit, x, *weights)

    out = LowerLinear(CAPS)(m.build(build))
    relax.analysis.well_formed(out.module)  # raises if it is not
    return out, called(out)


def called(out):
    names = []
    for binding in bindings_of(out.module["main"]):
        value = binding.value
        if ir.is_op(value, "relax.call_tir"):
            names.append(value.args[0].name_hint)
        elif ir.op_name(value):
            names.append(ir.op_name(value))
    return names


def packed(out, name):
    found = [p for p in out.params if p.source == name and p.layout != "rows"]
    assert len(found) == 1, found
    return found[0]


def test_matmul_with_transposed_weight():
    out, names = lowered(lambda emit, x, w: linear(emit, x, w), ("w", 48, 32))
    assert names == ["linear_48_32"]
    assert packed(out, "w").shape == (3, 32, 16, 1)
    assert not packed(out, "w").transposed


def test_weight_stored_in_by_out_is_transposed_when_packed():
    out, names = lowered(lambda emit, x, w: emit(relax.op.matmul(x, w)), ("w", 32, 48))
    assert names == ["linear_48_32"]
    assert packed(out, "w").transposed


def test_bias_is_added_by_the_kernel():
    out, names = lowered(
        lambda emit, x, w, b: emit(relax.op.add(linear(emit, x, w), b)), ("w", 48, 32), ("b", 48)
    )
    assert names == ["linear_48_32"]
    call = bindings_of(out.module["main"])[0].value
    assert len(call.args[1].fields) == 3


def test_residual_is_not_taken_for_a_bias():
    _, names = lowered(lambda emit, x, w: emit(relax.op.add(linear(emit, x, w), x)), ("w", 32, 32))
    assert names == ["linear_32_32", "relax.add"]


def test_bias_of_a_result_that_is_used_twice_stays():
    def body(emit, x, w, b):
        y = linear(emit, x, w)
        return emit(relax.op.multiply(emit(relax.op.add(y, b)), y))

    _, names = lowered(body, ("w", 48, 32), ("b", 48))
    assert names == ["linear_48_32", "relax.add", "relax.multiply"]


def test_logits_cast_to_float32_are_written_so():
    out, names = lowered(
        lambda emit, x, w: emit(relax.op.astype(linear(emit, x, w), "float32")),
        ("w", 48, 32),
        dtype="float16",
    )
    assert names == ["linear_48_32"]
    assert str(bindings_of(out.module["main"])[-1].var.ty.dtype) == "float32"


def test_weight_behind_a_cast_is_packed_in_the_dtype_of_its_use():
    def body(emit, x, w):
        wide = emit(relax.op.astype(w, "float32"))
        return linear(emit, emit(relax.op.astype(x, "float32")), wide)

    out, names = lowered(body, ("w", 48, 32), dtype="bfloat16")
    assert names == ["relax.astype", "linear_48_32"]
    assert packed(out, "w").dtype == "float32"


def test_matmul_of_activations_is_left_alone():
    def body(emit, x, w):
        y = emit(relax.op.multiply(x, x))
        return emit(relax.op.matmul(x, emit(relax.op.permute_dims(y, [0, 2, 1]))))

    out, names = lowered(body, ("w", 48, 32))
    assert "relax.matmul" in names
    assert all(p.layout == "rows" for p in out.params)


def test_batched_matmul_with_a_weight_is_left_alone():
    m = Model()
    w = m.param("w", 4, 16, 16)
    x = m.param("x", 4, 8, 16)
    out = LowerLinear(CAPS)(m.build(lambda emit: emit(relax.op.matmul(x, w))))
    assert called(out) == ["relax.matmul"]


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_reads_the_packed_weight_only_if_tied(tied):
    m = Model()
    table = m.param("table", 50, 32)
    head = table if tied else m.param("head", 50, 32)
    x_shape = relax.ShapeExpr([tirx.IntImm("int64", 1), m.tokens, tirx.IntImm("int64", 32)])

    def body(emit):
        e = emit(relax.op.reshape(emit(relax.op.take(table, m.ids, axis=0)), x_shape))
        return linear(emit, e, head)

    out = LowerEmbedding(CAPS)(LowerLinear(CAPS)(m.build(body)))
    assert called(out) == ["embedding", "relax.reshape", "linear_50_32"]
    call = bindings_of(out.module["main"])[0].value
    assert len(call.args[1].fields[1].ty.shape) == (4 if tied else 2)
