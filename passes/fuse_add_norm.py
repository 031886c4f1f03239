"""FuseAddNorm: a residual addition and the norm of its sum become one op with two results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import relax

from llmc import ir
from llmc.ops import NORM, NormAttrs
from llmc.passes.fuse_linear_epilogue import alike
from llmc.passes.rewrite import Builder, Graph, update_function
from llmc.passes.step_module import LoweredGraph


class FuseAddNorm:
    """Add and normalise in one pass over the row (RMSNorm and LayerNorm).

    before: s = a + b;  ...  y = llmc.norm(s, w)          n = llmc.norm(b, v);  s = a + n;  y = llmc.norm(s, w)
    after:  s, y = llmc.norm(a, b, w, {adds})             s, y = llmc.norm(a, b, v, w, {adds, before})

    For additions that no matmul took into its epilogue: behind experts, post-norms (Gemma 2; without a norm behind the
    sum: OLMo 2) and in parallel blocks. A norm that goes into the addition is not rounded before it. Runs after FuseNorm,
    which makes the ops, and after FuseLinearEpilogue, which is cheaper where it applies.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        weights = set(func.params[2:])
        norm_of: dict[Any, Any] = {}  # sum -> binding of its norm
        before: dict[Any, _Before] = {}  # sum -> its addend, a norm
        for binding in graph.bindings:
            norm = _norm(graph, binding.value, weights)
            if norm is not None:
                total = graph.source(norm.operands[0])
                added = graph.definition(total)
                if ir.is_op(added, "relax.add") and total not in norm_of and _is_sum(added, total):
                    norm_of[total] = binding
            elif ir.is_op(binding.value, "relax.add") and _is_sum(binding.value, binding.var):
                found = _normalised_side(graph, binding.value, weights)
                if found is not None:
                    before[binding.var] = found
        moved = {binding.var for binding in norm_of.values()}
        before = {total: found for total, found in before.items() if found.var not in moved}
        if not norm_of and not before:
            return lowered
        build = Builder()
        for binding in graph.bindings:
            if binding.var in moved:
                continue
            if binding.var in norm_of or binding.var in before:
                self._emit(graph, build, binding, norm_of.get(binding.var), before.get(binding.var), weights)
            else:
                build.keep(binding)
        new = build.function(func.params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), lowered.params)

    def _emit(
        self, graph: Graph, build: Builder, total: Any, norm: Any, before: _Before | None, weights: set[Any]
    ) -> None:
        """The sum `total` with the norm behind it and that of its addend."""
        found = _norm(graph, norm.value, weights) if norm is not None else None
        args, vectors = list(total.value.args), found.operands[1:] if found else []
        attrs = replace(found.attrs if found else NormAttrs(0.0, only_sum=True), adds=True)
        if before is not None and _same_dtype([*before.norm.operands[1:], *vectors]):
            args = [before.other, before.norm.operands[0]]
            vectors = [*before.norm.operands[1:], *vectors]
            attrs = replace(attrs, before=before.norm.attrs)
        if norm is None:
            op = total.value if attrs.before is None else None
            call = op or ir.opaque_call(NORM, [*args, *vectors], attrs.to_json(), total.var.ty)
            build.bind(total.var, call)
            return
        both = relax.TupleType([total.var.ty, norm.var.ty])
        pair = build.emit(ir.opaque_call(NORM, [*args, *vectors], attrs.to_json(), both), "add_norm")
        build.bind(total.var, relax.TupleGetItem(pair, 0))
        build.bind(norm.var, relax.TupleGetItem(pair, 1))


@dataclass(frozen=True)
class _Norm:
    """A norm of one tensor."""

    operands: list[Any]
    attrs: NormAttrs


@dataclass(frozen=True)
class _Before:
    """A sum of `other` and of a norm, bound to `var`, that nothing else reads."""

    var: Any
    other: Any
    norm: _Norm


def _norm(graph: Graph, value: Any, weights: set[Any]) -> _Norm | None:
    match = ir.match_opaque(value, NORM)
    if match is None:
        return None
    fixed = all(graph.source(v) in weights or ir.is_tensor_constant(v) for v in match[0][1:])
    attrs = NormAttrs.from_json(match[1])
    return _Norm(match[0], attrs) if fixed and not attrs.adds else None


def _normalised_side(graph: Graph, add: Any, weights: set[Any]) -> _Before | None:
    for side, other in ((add.args[1], add.args[0]), (add.args[0], add.args[1])):
        var = graph.source(side)
        norm = _norm(graph, graph.definition(var), weights)
        if norm is not None and graph.uses.get(var, 0) == 1:
            return _Before(var, other, norm)
    return None


def _same_dtype(vectors: list[Any]) -> bool:
    return len({str(v.ty.dtype) for v in vectors}) <= 1


def _is_sum(add: Any, result: Any) -> bool:
    """Of two tensors of the result's shape and dtype."""
    return alike(add.args[0], add.args[1], result)
