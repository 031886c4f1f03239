"""RaiseAttention: what becomes llmc.attention, with which attributes, and what is left alone or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from llmc import ir
from llmc.errors import LlmcError
from llmc.ops import ATTENTION, AttentionAttrs
from llmc.passes.raise_attention import (
    MASK,
    MASKED_ATTENTION,
    MaskAttrs,
    MaskedAttentionAttrs,
    RaiseAttention,
)
from llmc.passes.relax_eval import match_any_opaque
from llmc.passes.rewrite import bindings_of

R = relax.op
HEADS, DIM = 4, 8
Emit = Callable[[Any], Any]


class Block:
    """Builds ``main(positions, q, k, v)`` with q [1, h, T, d], k and v [1, hk, T, d]."""

    def __init__(self, kv_heads: int = HEADS, dtype: str = "float32") -> None:
        self.length = tirx.Var("T", "int64")
        self.positions = relax.Var("positions", ir.tensor_type([self.length], "int32"))
        self.q = relax.Var("q", ir.tensor_type([1, HEADS, self.length, DIM], dtype))
        self.k, self.v = (
            relax.Var(n, ir.tensor_type([1, kv_heads, self.length, DIM], dtype)) for n in ("k", "v")
        )

    def build(self, body: Callable[[Emit], Any]) -> Any:
        bb = relax.BlockBuilder()
        with bb.function("main", [self.positions, self.q, self.k, self.v]):
            with bb.dataflow():
                out = bb.emit_output(body(bb.emit))
            bb.emit_func_output(out)
        return bb.get()

    def square(self) -> list[Any]:
        return [1, 1, self.length, self.length]

    def mask(self, emit: Emit, attrs: MaskAttrs) -> Any:
        return emit(ir.opaque_call(MASK, [], attrs.to_json(), ir.tensor_type(self.square(), "float32")))

    def relative(self, emit: Emit) -> tuple[Any, Any]:
        """i [T, 1] and j [1, T]"""
        at = emit(R.arange(0, self.length, 1, "int64"))
        return emit(R.reshape(at, [self.length, 1])), emit(R.reshape(at, [1, self.length]))

    def spelled(self, emit: Emit, change: Callable[[Any], Any], factor: float = 0.25) -> Any:
        """softmax(change(q k^T * factor)) v"""
        kt = emit(R.permute_dims(self.k, [0, 1, 3, 2]))
        scores = emit(R.multiply(emit(R.matmul(self.q, kt)), relax.const(factor, "float32")))
        return emit(R.matmul(emit(R.nn.softmax(change(scores), -1)), self.v))

    def expected(self, attrs: AttentionAttrs, extra: tuple[Any, ...] = ()) -> Any:
        """[1, T, h, d] brought back to the matmul's [1, h, T, d]"""

        def body(emit: Emit) -> Any:
            out = ir.tensor_type([1, self.length, HEADS, DIM], "float32")
            y = emit(ir.opaque_call(ATTENTION, [self.q, self.k, self.v, *extra], attrs.to_json(), out))
            y = emit(R.permute_dims(y, [0, 2, 1, 3]))
            return emit(R.reshape(y, [1, HEADS, self.length, DIM]))

        return self.build(body)


def raise_(module: Any, block: Block) -> Any:
    module = RaiseAttention(lambda var: "here", block.positions)(module)
    relax.analysis.well_formed(module)  # raises
    return relax.transform.DeadCodeElimination(["main"])(module)


def clean(module: Any) -> Any:
    return relax.transform.CanonicalizeBindings()(relax.transform.DeadCodeElimination(["main"])(module))


def attributes(module: Any) -> AttentionAttrs:
    calls = [match_any_opaque(b.value) for b in bindings_of(module["main"])]
    return next(AttentionAttrs.from_json(c[2]) for c in calls if c is not None and c[0] == ATTENTION)


@pytest.mark.parametrize(
    ("mask", "window", "chunk"),
    [
        (MaskAttrs(True), 0, 0),
        (MaskAttrs(True, window=100_000), 100_000, 0),
        (MaskAttrs(True, chunk=8192), 0, 8192),
    ],
)
def test_masked_attention(mask: MaskAttrs, window: int, chunk: int) -> None:
    """The mask is looked through slices, casts and broadcasts, and windows need not fit any evaluated length."""
    block = Block()
    out = ir.tensor_type([1, block.length, HEADS, DIM], "float32")

    def before(emit: Emit) -> Any:
        m = emit(R.astype(block.mask(emit, mask), "float16"))
        m = emit(R.broadcast_to(m, [1, HEADS, block.length, block.length]))
        attrs = MaskedAttentionAttrs(scale=0.5, has_mask=True, path="a.b")
        return emit(ir.opaque_call(MASKED_ATTENTION, [block.q, block.k, block.v, m], attrs.to_json(), out))

    def after(emit: Emit) -> Any:
        attrs = AttentionAttrs(layer=0, scale=0.5, window=window, chunk=chunk, path="a.b")
        return emit(ir.opaque_call(ATTENTION, [block.q, block.k, block.v], attrs.to_json(), out))

    tvm.ir.assert_structural_equal(clean(raise_(block.build(before), block)), clean(block.build(after)))


def test_spelled_out_with_a_mask_operator() -> None:
    block = Block()

    def before(emit: Emit) -> Any:
        mask = block.mask(emit, MaskAttrs(True, window=7))
        return block.spelled(emit, lambda s: emit(R.add(s, mask)))

    after = block.expected(AttentionAttrs(layer=0, scale=0.25, window=7, path="here"))
    tvm.ir.assert_structural_equal(clean(raise_(block.build(before), block)), clean(after))


def test_window_from_positions() -> None:
    """where(j <= i and j > i - 40, scores, -inf): the window is found although the shortest look is shorter."""
    block = Block()

    def before(emit: Emit) -> Any:
        i, j = block.relative(emit)
        near = emit(R.greater(j, emit(R.subtract(i, relax.const(40, "int64")))))
        allowed = emit(R.logical_and(emit(R.less_equal(j, i)), near))
        return block.spelled(emit, lambda s: emit(R.where(allowed, s, relax.const(float("-inf"), "float32"))))

    assert attributes(raise_(block.build(before), block)).window == 40


def test_alibi_softcap_and_triangle_buffer() -> None:
    """scores = 30 tanh(s / 30) + slope (j - i); then w * tril - 1e4 (1 - tril)."""
    block = Block()
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], "float32")

    def before(emit: Emit) -> Any:
        at = emit(R.arange(0, block.length, 1, "int64"))
        triangle = emit(R.take(relax.const(np.tril(np.ones((64, 64), "float32"))), at, axis=0))
        triangle = emit(R.take(triangle, at, axis=1))
        j = emit(R.astype(emit(R.reshape(at, [1, 1, 1, block.length])), "float32"))
        bias = emit(R.multiply(j, relax.const(slopes.reshape(1, 4, 1, 1))))

        def change(s: Any) -> Any:
            s = emit(R.tanh(emit(R.divide(s, relax.const(30.0, "float32")))))
            s = emit(R.multiply(s, relax.const(30.0, "float32")))
            s = emit(R.add(s, bias))
            hole = emit(
                R.multiply(
                    relax.const(-1e4, "float32"), emit(R.subtract(relax.const(1.0, "float32"), triangle))
                )
            )
            return emit(R.add(emit(R.multiply(s, triangle)), hole))

        return block.spelled(emit, change)

    got = raise_(block.build(before), block)
    attrs = attributes(got)
    assert (attrs.softcap, attrs.has_alibi, attrs.window) == (30.0, True, 0)
    assert attrs.scale == pytest.approx(0.25)
    call = next(m for b in bindings_of(got["main"]) if (m := match_any_opaque(b.value)) is not None)
    np.testing.assert_allclose(call[1][3].value.numpy(), slopes, rtol=1e-6)


def test_repeated_key_heads_are_seen_through() -> None:
    block = Block(kv_heads=2)

    def before(emit: Emit) -> Any:
        def widen(x: Any) -> Any:
            x = emit(R.reshape(x, [1, 2, 1, block.length, DIM]))
            x = emit(R.broadcast_to(x, [1, 2, 2, block.length, DIM]))
            return emit(R.reshape(x, [1, HEADS, block.length, DIM]))

        mask = block.mask(emit, MaskAttrs(True))
        kt = emit(R.permute_dims(widen(block.k), [0, 1, 3, 2]))
        scores = emit(R.add(emit(R.matmul(block.q, kt)), mask))
        return emit(R.matmul(emit(R.nn.softmax(scores, -1)), widen(block.v)))

    after = block.expected(AttentionAttrs(layer=0, scale=1.0, path="here"))
    tvm.ir.assert_structural_equal(clean(raise_(block.build(before), block)), clean(after))


def test_near_misses_are_left_alone() -> None:
    """Probabilities that something else reads, and a bias that depends on the data, are no attention."""
    block = Block()

    def read_twice(emit: Emit) -> Any:
        mask = block.mask(emit, MaskAttrs(True))
        kt = emit(R.permute_dims(block.k, [0, 1, 3, 2]))
        p = emit(R.nn.softmax(emit(R.add(emit(R.matmul(block.q, kt)), mask)), -1))
        return emit(R.matmul(emit(R.multiply(p, p)), block.v))

    def learned_bias(emit: Emit) -> Any:
        mask = block.mask(emit, MaskAttrs(True))
        bias = emit(R.reshape(emit(R.sum(block.k, [3])), [1, HEADS, 1, block.length]))
        return block.spelled(emit, lambda s: emit(R.add(emit(R.add(s, mask)), bias)))

    for body in (read_twice, learned_bias):
        module = block.build(body)
        tvm.ir.assert_structural_equal(RaiseAttention(str, block.positions)(module), module)


def _bidirectional(block: Block, emit: Emit, s: Any) -> Any:
    return emit(R.add(s, block.mask(emit, MaskAttrs(False))))


def _shifted(block: Block, emit: Emit, s: Any) -> Any:
    """strictly earlier tokens only"""
    i, j = block.relative(emit)
    return emit(R.where(emit(R.less(j, i)), s, relax.const(float("-inf"), "float32")))


def _squared_distance(block: Block, emit: Emit, s: Any) -> Any:
    i, j = block.relative(emit)
    d = emit(R.astype(emit(R.subtract(j, i)), "float32"))
    s = emit(R.add(s, emit(R.multiply(d, d))))
    return emit(R.add(s, block.mask(emit, MaskAttrs(True))))


def _soft(block: Block, emit: Emit, s: Any) -> Any:
    """the mask only lowers the scores a little"""
    mask = block.mask(emit, MaskAttrs(True))
    return emit(R.add(s, emit(R.maximum(mask, relax.const(-5.0, "float32")))))


def _transposed(block: Block, emit: Emit, s: Any) -> Any:
    mask = emit(R.permute_dims(block.mask(emit, MaskAttrs(True)), [0, 1, 3, 2]))
    return emit(R.add(s, mask))


def _zeroed(block: Block, emit: Emit, s: Any) -> Any:
    """scores outside of the triangle become 0 instead of being masked"""
    i, j = block.relative(emit)
    return emit(R.where(emit(R.less_equal(j, i)), s, relax.const(0.0, "float32")))


@pytest.mark.parametrize("change", [_bidirectional, _shifted, _squared_distance, _soft, _transposed, _zeroed])
def test_masks_that_mean_something_else_are_refused(change: Callable[..., Any]) -> None:
    block = Block()
    module = block.build(lambda emit: block.spelled(emit, lambda s: change(block, emit, s)))
    with pytest.raises(LlmcError, match="attention in here") as refused:
        RaiseAttention(lambda var: "here", block.positions)(module)
    assert refused.value.ref == "mask-not-understood"


def test_declared_window_has_to_agree() -> None:
    block = Block()
    out = ir.tensor_type([1, block.length, HEADS, DIM], "float32")

    def body(emit: Emit) -> Any:
        attrs = MaskedAttentionAttrs(scale=0.5, has_mask=True, window=16, path="a.b")
        operands = [block.q, block.k, block.v, block.mask(emit, MaskAttrs(True))]
        return emit(ir.opaque_call(MASKED_ATTENTION, operands, attrs.to_json(), out))

    with pytest.raises(LlmcError, match="window none while it is called with window 16"):
        raise_(block.build(body), block)
