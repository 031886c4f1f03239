"""FuseGateUp: the two halves of a gated feed-forward layer become one matmul with the gate in its kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax

from llmc import ir
from llmc.ops import ACTIVATIONS, LINEAR, LinearAttrs
from llmc.passes.fuse_qkv import Projection, concatenated, projection
from llmc.passes.rewrite import Builder, Graph, update_function
from llmc.passes.step_module import LoweredGraph

_NAME_OF = {op: name for name, op in ACTIVATIONS.items()}


@dataclass(frozen=True)
class _Match:
    """act(gate) * up: two projections, or one that holds both.

    Attributes:
        parts: gate and up, or the one projection of both.
        activation: name of act.
        gate_second: in the one projection's rows, up comes first.
        inside: variables between, which nothing else reads.
    """

    parts: tuple[Projection, ...]
    activation: str
    gate_second: bool
    inside: tuple[Any, ...]


class FuseGateUp:
    """Compute act(gate(x)) * up(x) in one kernel.

    before: g = matmul(x, wg.T);  u = matmul(x, wu.T);  y = act(g) * u
    after:  y = llmc.linear(x, wgu, {activation, gated})

    Also for one weight that holds both (``chunk`` of its result), and with biases. The rows of gate and up are packed in turns
    by half a block, so that one task of the kernel has both in registers. Runs before LowerLinear, which lowers the op.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        index_of = {var: i for i, var in enumerate(func.params[2:])}
        weights = set(index_of)
        matches = {}
        for binding in graph.bindings:
            if ir.is_op(binding.value, "relax.multiply"):
                found = _match(graph, binding, weights)
                if found and len({lowered.params[index_of[p.weight]].scheme for p in found.parts}) == 1:
                    matches[binding.var] = found
        if not matches:
            return lowered
        dropped = {v for m in matches.values() for v in m.inside}
        params, infos = list(func.params), list(lowered.params)
        build = Builder()
        for binding in graph.bindings:
            match = matches.get(binding.var)
            if match is None:
                if binding.var not in dropped:
                    build.keep(binding)
                continue
            parts = match.parts
            args = [parts[0].x, _whole([p.weight for p in parts], params, infos, index_of)]
            if parts[0].bias is not None:
                args.append(_whole([p.bias for p in parts], params, infos, index_of))
            attrs = LinearAttrs(match.activation, True, match.gate_second, parts[0].bias is not None)
            build.bind(binding.var, ir.opaque_call(LINEAR, args, attrs.to_json(), binding.var.ty))
        new = build.function(params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), tuple(infos))


def _whole(vars_: list[Any], params: list[Any], infos: list[Any], index_of: dict[Any, int]) -> Any:
    """The one parameter, or a new one of the rows of both."""
    if len(vars_) == 1:
        return vars_[0]
    return concatenated([infos[index_of[v]] for v in vars_], params, infos)


def _match(graph: Graph, binding: Any, weights: set[Any]) -> _Match | None:
    a, b = (graph.source(arg) for arg in binding.value.args)
    for active, up in ((a, b), (b, a)):
        if not isinstance(active, relax.Var) or not isinstance(up, relax.Var):
            return None
        activation, gate = activation_of(graph, graph.definition(active))
        if activation is None or graph.uses.get(active, 0) != 1:
            continue
        if graph.uses.get(gate, 0) != 1 or graph.uses.get(up, 0) != 1:
            continue
        found = _two(graph, gate, up, weights) or _halves(graph, gate, up, weights)
        if found:
            parts, second, inside = found
            return _Match(parts, activation, second, (*inside, active))
    return None


def activation_of(graph: Graph, value: Any) -> tuple[str | None, Any]:
    """(name, operand) of an activation; relu(x) * relu(x) is relu2."""
    name = _NAME_OF.get(ir.op_name(value))
    if name is not None:
        return name, graph.source(value.args[0])
    inner, reads = _squared(graph, value)
    positive = graph.definition(inner)
    if ir.is_op(positive, "relax.nn.relu") and graph.uses.get(inner, 0) == reads:
        return "relu2", graph.source(positive.args[0])
    return None, None


def _squared(graph: Graph, value: Any) -> tuple[Any, int]:
    """(x, how often it is read) if `value` is x squared."""
    if ir.is_op(value, "relax.square"):
        return graph.source(value.args[0]), 1
    if ir.is_op(value, "relax.multiply") and graph.source(value.args[0]) == graph.source(value.args[1]):
        return graph.source(value.args[0]), 2
    return None, 0


def _two(graph: Graph, gate: Any, up: Any, weights: set[Any]) -> tuple[Any, bool, tuple[Any, ...]] | None:
    """Gate and up as results of two projections of one input."""
    g, u = projection_to(graph, gate, weights), projection_to(graph, up, weights)
    if g is None or u is None:
        return None
    same = graph.source(g.x) == graph.source(u.x) and (g.bias is None) == (u.bias is None)
    if not same or [int(d) for d in g.weight.ty.shape] != [int(d) for d in u.weight.ty.shape]:
        return None
    return (g, u), False, (g.first, g.result, u.first, u.result)


def _halves(graph: Graph, gate: Any, up: Any, weights: set[Any]) -> tuple[Any, bool, tuple[Any, ...]] | None:
    """Gate and up as the halves of one projection's result."""
    first, second = _half(graph, gate), _half(graph, up)
    if first is None or second is None or first[0] != second[0] or {first[1], second[1]} != {0, 1}:
        return None
    whole = first[0]
    both = projection_to(graph, whole, weights)
    if both is None:
        return None
    readers = {binding.var for binding in graph.users(whole)}
    if not readers <= {gate, up, *first[2], *second[2]}:
        return None
    inside = {gate, up, both.first, both.result, *first[2], *second[2]}
    return (both,), first[1] == 1, tuple(inside)


def _half(graph: Graph, var: Any) -> tuple[Any, int, tuple[Any, ...]] | None:
    """(variable, 0 or 1, variables between) if `var` is the first or second half of it along the last axis."""
    value = graph.definition(var)
    if isinstance(value, relax.TupleGetItem):
        split = graph.resolve(value.tuple_value)
        if not ir.is_op(split, "relax.split") or len(split.ty.fields) != 2:
            return None
        whole, index, between = (
            graph.source(split.args[0]),
            int(value.index),
            (graph.source(value.tuple_value),),
        )
        fields = [int(f.shape[-1]) if ir.is_constant(f.shape[-1]) else -1 for f in split.ty.fields]
        width = ir.dims(whole)[-1]
        if len(set(fields)) != 1 or not ir.is_constant(width) or sum(fields) != int(width):
            return None
        return whole, index, between
    if ir.is_op(value, "relax.strided_slice"):
        cut = ir.slice_of(value)
        if cut is None:
            return None
        axis, begin, end, step = cut
        whole = graph.source(value.args[0])
        shape = ir.dims(whole)
        if axis != len(shape) - 1 or step != 1 or not ir.is_constant(shape[-1]) or int(shape[-1]) % 2:
            return None
        half = int(shape[-1]) // 2
        return (whole, begin // half, ()) if (begin, end) in ((0, half), (half, 2 * half)) else None
    return None


def projection_to(graph: Graph, result: Any, weights: set[Any]) -> Projection | None:
    """The projection whose result, bias included, is `result`."""
    value = graph.definition(result)
    candidates = [graph.source(a) for a in value.args] if ir.is_op(value, "relax.add") else [result]
    for var in candidates:
        found = projection(graph, var, weights) if isinstance(var, relax.Var) else None
        if found is not None and found.result == result:
            return found
    return None
