"""FuseLatentHeads: queries and keys of latent attention are read and rotated where the projections wrote them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmc import ir
from llmc.ops import ATTENTION, HEAD_LINEAR, HEADS, AttentionAttrs, HeadLinearAttrs, HeadsAttrs, Run
from llmc.passes.fuse_rope import heads_of, normalised, view_of
from llmc.passes.head_elements import Elements, position_only
from llmc.passes.rewrite import Builder, Graph, update_function
from llmc.passes.step_module import LoweredGraph


class FuseLatentHeads:
    """Do for latent attention what FuseRoPE does for other attention.

    before: a = llmc.head_linear(heads(y)[..., :n], wk);  q = concat(permute(a), rotate(heads(y)[..., n:]))
            k = concat(llmc.norm(z[..., :c]), rotate(z[..., c:]));   llmc.attention(q, k, k, {latent: c})
    after:  q = llmc.head_linear(y, wk, cos, sin, {where heads lie, rest});  k = llmc.heads(z, weight, cos, sin, {runs, norm})
            llmc.attention(q, k, k, {latent: c, token_major})

    The result of attention is multiplied where it lies already. MakeStepFunction makes one kernel of k that also writes the
    page, and SpecializeDecode takes that into the attention kernel. Runs after AbsorbLatent, FuseQKV and FuseNorm, as
    FuseRoPE does; an operand that is anything else stays.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        elements = Elements(graph, position_only(graph))
        build = Builder()
        made: dict[Any, Any] = {}
        changed = False
        for binding in graph.bindings:
            match = ir.match_opaque(binding.value, ATTENTION)
            attrs = AttentionAttrs.from_json(match[1]) if match else None
            if match is None or attrs is None or not attrs.latent or attrs.token_major:
                build.keep(binding)
                continue
            query, key, *others = match[0]
            call = _query(graph, elements, query)
            if call is not None:
                query = build.emit(call, "absorbed")
                attrs = replace(attrs, token_major=True)
            source = graph.source(key)
            if source not in made:  # layers that share a cache must see one variable
                heads = _key(graph, elements, source, attrs.latent)
                made[source] = key if heads is None else build.emit(heads, "latent")
            changed = changed or call is not None or made[source] is not key
            operands = [query, made[source], made[source], *others[1:]]
            build.bind(binding.var, ir.opaque_call(ATTENTION, operands, attrs.to_json(), binding.var.ty))
        if not changed:
            return lowered
        result = build.function(func.params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", result), lowered.params)


def _fields(graph: Graph, var: Any) -> list[Any]:
    """The operands of a concat of heads, or the variable alone."""
    value = graph.resolve(var)
    if ir.is_op(value, "relax.concat") and int(value.attrs.axis) % len(ir.dims(var)) == len(ir.dims(var)) - 1:
        return list(value.args[0].fields)
    return [var]


def _query(graph: Graph, elements: Elements, var: Any) -> Any:
    """The llmc.head_linear with token-major result, or None."""
    first, *rest = _fields(graph, var)
    turned = graph.resolve(first)
    if len(rest) > 1 or not ir.is_op(turned, "relax.permute_dims"):
        return None
    match = ir.match_opaque(graph.resolve(turned.args[0]), HEAD_LINEAR)
    if match is None or len(match[0]) != 2 or [int(a) for a in turned.attrs.axes or ()] != [0, 2, 1, 3]:
        return None
    (x, weight), text = match
    attrs = HeadLinearAttrs.from_json(text)
    view = view_of(graph, x, attrs.heads)
    if view is None or attrs.rest is not None or attrs.offset or not attrs.head_major:
        return None
    base, offset, token, head, head_major = view
    dtype, width, tensors = str(x.ty.dtype), int(ir.dims(first)[3]), ()
    if rest:
        found = heads_of(graph, elements, rest[0])
        if found is None or found.base != base or found.vectors:
            return None
        attrs, tensors = replace(attrs, rest=found.attrs), found.tensors
        width += found.attrs.dim
    if base in graph.func.params or str(base.ty.dtype) != dtype:
        return None
    attrs = replace(attrs, offset=offset, token_stride=token, head_stride=head, head_major=head_major)
    out = ir.tensor_type([1, ir.dims(x)[2], attrs.heads, width], dtype)
    return ir.opaque_call(HEAD_LINEAR, [base, weight, *tensors], attrs.to_json(), out)


def _key(graph: Graph, elements: Elements, var: Any, rank: int) -> Any:
    """The llmc.heads of a normalised latent and what is rotated behind it in the same tensor, or None."""
    first, *rest = _fields(graph, var)
    value = graph.resolve(first)
    while ir.is_op(value, "relax.reshape"):
        first = graph.source(value.args[0])
        value = graph.resolve(first)
    before = normalised(graph, first)
    if before is None or len(rest) > 1 or int(ir.dims(first)[-1]) != rank:
        return None
    x, vectors, norm = before
    view = view_of(graph, x, 1)
    if view is None:
        return None
    base, offset, token, head, head_major = view
    attrs = HeadsAttrs(1, rank, offset, token, head, head_major, (Run(0, 1, rank, 0, 1),), norm, rank)
    tensors: tuple[Any, ...] = ()
    if rest:
        found = heads_of(graph, elements, rest[0])
        if found is None or found.base != base or found.vectors or found.attrs.token_stride != token:
            return None
        shift = found.attrs.offset - offset
        if any(shift + first < rank for r in found.attrs.runs for first in (r.a, *([r.b] if r.pair else []))):
            return None  # before or inside of what is normalised
        runs = tuple(replace(r, to=r.to + rank, a=r.a + shift, b=r.b + shift) for r in found.attrs.runs)
        attrs = replace(attrs, dim=rank + found.attrs.dim, runs=(*attrs.runs, *runs))
        tensors = found.tensors
    return ir.opaque_call(HEADS, [base, *vectors, *tensors], attrs.to_json(), graph.source(var).ty)
