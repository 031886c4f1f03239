"""FuseQKV: which projections become one matmul, and which stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from llmc import ir
from llmc.ops import ATTENTION, AttentionAttrs
from llmc.packing import pack_sources
from llmc.passes.fuse_qkv import FuseQKV
from llmc.passes.rewrite import bindings_of
from llmc.passes.step_module import PackedParam
from llmc.schedules.layout import BlockedLayout
from tests.passes.graphs import Model, linear

WIDTH, DIM = 32, 8
HEADS = {"q": 4, "k": 2, "v": 2}


def model(*, biases="", fused=False, other_input=False, norm=False):
    """One attention block; `fused` writes the expected graph."""
    m = Model()
    x0 = m.param("x", 1, 8, WIDTH)
    rows = {n: HEADS[n] * DIM for n in HEADS}
    w = {n: m.param(f"l.{n}.weight", rows[n], WIDTH) for n in HEADS}
    b = {n: m.param(f"l.{n}.bias", rows[n]) for n in biases}
    whole = m.param("l_q_k_v_weight", sum(rows.values()), WIDTH) if fused else None
    whole_bias = m.param("l_q_k_v_bias", sum(rows.values())) if fused and biases else None

    def body(emit):
        def heads(y, n):
            y = emit(relax.op.reshape(y, relax.ShapeExpr([1, 8, HEADS[n], DIM])))
            y = emit(relax.op.permute_dims(y, [0, 2, 1, 3]))
            return emit(relax.op.multiply(y, y)) if norm and n != "v" else y

        if fused:
            y = linear(emit, x0, whole)
            y = emit(relax.op.add(y, whole_bias)) if biases else y
            at, parts = 0, {}
            for n in HEADS:
                cut = relax.op.strided_slice(y, axes=[2], begin=[at], end=[at + rows[n]])
                parts[n] = emit(cut)
                at += rows[n]
            qkv = [heads(parts[n], n) for n in HEADS]
        else:
            qkv = []
            for n in HEADS:
                x = emit(relax.op.negative(x0)) if other_input and n == "q" else x0
                y = linear(emit, x, w[n])
                qkv.append(heads(emit(relax.op.add(y, b[n])) if n in b else y, n))
        out = ir.tensor_type([1, 8, 4, DIM], "float32")
        attrs = AttentionAttrs(layer=0, scale=0.25).to_json()
        return emit(
            relax.op.reshape(emit(ir.opaque_call(ATTENTION, qkv, attrs, out)), relax.ShapeExpr([8, WIDTH]))
        )

    return m.build(body)


def simplified(lowered):
    """The function with dead code gone and bindings in one order, to compare."""
    return [
        (ir.op_name(b.value), [int(d) for d in b.var.ty.shape])
        for b in sorted(
            bindings_of(lowered.module["main"]), key=lambda b: str(b.var.ty.shape) + ir.op_name(b.value)
        )
    ]


@pytest.mark.parametrize("biases", ["", "qkv"])
@pytest.mark.parametrize("norm", [False, True])
def test_unequal_widths_become_one_matmul(biases, norm):
    before, expected = model(biases=biases, norm=norm), model(biases=biases, norm=norm, fused=True)
    after = FuseQKV()(before)
    assert simplified(after) == simplified(expected)
    found = [p for p in after.params if p.more]
    assert [p.sources for p in found] == [
        tuple(f"l.{n}.{kind}" for n in HEADS) for kind in ("weight", "bias")[: 2 if biases else 1]
    ]
    assert found[0].name == "l.q+k+v.weight"
    assert found[0].shape == (64, WIDTH)


def test_slices_are_in_the_order_of_the_sources():
    after = FuseQKV()(model())
    cuts = [
        ir.slice_of(b.value)
        for b in bindings_of(after.module["main"])
        if ir.is_op(b.value, "relax.strided_slice")
    ]
    assert cuts == [(2, 0, 32, 1), (2, 32, 48, 1), (2, 48, 64, 1)]


def test_projection_of_another_input_stays():
    after = FuseQKV()(model(other_input=True))
    assert [p.sources for p in after.params if p.more] == [("l.k.weight", "l.v.weight")]


def test_bias_on_some_projections_only_is_not_fused():
    before = model(biases="qk")
    after = FuseQKV()(before)
    assert all(set(p.sources) != {"l.q.weight", "l.k.weight", "l.v.weight"} for p in after.params)
    assert not any(p.more for p in after.params)


def test_weight_that_is_used_twice_stays():
    m = Model()
    x, w = m.param("x", 1, 8, WIDTH), m.param("w", WIDTH, WIDTH)

    def body(emit):
        y = [
            emit(
                relax.op.permute_dims(
                    emit(relax.op.reshape(linear(emit, x, w), relax.ShapeExpr([1, 8, 4, DIM]))), [0, 2, 1, 3]
                )
            )
            for _ in range(3)
        ]
        out = ir.tensor_type([1, 8, 4, DIM], "float32")
        return emit(ir.opaque_call(ATTENTION, y, AttentionAttrs(layer=0, scale=1.0).to_json(), out))

    before = m.build(body)
    assert FuseQKV()(before) is before


def test_graph_without_attention_is_unchanged():
    m = Model()
    x, a, b = m.param("x", 1, 8, WIDTH), m.param("a", WIDTH, WIDTH), m.param("b", WIDTH, WIDTH)
    before = m.build(lambda emit: emit(relax.op.add(linear(emit, x, a), linear(emit, x, b))))
    after = FuseQKV()(before)
    tvm.ir.assert_structural_equal(after.module, before.module)


@pytest.mark.parametrize("sizes", [(64, 32, 32), (20, 7, 9)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sources_are_packed_end_to_end(sizes, dtype):
    layout = BlockedLayout(16, 2)
    tensors = {f"w{i}": torch.randn(n, 10).to(getattr(torch, dtype)) for i, n in enumerate(sizes)}
    shape = layout.packed_shape(sum(sizes), 10)
    param = PackedParam("w", "w0", dtype, shape, layout.as_text(), more=("w1", "w2"))
    loaded = []
    packed = pack_sources(param, lambda name: loaded.append(name) or tensors[name])
    whole = torch.cat(list(tensors.values()))
    whole = whole.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else whole.numpy()
    np.testing.assert_array_equal(packed, layout.pack(whole))
    assert loaded == ["w0", "w1", "w2"]
