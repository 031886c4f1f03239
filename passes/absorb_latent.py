"""AbsorbLatent: attention whose keys and values are projections of one latent vector per token reads that vector instead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import relax

from llmc import ir
from llmc.ops import ATTENTION, HEAD_LINEAR, AttentionAttrs, HeadLinearAttrs
from llmc.passes.fold_weights import WeightExpression
from llmc.passes.fuse_qkv import projection
from llmc.passes.head_elements import Elements
from llmc.passes.rewrite import Builder, Graph, update_function
from llmc.passes.step_module import LoweredGraph, PackedParam


class AbsorbLatent:
    """Move the projections of keys and values from the tokens of the cache to queries and results.

    before: kv = reshape(matmul(c, w.T), [T, h, n + v]);  k = concat(kv[..., :n], broadcast(r));  v = kv[..., n:]
            o = llmc.attention(q, k, v)                                           h * (n + r + v) elements per token cached
    after:  a = llmc.head_linear(q[..., :n], wk)                                  wk [h, c, n], of w's rows
            l = llmc.attention(concat(a, q[..., n:]), concat(c, r), {latent: c})  c + r elements per token cached
            o = llmc.head_linear(l, wv)                                           wv [h, v, c]

    q . (wk c) = (wk.T q) . c, and what weights sum over wv c is wv times the sum over c (DeepSeek-AI 2024, "DeepSeek-V2",
    section 2.1.2). Keys and values may have weights of their own, parts may come in any order, and r may be missing. Scores and
    sums then run over c + r and c elements instead of n + r and v: a block is rewritten if its cache shrinks by more than this
    arithmetic grows. Runs first: QuantizeWeights looks for linear layers, and the fusions for heads of projections.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        elements = Elements(graph, set())
        weights = set(func.params[2:])
        params, infos = list(func.params), list(lowered.params)
        index_of = {var: i for i, var in enumerate(func.params[2:])}
        build = Builder()
        latents: dict[Any, Any] = {}
        made: dict[tuple[Any, str], Any] = {}
        changed = False
        for binding in graph.bindings:
            match = ir.match_opaque(binding.value, ATTENTION)
            found = _find(graph, elements, weights, match[0]) if match else None
            if match is None or found is None:
                build.keep(binding)
                continue
            changed = True
            attrs = AttentionAttrs.from_json(match[1])

            def weight_of(part: _HeadPart, name: str, turn: bool, found: _Latent = found) -> Any:
                if (part.weight, name) not in made:  # layers may share keys and values
                    info, function = infos[index_of[part.weight]], _rows_of_heads(part, found.heads, turn)
                    shape = tuple(int(d) for d in function.ret_ty.shape)
                    full, recipe = f"{info.name}.{name}", WeightExpression(function)
                    infos.append(PackedParam(full, info.source, info.dtype, shape, expression=recipe))
                    made[part.weight, name] = relax.Var(full.replace(".", "_"), function.ret_ty)
                    params.append(made[part.weight, name])
                return made[part.weight, name]

            self._rewrite(
                *(build, graph, latents, binding, match[0], attrs, found),
                weight_of(found.key, "of_queries", True),
                weight_of(found.value, "of_values", False),
            )
        if not changed:
            return lowered
        new = build.function(params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), tuple(infos))

    def _rewrite(
        self,
        build: Builder,
        graph: Graph,
        latents: dict[Any, Any],
        binding: Any,
        operands: list[Any],
        attrs: AttentionAttrs,
        found: _Latent,
        of_queries: Any,
        of_values: Any,
    ) -> None:
        q, tokens = operands[0], ir.dims(operands[0])[2]
        rank, dtype = found.rank, str(q.ty.dtype)
        parts = _parts_of_query(graph, build, q, found)
        key, *rest = parts
        first = HeadLinearAttrs(found.heads, 0, found.key.count, found.key.count, True)
        absorbed = _head_linear(build, key, of_queries, first, tokens)
        query = build.emit(relax.op.permute_dims(absorbed, [0, 2, 1, 3]), "absorbed")
        if rest:
            query = build.emit(relax.op.concat([query, *rest], axis=3), "absorbed")
        source = (found.c, *(s.var for s in found.shared))
        if source not in latents:  # layers that share a cache must see one variable
            latent = build.emit(relax.op.reshape(found.c, relax.ShapeExpr([1, 1, tokens, rank])), "latent")
            if rest:
                latent = build.emit(relax.op.concat([latent, *source[1:]], axis=3), "latent")
            latents[source] = latent
        latent = latents[source]
        out = ir.tensor_type([1, tokens, found.heads, rank], dtype)
        text = replace(attrs, latent=rank).to_json()
        result = build.emit(
            ir.opaque_call(ATTENTION, [query, latent, latent, *operands[3:]], text, out), "latent"
        )
        second = HeadLinearAttrs(found.heads, 0, found.heads * rank, rank, False)
        build.bind(binding.var, _head_linear_call(result, of_values, second, tokens))


def _head_linear(build: Builder, x: Any, weight: Any, attrs: HeadLinearAttrs, tokens: Any) -> Any:
    return build.emit(_head_linear_call(x, weight, attrs, tokens), "per_head")


def _head_linear_call(x: Any, weight: Any, attrs: HeadLinearAttrs, tokens: Any) -> Any:
    out = ir.tensor_type([1, tokens, attrs.heads, int(ir.dims(weight)[1])], str(x.ty.dtype))
    return ir.opaque_call(HEAD_LINEAR, [x, weight], attrs.to_json(), out)


@dataclass(frozen=True)
class _Segment:
    """Neighbouring elements of a head: columns [begin, begin + count) of `var`'s last axis."""

    var: Any
    begin: int
    count: int


@dataclass(frozen=True)
class _HeadPart:
    """A part of each head that is a product of c: of each `width` rows of `weight` [h * width, rank], `count` from `begin`."""

    c: Any
    weight: Any
    width: int
    begin: int
    count: int


@dataclass(frozen=True)
class _Shared:
    """A part that all heads have in common: `var` [1, 1, T, count], elements [at, at + count) of a key."""

    var: Any
    at: int
    count: int


@dataclass(frozen=True)
class _Latent:
    """Keys and values as projections of one vector c per token.

    Attributes:
        at: where the projected part of a key begins.
    """

    heads: int
    c: Any
    rank: int
    key: _HeadPart
    at: int
    shared: tuple[_Shared, ...]
    value: _HeadPart

    @property
    def pays(self) -> bool:
        """Whether a token's cache shrinks by more than the arithmetic per query and cached token grows."""
        common = sum(s.count for s in self.shared)
        before = self.heads * (self.key.count + common + self.value.count)
        return before * before > (self.rank + common) * self.heads * (2 * self.rank + common)


def _find(graph: Graph, elements: Elements, weights: set[Any], operands: list[Any]) -> _Latent | None:
    q, k, v = operands[:3]
    dims = ir.dims(k)
    if len(dims) != 4 or not ir.is_constant(dims[1]) or int(dims[1]) < 2 or not ir.is_one(dims[0]):
        return None
    heads = int(dims[1])
    if int(ir.dims(q)[1]) != heads or int(ir.dims(v)[1]) != heads:
        return None
    keys, values = _segments(elements, k), _segments(elements, v)
    if keys is None or values is None or len(values) != 1:
        return None
    value = _head_part(graph, values[0], heads, weights)
    key: _HeadPart | None = None
    shared: list[_Shared] = []
    at = position = 0
    for segment in keys:
        common = _common(graph, segment)
        if common is not None:
            shared.append(_Shared(common, position, segment.count))
        elif key is None and (key := _head_part(graph, segment, heads, weights)) is not None:
            at = position
        else:
            return None
        position += segment.count
    if key is None or value is None or key.c != value.c:
        return None
    found = _Latent(heads, key.c, int(ir.dims(key.c)[-1]), key, at, tuple(shared), value)
    return found if found.pays else None


def _segments(elements: Elements, var: Any) -> list[_Segment] | None:
    """The tensors that a head's elements are copies of, in order; None if one is computed."""
    found: list[_Segment] = []
    for terms in elements.of(var, 1):
        if len(terms) != 1 or terms[0][0] != 1 or terms[0][3] is not None:
            return None
        _, source, index, _, _ = terms[0]
        last = found[-1] if found else None
        if last is not None and last.var == source and last.begin + last.count == index:
            found[-1] = replace(last, count=last.count + 1)
        else:
            found.append(_Segment(source, index, 1))
    return found


def _common(graph: Graph, segment: _Segment) -> Any:
    """[1, 1, T, count] that is repeated for every head, or None."""
    value = graph.resolve(segment.var)
    if not ir.is_op(value, "relax.broadcast_to"):
        return None
    source = value.args[0]
    inside, outside = ir.dims(source), ir.dims(segment.var)
    whole = segment.begin == 0 and segment.count == int(outside[3])
    same = len(inside) == 4 and ir.is_one(inside[1]) and ir.is_constant(inside[3])
    if not same or not whole or int(inside[3]) != segment.count or not inside[2].same_as(outside[2]):
        return None
    return source


def _head_part(graph: Graph, segment: _Segment, heads: int, weights: set[Any]) -> _HeadPart | None:
    """The projection whose outputs are cut into heads, [1, T, heads, width]."""
    value = graph.resolve(segment.var)
    dims = ir.dims(segment.var)
    if not ir.is_op(value, "relax.reshape") or len(dims) != 4 or not ir.is_constant(dims[2]):
        return None
    if int(dims[2]) != heads or ir.is_constant(dims[1]) or not ir.is_constant(dims[3]):
        return None
    found = projection(graph, graph.source(value.args[0]), weights)
    width = int(dims[3])
    if found is None or found.bias is not None or int(ir.dims(found.weight)[0]) != heads * width:
        return None
    return _HeadPart(_unviewed(graph, found.x), found.weight, width, segment.begin, segment.count)


def _unviewed(graph: Graph, var: Any) -> Any:
    """Behind reshapes that keep the last axis of a tensor of tokens."""
    var = graph.source(var)
    value = graph.definition(var)
    while ir.is_op(value, "relax.reshape") and ir.is_rows(value.args[0]) and ir.is_rows(var):
        if int(ir.dims(value.args[0])[-1]) != int(ir.dims(var)[-1]):
            break
        var = graph.source(value.args[0])
        value = graph.definition(var)
    return var


def _parts_of_query(graph: Graph, build: Builder, q: Any, found: _Latent) -> list[Any]:
    """The queries' part for the projected part of keys, then those for the common ones."""
    wanted = [(found.at, found.key.count), *((s.at, s.count) for s in found.shared)]
    value = graph.resolve(q)
    fields: dict[tuple[int, int], Any] = {}
    if ir.is_op(value, "relax.concat") and int(value.attrs.axis) % 4 == 3:
        at = 0
        for field in value.args[0].fields:
            count = int(ir.dims(field)[3])
            fields[at, count] = field
            at += count
    parts = []
    for at, count in wanted:
        whole = at == 0 and count == int(ir.dims(q)[3])
        part = q if whole else fields.get((at, count))
        if part is None:
            part = build.emit(relax.op.strided_slice(q, axes=[3], begin=[at], end=[at + count]), "part")
        parts.append(part)
    return parts


def _rows_of_heads(part: _HeadPart, heads: int, turn: bool) -> Any:
    """The function of `weight` that gives [h, count, rank], or [h, rank, count] with `turn`."""
    weight = relax.Var("weight", part.weight.ty)
    rank = int(ir.dims(weight)[1])
    build = Builder()
    rows = build.emit(relax.op.reshape(weight, relax.ShapeExpr([heads, part.width, rank])))
    if part.count != part.width:
        rows = build.emit(
            relax.op.strided_slice(rows, axes=[1], begin=[part.begin], end=[part.begin + part.count])
        )
    if turn:
        rows = build.emit(relax.op.permute_dims(rows, [0, 2, 1]))
    return build.function([weight], rows)
