"""FuseRoPE: heads are read where the projection wrote them, and rotated in any arrangement and dtype."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from llmc import ir
from llmc.ops import ATTENTION, HEADS, NORM, AttentionAttrs, HeadsAttrs, NormAttrs, Run
from llmc.passes.fuse_rope import FuseRoPE
from llmc.passes.rewrite import bindings_of
from tests.passes.graphs import Model, assert_same, linear

DIM, HEADS_OF = 8, {"q": 4, "k": 2, "v": 2}
WIDTH = 32
ROWS = {n: DIM * h for n, h in HEADS_OF.items()}
ATTRS = AttentionAttrs(layer=0, scale=0.25).to_json()


def cast(emit, x, dtype):
    return x if str(x.ty.dtype) == dtype else emit(relax.op.astype(x, dtype))


def cut(emit, x, begin, end, step=1):
    axis = len(ir.dims(x)) - 1
    return emit(relax.op.strided_slice(x, axes=[axis], begin=[begin], end=[end], strides=[step]))


def tables(m, emit, width, dtype, *, twice=True):
    """cos and sin [1, T, width] of positions, computed in float32."""
    rows = relax.ShapeExpr([1, m.tokens, 1])
    at = emit(relax.op.astype(emit(relax.op.reshape(m.positions, rows)), "float32"))
    half = width // 2 if twice else width
    angle = emit(relax.op.multiply(at, relax.const(0.5 ** np.arange(half, dtype=np.float32))))
    if twice:
        angle = emit(relax.op.concat([angle, angle], axis=2))
    return [cast(emit, emit(f(angle)), dtype) for f in (relax.op.cos, relax.op.sin)]


def for_heads(m, emit, table):
    """[1, T, w] as [1, 1, T, w]."""
    return emit(relax.op.reshape(table, relax.ShapeExpr([1, 1, m.tokens, int(ir.dims(table)[-1])])))


def halves(m, emit, x, cos, sin):
    """x * cos + concat(-x[d/2:], x[:d/2]) * sin"""
    d = int(ir.dims(x)[-1])
    turned = emit(
        relax.op.concat([emit(relax.op.negative(cut(emit, x, d // 2, d))), cut(emit, x, 0, d // 2)], 3)
    )
    left, right = emit(relax.op.multiply(x, cos)), emit(relax.op.multiply(turned, sin))
    return emit(relax.op.add(left, right))


def interleaved(m, emit, x, cos, sin):
    """Pairs of neighbours (GPT-J, Cohere)."""
    d, h = int(ir.dims(x)[-1]), ir.dims(x)[1]
    shape = relax.ShapeExpr([1, h, m.tokens, d // 2, 1])
    odd = emit(relax.op.negative(cut(emit, x, 1, d, 2)))
    parts = [emit(relax.op.reshape(p, shape)) for p in (odd, cut(emit, x, 0, d, 2))]
    turned = emit(relax.op.reshape(emit(relax.op.concat(parts, 4)), relax.ShapeExpr([1, h, m.tokens, d])))
    left, right = emit(relax.op.multiply(x, cos)), emit(relax.op.multiply(turned, sin))
    return emit(relax.op.add(left, right))


def partial(m, emit, x, cos, sin):
    """The first half of a head is rotated (Phi, GPT-NeoX)."""
    d = int(ir.dims(x)[-1])
    return emit(
        relax.op.concat([halves(m, emit, cut(emit, x, 0, d // 2), cos, sin), cut(emit, x, d // 2, d)], 3)
    )


ROTATIONS = {"halves": halves, "interleaved": interleaved, "partial": partial}


def model(rotate=halves, *, dtype="float32", table="", inside="", norm=None, edit=None):
    """Projection, q, k, v, rotation, attention.

    Args:
        table: dtype of cos and sin (default: dtype).
        inside: dtype in which heads are rotated (default: dtype).
        norm: attributes of a norm of each head of q and k.
        edit: edit(emit, name, heads) changes a rotated operand.
    """
    m = Model(dtype)
    x, w = m.param("embed", 50, WIDTH), m.param("qkv", sum(ROWS.values()), WIDTH)
    scale = m.param("scale", DIM)
    inside = inside or dtype

    def body(emit):
        t = m.tokens
        cos, sin = tables(m, emit, DIM // 2 if rotate is partial else DIM, table or dtype)
        coefficients = [cast(emit, for_heads(m, emit, c), inside) for c in (cos, sin)]
        rows = relax.ShapeExpr([1, t, WIDTH])
        y = linear(emit, emit(relax.op.reshape(emit(relax.op.take(x, m.ids, axis=0)), rows)), w)
        at, operands = 0, []
        for name, heads in HEADS_OF.items():
            part = emit(
                relax.op.reshape(cut(emit, y, at, at + ROWS[name]), relax.ShapeExpr([1, t, heads, DIM]))
            )
            at += ROWS[name]
            if norm is not None and name != "v":
                part = emit(ir.opaque_call(NORM, [part, scale], norm.to_json(), part.ty))
            part = emit(relax.op.permute_dims(part, [0, 2, 1, 3]))
            if name != "v":
                part = cast(emit, rotate(m, emit, cast(emit, part, inside), *coefficients), dtype)
                part = edit(emit, name, part) if edit else part
            operands.append(part)
        return emit(
            ir.opaque_call(ATTENTION, operands, ATTRS, ir.tensor_type([1, t, HEADS_OF["q"], DIM], dtype))
        )

    return m.build(body)


def found(lowered):
    """(operands, attributes) of q, k and v."""
    matches = [ir.match_opaque(b.value, HEADS) for b in bindings_of(lowered.module["main"])]
    return [(operands, HeadsAttrs.from_json(text)) for operands, text in filter(None, matches)]


def rotated(attrs, y, cos, sin):
    """Heads as `attrs` says: float64 [T, heads, dim] of y [T, width]."""
    flat = y.reshape(-1)
    out = np.full((len(y), attrs.heads, attrs.dim), np.nan)
    for t in range(len(y)):
        for n in range(attrs.heads):
            base = attrs.offset + t * attrs.token_stride + n * attrs.head_stride
            for r in attrs.runs:
                for i in range(r.count):
                    value = flat[base + r.a + i * r.a_step]
                    if r.pair:
                        c, s = ((cos, sin)[k][t] for k in (r.ca_of, r.cb_of))
                        value = value * c[r.ca + i * r.ca_step]
                        value += r.sign * flat[base + r.b + i * r.b_step] * s[r.cb + i * r.cb_step]
                    out[t, n, r.to + i * r.to_step] = value
    return out


def by_definition(kind, x, cos, sin):
    """The rotation in numpy: x [T, heads, dim]."""
    c, s = cos[:, None], sin[:, None]
    if kind == "partial":
        d = DIM // 2
        return np.concatenate([by_definition("halves", x[..., :d], cos, sin), x[..., d:]], -1)
    if kind == "halves":
        d = x.shape[-1] // 2
        return x * c + np.concatenate([-x[..., d:], x[..., :d]], -1) * s
    turned = np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * c + turned * s


DTYPES = [
    {},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"dtype": "bfloat16", "table": "bfloat16", "inside": "float32"},  # Cohere
    {"dtype": "bfloat16", "table": "float32", "inside": "float32"},  # GLM
]


@pytest.mark.parametrize("options", DTYPES, ids=lambda o: "-".join(o.values()) or "float32")
@pytest.mark.parametrize("kind", ROTATIONS)
def test_every_arrangement_in_every_dtype(kind, options):
    after = FuseRoPE()(model(ROTATIONS[kind], **options))
    heads = found(after)
    assert len(heads) == 3
    rng = np.random.default_rng(0)
    y = rng.standard_normal((3, sum(ROWS.values())))
    width = DIM // 2 if kind == "partial" else DIM
    # both halves of a table are equal; a kernel may read either
    cos, sin = (np.tile(rng.standard_normal((3, width // 2)), 2) for _ in range(2))
    at = 0
    for (operands, attrs), name in zip(heads, HEADS_OF, strict=True):
        # all three read the projection's result itself, and coefficients as they were computed
        assert operands[0] == heads[0][0][0] and int(operands[0].ty.shape[-1]) == sum(ROWS.values())
        assert [str(c.ty.dtype) for c in operands[1:]] == (
            [] if name == "v" else [options.get("table") or options.get("dtype", "float32")] * 2
        )
        x = y[:, at : at + ROWS[name]].reshape(3, HEADS_OF[name], DIM)
        expected = x if name == "v" else by_definition(kind, x, cos, sin)
        np.testing.assert_allclose(rotated(attrs, y, cos, sin), expected, atol=1e-12)
        at += ROWS[name]


def test_llama_before_and_expected():
    whole = sum(ROWS.values())
    half = DIM // 2
    low = Run(0, 1, half, 0, 1, True, 0, 0, 1, -1, half, 1, 1, 0, 1)
    high = Run(half, 1, half, half, 1, True, 0, half, 1, 1, 0, 1, 1, half, 1)
    runs = {"q": (low, high), "k": (low, high), "v": (Run(0, 1, DIM, 0, 1),)}
    m = Model("bfloat16")
    x, w = m.param("embed", 50, WIDTH), m.param("qkv", whole, WIDTH)
    m.param("scale", DIM)

    def expected(emit):
        t = m.tokens
        coefficients = tables(m, emit, DIM, "bfloat16")
        rows = relax.ShapeExpr([1, t, WIDTH])
        y = linear(emit, emit(relax.op.reshape(emit(relax.op.take(x, m.ids, axis=0)), rows)), w)
        at, operands = 0, []
        for name, heads in HEADS_OF.items():
            attrs = HeadsAttrs(heads, DIM, at, whole, DIM, False, runs[name])
            at += ROWS[name]
            out = ir.tensor_type([1, heads, t, DIM], "bfloat16")
            extra = [] if name == "v" else coefficients
            operands.append(emit(ir.opaque_call(HEADS, [y, *extra], attrs.to_json(), out)))
        out = ir.tensor_type([1, t, HEADS_OF["q"], DIM], "bfloat16")
        return emit(ir.opaque_call(ATTENTION, operands, ATTRS, out))

    assert_same(FuseRoPE()(model(dtype="bfloat16")), m.build(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_of_heads_goes_with_them(dtype):
    norm = NormAttrs(1e-6, has_weight=True, plus_one=True)
    heads = found(FuseRoPE()(model(dtype=dtype, norm=norm)))
    assert [attrs.norm for _, attrs in heads] == [norm, norm, None]
    assert [attrs.norm_width for _, attrs in heads] == [DIM, DIM, 0]
    assert [operands[1].name for operands, attrs in heads if attrs.norm] == ["scale", "scale"]


def _scaled(emit, name, x):
    return emit(relax.op.multiply(x, relax.const(0.5, str(x.ty.dtype)))) if name == "q" else x


def _by_another_head(emit, name, x):
    return emit(relax.op.flip(x, axis=1)) if name == "k" else x


@pytest.mark.parametrize(("edit", "name"), [(_scaled, "q"), (_by_another_head, "k")])
def test_what_is_no_rotation_is_computed_first_and_copied(edit, name):
    heads = dict(zip(HEADS_OF, found(FuseRoPE()(model(edit=edit))), strict=True))
    assert [n for n, (_, attrs) in heads.items() if attrs.rotates] == [n for n in "qk" if n != name]
    operands, attrs = heads[name]
    assert len(operands) == 1 and len(ir.dims(operands[0])) == 4 and len(attrs.runs) == 1


def test_coefficients_that_depend_on_tokens_are_none():
    def gated(m, emit, x, cos, sin):
        return halves(m, emit, x, emit(relax.op.multiply(cut(emit, x, 0, DIM), cos)), sin)

    assert not any(attrs.rotates for _, attrs in found(FuseRoPE()(model(gated))))


def test_learned_keys_stay():
    m = Model()
    table, keys = m.param("embed", 50, WIDTH), m.param("keys", 1, 4, 8, DIM)

    def body(emit):
        rows = relax.ShapeExpr([1, m.tokens, 4, DIM])
        q = emit(relax.op.reshape(emit(relax.op.take(table, m.ids, axis=0)), rows))
        q = emit(relax.op.permute_dims(q, [0, 2, 1, 3]))
        out = ir.tensor_type([1, m.tokens, 4, DIM], "float32")
        return emit(ir.opaque_call(ATTENTION, [q, keys, keys], ATTRS, out))

    before = m.build(body)
    assert FuseRoPE()(before) is before
