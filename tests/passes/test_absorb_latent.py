"""AbsorbLatent and FuseLatentHeads: what is rewritten, what is left alone, and that the result is the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tvm import relax

from llmc import ir
from llmc.errors import LlmcError
from llmc.ops import (
    ATTENTION,
    HEAD_LINEAR,
    HEADS,
    NORM,
    AttentionAttrs,
    HeadLinearAttrs,
    HeadsAttrs,
    NormAttrs,
    Run,
)
from llmc.packing import pack_sources
from llmc.passes.absorb_latent import AbsorbLatent
from llmc.passes.fuse_latent_heads import FuseLatentHeads
from llmc.passes.plan_kv_cache import PlanKVCache
from llmc.passes.quantize_weights import QuantizeWeights
from llmc.passes.rewrite import bindings_of
from llmc.quant.schemes import QuantRules
from tests.passes.graphs import Model, assert_same, linear
from tests.passes.test_fuse_rope import cut, for_heads, halves, tables

WIDTH, H, RANK, NOPE, ROPE, V = 64, 4, 32, 16, 8, 12
ATTRS = AttentionAttrs(layer=0, scale=0.2)
NORM_ATTRS = NormAttrs(eps=1e-6, has_weight=True, rounds_first=True)


def heads(m, emit, y, width):
    """[1, T, H * width] as [1, H, T, width]."""
    y = emit(relax.op.reshape(y, relax.ShapeExpr([1, m.tokens, H, width])))
    return emit(relax.op.permute_dims(y, [0, 2, 1, 3]))


class Latent:
    """A block of multi-head latent attention.

    Args:
        apart: keys and values have weights of their own.
        rope_first: in keys and queries.
        rope: width of the part that heads share; 0 = none.
        edit: edit(emit, name, var) changes c, the common part of keys, or the projection.
    """

    def __init__(self, *, apart=False, rope_first=False, rope=ROPE, rank=RANK, edit=None, dtype="float32"):
        self.m = m = Model(dtype)
        self.apart, self.rope_first, self.rope, self.rank, self.edit = apart, rope_first, rope, rank, edit
        self.embed = m.param("embed", 50, WIDTH)
        self.wq, self.wa = m.param("q", H * (NOPE + rope), WIDTH), m.param("kv_a", rank + rope, WIDTH)
        self.weight = m.param("norm", rank)
        if apart:
            self.wk, self.wv = m.param("k_b", H * NOPE, rank), m.param("v_b", H * V, rank)
        else:
            self.wb = m.param("kv_b", H * (NOPE + V), rank)

    def _edit(self, emit, name, var):
        return self.edit(emit, name, var) if self.edit else var

    def inputs(self, emit):
        """(q's projection, c, kv_a's projection, cos and sin)."""
        m = self.m
        x = emit(
            relax.op.reshape(
                emit(relax.op.take(self.embed, m.ids, axis=0)), relax.ShapeExpr([1, m.tokens, WIDTH])
            )
        )
        y, z = linear(emit, x, self.wq), linear(emit, x, self.wa)
        tabs = [for_heads(m, emit, c) for c in tables(m, emit, self.rope, m.dtype)] if self.rope else []
        c = cut(emit, z, 0, self.rank) if self.rope else z
        c = emit(ir.opaque_call(NORM, [c, self.weight], NORM_ATTRS.to_json(), c.ty))
        return y, self._edit(emit, "c", c), z, tabs

    def common(self, emit, z, tabs):
        shape = relax.ShapeExpr([1, 1, self.m.tokens, self.rope])
        part = emit(relax.op.reshape(cut(emit, z, self.rank, self.rank + self.rope), shape))
        return self._edit(emit, "common", halves(self.m, emit, part, *tabs))

    def query(self, emit, y, tabs):
        """(projected part, rotated part)."""
        q = heads(self.m, emit, y, NOPE + self.rope)
        if not self.rope:
            return q, None
        at = self.rope if self.rope_first else 0
        turned = cut(emit, q, 0, at) if self.rope_first else cut(emit, q, NOPE, NOPE + self.rope)
        return cut(emit, q, at, at + NOPE), halves(self.m, emit, turned, *tabs)

    def join(self, emit, first, second):
        if second is None:
            return first
        return emit(relax.op.concat([second, first] if self.rope_first else [first, second], axis=3))

    def before(self, times=1):
        """The block; with `times` attention over the same keys and values as often, the results added."""
        m = self.m

        def body(emit):
            t = m.tokens
            y, c, z, tabs = self.inputs(emit)
            inner = emit(relax.op.reshape(c, relax.ShapeExpr([1, 1, t, self.rank])))
            if self.apart:
                k, v = (heads(m, emit, linear(emit, inner, w), n) for w, n in ((self.wk, NOPE), (self.wv, V)))
            else:
                kv = heads(m, emit, self._edit(emit, "kv", linear(emit, inner, self.wb)), NOPE + V)
                k, v = cut(emit, kv, 0, NOPE), cut(emit, kv, NOPE, NOPE + V)
            wide = None
            if self.rope:
                shape = relax.ShapeExpr([1, H, t, self.rope])
                wide = emit(relax.op.broadcast_to(self.common(emit, z, tabs), shape))
            k = self._edit(emit, "k", self.join(emit, k, wide))
            q = self.join(emit, *self.query(emit, y, tabs))
            out = ir.tensor_type([1, t, H, V], m.dtype)
            results = [
                emit(ir.opaque_call(ATTENTION, [q, k, v], replace(ATTRS, layer=i).to_json(), out))
                for i in range(times)
            ]
            return results[0] if times == 1 else emit(relax.op.add(*results))

        return m.build(body)

    def expected(self):
        """Before FuseLatentHeads; the weights' recipes are looked at elsewhere."""
        m, rank = self.m, self.rank
        of_queries, of_values = m.param("of_queries", H, rank, NOPE), m.param("of_values", H, V, rank)

        def body(emit):
            t = m.tokens
            y, c, z, tabs = self.inputs(emit)
            common = self.common(emit, z, tabs)
            part, turned = self.query(emit, y, tabs)
            first = HeadLinearAttrs(H, 0, NOPE, NOPE, True).to_json()
            out = ir.tensor_type([1, t, H, rank], m.dtype)
            a = emit(ir.opaque_call(HEAD_LINEAR, [part, of_queries], first, out))
            a = emit(relax.op.permute_dims(a, [0, 2, 1, 3]))
            q = emit(relax.op.concat([a, turned], axis=3))
            latent = emit(relax.op.reshape(c, relax.ShapeExpr([1, 1, t, rank])))
            k = emit(relax.op.concat([latent, common], axis=3))
            text = replace(ATTRS, latent=rank).to_json()
            o = emit(ir.opaque_call(ATTENTION, [q, k, k], text, out))
            second = HeadLinearAttrs(H, 0, H * rank, rank, False).to_json()
            out = ir.tensor_type([1, t, H, V], m.dtype)
            return emit(ir.opaque_call(HEAD_LINEAR, [o, of_values], second, out))

        return m.build(body)


def matches(lowered, name):
    return [m for m in (ir.match_opaque(b.value, name) for b in bindings_of(lowered.module["main"])) if m]


@pytest.mark.parametrize("rope_first", [False, True])
def test_before_and_expected(rope_first):
    before, after = Latent(rope_first=rope_first), Latent(rope_first=rope_first)
    found = AbsorbLatent()(before.before())
    assert_same(found, after.expected())
    # what is left over of kv_b has no use; a cached token is c and the common part instead of keys and values of all heads
    group = PlanKVCache(page_size=16, kv_dtype=None, max_seq_len=64)(found).groups[0]
    assert group.latent and (group.kv_heads, group.key_dim, group.value_dim) == (1, RANK + ROPE, RANK)
    assert group.pool_shapes(5, 16) == ((5, 1, 1, RANK + ROPE, 16),)
    assert group.page_bytes(16) == 16 * (RANK + ROPE) * 4


@pytest.mark.parametrize("apart", [False, True])
def test_weights_of_queries_and_values(apart):
    model = Latent(apart=apart)
    made = {p.name.rpartition(".")[2]: p for p in AbsorbLatent()(model.before()).params if p.expression}
    import torch

    weights = {n: torch.randn(H * w, RANK) for n, w in (("k_b", NOPE), ("v_b", V), ("kv_b", NOPE + V))}
    packed = {name: pack_sources(p, weights.__getitem__) for name, p in made.items()}
    if apart:
        keys, values = (weights[n].numpy().reshape(H, -1, RANK) for n in ("k_b", "v_b"))
    else:
        keys, values = np.split(weights["kv_b"].numpy().reshape(H, NOPE + V, RANK), [NOPE], axis=1)
    np.testing.assert_array_equal(packed["of_queries"], keys.transpose(0, 2, 1))
    np.testing.assert_array_equal(packed["of_values"], values)


def test_layers_that_share_keys_share_latents_and_weights():
    lowered = AbsorbLatent()(Latent().before(times=2))
    (first, _), (second, _) = matches(lowered, ATTENTION)
    assert first[1] == second[1] and len({p.name for p in lowered.params}) == len(lowered.params)
    plan = PlanKVCache(page_size=16, kv_dtype=None, max_seq_len=64)(lowered)
    assert plan.shared == ((1, 0),) and plan.groups[0].layers == (0,)


def test_without_a_rotated_part():
    after = AbsorbLatent()(Latent(rope=0).before())
    (operands, text), *more = matches(after, ATTENTION)
    assert not more and AttentionAttrs.from_json(text).latent == RANK
    assert [int(d) for d in ir.dims(operands[1])[-1:]] == [RANK]


def scaled(what):
    """An edit that puts arithmetic where a copy is expected."""
    return lambda emit, name, var: emit(relax.op.multiply(var, relax.const(2.0))) if name == what else var


NEAR_MISSES = {
    "keys are computed further": Latent(edit=scaled("k")),
    "the projection is computed further": Latent(edit=scaled("kv")),
    # 4 * (16 + 8 + 12) elements per token, and (60 + 8) of latents, but scores and sums over 68 + 60 instead of 24 + 12
    "the cache shrinks less than the arithmetic grows": Latent(rank=60),
}


@pytest.mark.parametrize("what", NEAR_MISSES)
def test_near_misses_are_left_alone(what):
    lowered = NEAR_MISSES[what].before()
    assert AbsorbLatent()(lowered) is lowered


def test_the_latent_may_be_anything_per_token():
    after = AbsorbLatent()(Latent(edit=scaled("c")).before())
    assert len(matches(after, HEAD_LINEAR)) == 2
    after = AbsorbLatent()(Latent(edit=scaled("common")).before())
    assert len(matches(after, HEAD_LINEAR)) == 2


def test_a_rule_for_an_absorbed_weight_is_refused():
    lowered = AbsorbLatent()(Latent().before())
    with pytest.raises(LlmcError, match="head by head") as raised:
        QuantizeWeights(QuantRules(patterns=(("kv_b", "q8"),)))(lowered)
    assert "AbsorbLatent" in str(raised.value.hint)
    schemes = {p.name: p.scheme for p in QuantizeWeights(QuantRules("q8"))(lowered).params}
    assert schemes["kv_a"] == schemes["q"] == "q8"
    assert not any(scheme for name, scheme in schemes.items() if name.startswith("kv_b"))


# -- FuseLatentHeads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_are_read_where_they_lie(dtype):
    after = FuseLatentHeads()(AbsorbLatent()(Latent(dtype=dtype).before()))
    (first, text), _ = matches(after, HEAD_LINEAR)
    half, whole = ROPE // 2, NOPE + ROPE
    attrs = HeadLinearAttrs.from_json(text)
    assert (attrs.offset, attrs.token_stride, attrs.head_stride, attrs.head_major) == (
        0,
        H * whole,
        whole,
        False,
    )
    assert [int(ir.dims(first[0])[-1]), len(first)] == [H * whole, 4]  # q's projection, weight, cos, sin
    assert attrs.rest is not None and attrs.rest.dim == ROPE
    ((operands, text),) = matches(after, HEADS)
    runs = (
        Run(0, 1, RANK, 0, 1),
        Run(RANK, 1, half, RANK, 1, True, 0, 0, 1, -1, RANK + half, 1, 1, 0, 1),
        Run(RANK + half, 1, half, RANK + half, 1, True, 0, half, 1, 1, RANK, 1, 1, half, 1),
    )
    width = RANK + ROPE
    assert HeadsAttrs.from_json(text) == HeadsAttrs(1, width, 0, width, RANK, False, runs, NORM_ATTRS, RANK)
    assert int(ir.dims(operands[0])[-1]) == width
    ((attention, text),) = matches(after, ATTENTION)
    assert AttentionAttrs.from_json(text).token_major
    assert [int(d) for d in ir.dims(attention[0])[2:]] == [H, RANK + ROPE]
    # nothing is cut or copied; angles are put together once for all layers
    names = [ir.op_name(b.value) for b in bindings_of(after.module["main"])]
    assert "relax.strided_slice" not in names and names.count("relax.concat") == 1


def test_keys_that_are_computed_further_stay():
    after = FuseLatentHeads()(AbsorbLatent()(Latent(edit=scaled("common")).before()))
    assert not matches(after, HEADS)
    ((_, text),) = matches(after, ATTENTION)
    assert AttentionAttrs.from_json(text).token_major  # the queries alone


def test_other_attention_is_left_alone():
    lowered = Latent().before()
    assert FuseLatentHeads()(lowered) is lowered


def test_coded_pages_are_refused():
    with pytest.raises(LlmcError, match="cache of latents must be f32, f16 or bf16"):
        PlanKVCache(page_size=16, kv_dtype="int8", max_seq_len=64)(AbsorbLatent()(Latent().before()))
