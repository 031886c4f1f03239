"""CancelTransposes: a transpose of a transpose that restores the order of the axes goes away."""

from __future__ import annotations

from typing import Any

from tvm import relax

from llmc import ir
from llmc.passes.rewrite import Builder, Graph, substituted, update_function
from llmc.passes.step_module import LoweredGraph


class CancelTransposes:
    """Drop pairs of transposes, also with casts and reshapes between them.

    before: a = attention(...);  b = permute_dims(a, 0 2 1 3);  c = permute_dims(b, 0 2 1 3);  d = f(c)
    after:  a = attention(...);  d = f(a)

    Attention written by hand (CodeGen, BLOOM) turns its result, and the op that replaces it has turned it already. Runs
    first: what follows looks through reshapes and casts, but not through these.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph, build = Graph(func), Builder()
        replaced: dict[Any, Any] = {}
        changed = False
        for binding in graph.bindings:
            found = _restored(graph, binding)
            if found is None:
                value = substituted(binding.value, replaced)
                build.keep(binding) if value is binding.value else build.bind(binding.var, value)
                continue
            changed = True
            source = replaced.get(found, found)
            if source.ty.dtype != binding.var.ty.dtype:
                build.bind(binding.var, relax.op.astype(source, str(binding.var.ty.dtype)))
            else:
                replaced[binding.var] = source
        if not changed:
            return lowered
        body = substituted(func.body.body, replaced)
        new = build.function(func.params, body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), lowered.params)


def _restored(graph: Graph, binding: Any) -> Any | None:
    """The tensor that a transpose gives back in its own order of axes, but for a cast."""
    if not ir.is_op(binding.value, "relax.permute_dims"):
        return None
    turned = graph.source(binding.value.args[0])
    var = turned
    while ir.op_name(graph.definition(var)) in ("relax.astype", "relax.reshape"):
        var = graph.source(graph.definition(var).args[0])
    inner = graph.definition(var)
    if not ir.is_op(inner, "relax.permute_dims") or not _same_shape(var, turned):
        return None
    first, second = _axes(inner), _axes(binding.value)
    if [first[a] for a in second] != list(range(len(first))):
        return None
    return graph.source(inner.args[0])


def _same_shape(a: Any, b: Any) -> bool:
    """Equal dimensions, units included."""
    one, other = ir.dims(a), ir.dims(b)
    return len(one) == len(other) and all(
        int(d) == int(e) if ir.is_constant(d) and ir.is_constant(e) else bool(d.same_as(e))
        for d, e in zip(one, other, strict=True)
    )


def _axes(call: Any) -> list[int]:
    rank = len(ir.dims(call.args[0]))
    axes = call.attrs.axes
    return [int(a) % rank for a in axes] if axes is not None else list(range(rank))[::-1]
