"""Small graphs for the pass tests, in the form that the frontend delivers."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax, tirx

from llmc import ir
from llmc.ops import ATTENTION, AttentionAttrs
from llmc.passes.rewrite import Builder, bindings_of
from llmc.passes.step_module import LoweredGraph, PackedParam


class Model:
    """Builds ``main(input_ids, positions, *params)`` op by op.

    Args:
        dtype: of weights and activations.
    """

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype
        self.tokens = tirx.Var("T", "int64")
        self.bb = relax.BlockBuilder()
        self.ids = relax.Var("input_ids", ir.tensor_type([self.tokens], "int32"))
        self.positions = relax.Var("positions", ir.tensor_type([self.tokens], "int32"))
        self.params: list[relax.Var] = []
        self._steps: list[object] = []

    def param(self, name: str, *shape: int, dtype: str | None = None) -> relax.Var:
        var = relax.Var(name, ir.tensor_type(list(shape), dtype or self.dtype))
        self.params.append(var)
        return var

    def build(self, body) -> LoweredGraph:
        """`body(emit)` emits the ops and returns the result."""
        with self.bb.function("main", [self.ids, self.positions, *self.params]):
            with self.bb.dataflow():
                out = self.bb.emit_output(body(self.bb.emit))
            self.bb.emit_func_output(out)
        infos = tuple(
            PackedParam(p.name, p.name, str(p.ty.dtype), tuple(int(d) for d in p.ty.shape))
            for p in self.params
        )
        return LoweredGraph(self.bb.get(), infos)


def assert_same(after: LoweredGraph, expected: LoweredGraph) -> None:
    """Structurally equal functions; `expected` is first written the way in which a pass writes its result."""
    func = expected.module["main"]
    build = Builder()
    for binding in bindings_of(func):
        build.keep(binding)
    again = build.function(func.params, func.body.body, func.attrs, symbol="main")
    tvm.ir.assert_structural_equal(after.module["main"], again)


def linear(emit, x, w):
    return emit(relax.op.matmul(x, emit(relax.op.permute_dims(w))))


def attention_model(
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    vocab: int = 50,
    dtype: str = "float32",
    attrs=lambda layer: AttentionAttrs(layer=layer, scale=0.25),
    share: dict[int, int] | None = None,
) -> LoweredGraph:
    """Embedding, `layers` x (attention with residual), tied head. No norms: the tests compute it in numpy."""
    width = heads * dim
    m = Model(dtype)
    table = m.param("embed", vocab, width)
    weights = [
        {
            n: m.param(f"l{i}.{n}", rows, width)
            for n, rows in (("q", width), ("k", kv_heads * dim), ("v", kv_heads * dim), ("o", width))
        }
        for i in range(layers)
    ]
    share = share or {}

    def body(emit):
        t = m.tokens
        x = emit(relax.op.take(table, m.ids, axis=0))
        x = emit(relax.op.reshape(x, relax.ShapeExpr([1, t, width])))
        kv = {}
        for i, w in enumerate(weights):

            def split(y, n):
                y = emit(relax.op.reshape(y, relax.ShapeExpr([1, t, n, dim])))
                return emit(relax.op.permute_dims(y, [0, 2, 1, 3]))

            q = split(linear(emit, x, w["q"]), heads)
            if i in share:
                kv[i] = kv[share[i]]
            else:
                kv[i] = split(linear(emit, x, w["k"]), kv_heads), split(linear(emit, x, w["v"]), kv_heads)
            out = ir.tensor_type([1, t, heads, dim], dtype)
            a = emit(ir.opaque_call(ATTENTION, [q, *kv[i]], attrs(i).to_json(), out))
            a = emit(relax.op.reshape(a, relax.ShapeExpr([1, t, width])))
            x = emit(relax.op.add(x, linear(emit, a, w["o"])))
        logits = linear(emit, x, table)
        return emit(relax.op.reshape(logits, relax.ShapeExpr([t, vocab])))

    return m.build(body)


def reference(
    weights: dict[str, np.ndarray],
    ids: np.ndarray,
    *,
    layers=2,
    heads=4,
    kv_heads=2,
    dim=16,
    attrs=lambda layer: AttentionAttrs(layer=layer, scale=0.25),
    share=None,
) -> np.ndarray:
    """attention_model in numpy float64 for one whole sequence: logits [n, V]."""
    share = share or {}
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    n = len(ids)
    x = w["embed"][ids]
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    kv = {}
    for layer in range(layers):
        a = attrs(layer)
        q = (x @ w[f"l{layer}.q"].T).reshape(n, heads, dim)
        if layer in share:
            kv[layer] = kv[share[layer]]
        else:
            kv[layer] = tuple((x @ w[f"l{layer}.{c}"].T).reshape(n, kv_heads, dim) for c in "kv")
        k, v = (np.repeat(c, heads // kv_heads, axis=1) for c in kv[layer])
        s = np.einsum("ihd,jhd->hij", q, k) * a.scale
        allowed = (j <= i) & ((i - j < a.window) if a.window else True)
        if a.chunk:
            allowed = allowed & (i // a.chunk == j // a.chunk)
        s = np.where(allowed, s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", p, v).reshape(n, -1) @ w[f"l{layer}.o"].T
    return x @ w["embed"].T
