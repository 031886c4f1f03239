"""FuseQKV: the projections that one attention block reads from one input become one matmul."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import relax

from llmc import ir
from llmc.ops import ATTENTION
from llmc.passes.rewrite import Builder, Graph, operands, update_function
from llmc.passes.step_module import LoweredGraph, PackedParam

_MOST_STEPS = (
    256  # bindings between an attention block and its projections; more = not a plain attention block
)


@dataclass(frozen=True)
class Projection:
    """``matmul(x, permute_dims(w)) (+ b)`` with plain weights.

    Attributes:
        x: the input.
        weight, bias: parameters; bias is None without one.
        first: the matmul's variable.
        result: the variable behind the bias.
    """

    x: Any
    weight: Any
    bias: Any | None
    first: Any
    result: Any


class FuseQKV:
    """Concatenate the weights of q, k and v.

    before: q = matmul(x, wq.T) + bq;  k = matmul(x, wk.T) + bk;  v = matmul(x, wv.T) + bv;  attention(f(q), g(k), v)
    after:  y = matmul(x, wqkv.T) + bqkv;  q = y[..., :nq];  k = y[..., nq:nq+nk];  v = y[..., nq+nk:]

    The rows of wqkv are those of its sources, laid end to end when the weights are packed. Widths may differ; norms and
    rotations of q and k stay behind the slices. Runs before LowerLinear, which packs the weight, and before FuseRoPE,
    which reads the slices in place.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        index_of = {var: i for i, var in enumerate(func.params[2:])}
        schemes = {var: lowered.params[i].scheme for var, i in index_of.items()}
        groups = list(self._groups(graph, schemes))
        if not groups:
            return lowered
        order = {binding.var: i for i, binding in enumerate(graph.bindings)}
        at: dict[Any, list[Projection]] = {}
        dropped: set[Any] = set()
        for group in groups:
            group.sort(key=lambda p: order[p.first])
            at[group[0].first] = group
            dropped.update(v for p in group for v in (p.first, p.result))
        params, infos = list(func.params), list(lowered.params)
        build = Builder()
        for binding in graph.bindings:
            if binding.var in at:
                self._emit(build, at[binding.var], params, infos, index_of)
            elif binding.var not in dropped:
                build.keep(binding)
        new = build.function(params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), tuple(infos))

    def _groups(self, graph: Graph, schemes: dict[Any, str]) -> Iterator[list[Projection]]:
        taken: set[Any] = set()
        for binding in graph.bindings:
            match = ir.match_opaque(binding.value, ATTENTION)
            if not match:
                continue
            by_input: dict[Any, list[Projection]] = {}
            for found in _projections_behind(graph, match[0][:3], set(schemes)):
                if found.first not in taken:
                    by_input.setdefault(graph.source(found.x), []).append(found)
            for group in by_input.values():
                same = len({(str(p.result.ty.dtype), p.bias is None, schemes[p.weight]) for p in group}) == 1
                if len(group) > 1 and same:
                    taken.update(p.first for p in group)
                    yield group

    def _emit(
        self,
        build: Builder,
        group: list[Projection],
        params: list[Any],
        infos: list[PackedParam],
        index_of: dict[Any, int],
    ) -> None:
        weight = concatenated([infos[index_of[p.weight]] for p in group], params, infos)
        y = build.emit(relax.op.matmul(group[0].x, build.emit(relax.op.permute_dims(weight), "wt")), "qkv")
        if group[0].bias is not None:
            bias = concatenated([infos[index_of[p.bias]] for p in group], params, infos)
            y = build.emit(relax.op.add(y, bias), "qkv")
        begin = 0
        for p in group:
            end = begin + int(p.weight.ty.shape[0])
            axis = len(y.ty.shape) - 1
            build.bind(p.result, relax.op.strided_slice(y, axes=[axis], begin=[begin], end=[end]))
            begin = end


def concatenated(sources: list[PackedParam], params: list[Any], infos: list[PackedParam]) -> Any:
    """A new parameter, in rows, of the rows of `sources`; appended to `params` and `infos`."""
    shape = (sum(s.shape[0] for s in sources), *sources[0].shape[1:])
    names = [name for s in sources for name in s.sources]
    info = PackedParam(
        _joined([s.name for s in sources]),
        names[0],
        sources[0].dtype,
        shape,
        more=tuple(names[1:]),
        scheme=sources[0].scheme,
    )
    var = relax.Var(info.name.replace(".", "_").replace("+", "_"), ir.tensor_type(shape, info.dtype))
    params.append(var)
    infos.append(info)
    return var


def _joined(names: list[str]) -> str:
    """``a.q.weight, a.k.weight`` -> ``a.q+k.weight``."""
    parts = [name.split(".") for name in names]
    if len({len(p) for p in parts}) != 1:
        return "+".join(names)
    return ".".join("+".join(dict.fromkeys(column)) for column in zip(*parts, strict=True))


def projection(graph: Graph, var: Any, weights: set[Any]) -> Projection | None:
    """The projection whose matmul is bound to `var`, if its weight and bias are used nowhere else."""
    value = graph.definition(var)
    if not ir.is_op(value, "relax.matmul"):
        return None
    x, transposed = value.args
    turned = graph.resolve(transposed)
    if not ir.is_op(turned, "relax.permute_dims") or not ir.is_rows(x):
        return None
    weight = graph.source(turned.args[0])
    plain = weight in weights and len(weight.ty.shape) == 2 and graph.uses.get(weight, 0) == 1
    if not plain or graph.uses.get(transposed, 0) != 1 or x.ty.dtype != weight.ty.dtype:
        return None
    found = Projection(x, weight, None, var, var)
    users = graph.users(var)
    if graph.uses.get(var, 0) == 1 and len(users) == 1 and ir.is_op(users[0].value, "relax.add"):
        a, b = users[0].value.args
        bias = graph.source(b if graph.source(a) == var else a)
        if bias in weights and len(bias.ty.shape) == 1 and graph.uses.get(bias, 0) == 1:
            return Projection(x, weight, bias, var, users[0].var)
    return found


def _projections_behind(graph: Graph, ends: list[Any], weights: set[Any]) -> list[Projection]:
    """The projections that `ends` are computed from without another matmul in between."""
    seen: set[Any] = set()
    found: list[Projection] = []
    todo = list(ends)
    while todo:
        var = todo.pop()
        value = graph.definition(var)
        if var in seen or value is None:
            continue
        seen.add(var)
        if len(seen) > _MOST_STEPS:
            return []
        match = projection(graph, var, weights)
        if match:
            found.append(match)
        elif not ir.is_op(value, "relax.matmul") and not ir.match_opaque(value, ATTENTION):
            todo.extend(operands(value))
    return found
