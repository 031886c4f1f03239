"""FuseLinearEpilogue: activations and residual additions behind a matmul move into its kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax

from llmc import ir
from llmc.ops import LINEAR, LinearAttrs
from llmc.passes.fuse_gate_up import activation_of, projection_to
from llmc.passes.rewrite import Builder, Graph, update_function
from llmc.passes.step_module import LoweredGraph

_Call = tuple[list[Any], LinearAttrs]  # operands and attributes of an llmc.linear


class FuseLinearEpilogue:
    """Apply an activation to the sums of a matmul, and add the residual to them, before they are stored.

    before: y = matmul(x, w.T) + b;  z = r + y             a = act(matmul(x, w.T) + b)
    after:  z = llmc.linear(x, w, b, r)                    a = llmc.linear(x, w, b, {act})

    The sum is rounded once, to the result's dtype. Runs after FuseGateUp, whose ops take a residual too, and after
    FuseQKV, so that a projection of attention is not taken apart; before LowerLinear.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        weights = set(func.params[2:])
        calls: dict[Any, _Call] = {}
        changed = False
        build = Builder()
        for binding in graph.bindings:
            opaque = ir.match_opaque(binding.value, LINEAR)
            if opaque:
                calls[binding.var] = (opaque[0], LinearAttrs.from_json(opaque[1]))
            found = self._activated(graph, binding, weights) or self._added(graph, binding, weights, calls)
            if found is None:
                build.keep(binding)
                continue
            changed = True
            calls[binding.var] = found
            operands, attrs = found
            build.bind(binding.var, ir.opaque_call(LINEAR, operands, attrs.to_json(), binding.var.ty))
        if not changed:
            return lowered
        new = build.function(func.params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), lowered.params)

    def _activated(self, graph: Graph, binding: Any, weights: set[Any]) -> _Call | None:
        name, source = activation_of(graph, binding.value)
        if name is None:
            return None
        found = _plain(graph, source, weights)
        return (found[0], replace(found[1], activation=name)) if found else None

    def _added(self, graph: Graph, binding: Any, weights: set[Any], calls: dict[Any, _Call]) -> _Call | None:
        if not ir.is_op(binding.value, "relax.add"):
            return None
        a, b = binding.value.args
        for product, residual in ((b, a), (a, b)):
            product = graph.source(product)
            if not alike(product, residual, binding.var) or graph.definition(graph.source(residual)) is None:
                continue
            if product in calls and graph.uses.get(product, 0) == 1:
                operands, attrs = calls[product]
            else:
                found = _plain(graph, product, weights)
                if found is None:
                    continue
                operands, attrs = found
            if not attrs.has_residual:
                return [*operands, residual], replace(attrs, has_residual=True)
        return None


def _plain(graph: Graph, var: Any, weights: set[Any]) -> _Call | None:
    """The matmul and bias behind `var`, if nothing else reads it."""
    if not isinstance(var, relax.Var) or graph.uses.get(var, 0) != 1:
        return None
    found = projection_to(graph, var, weights)
    if found is None:
        return None
    bias = [found.bias] if found.bias is not None else []
    return [found.x, found.weight, *bias], LinearAttrs(has_bias=bool(bias))


def alike(product: Any, residual: Any, result: Any) -> bool:
    """Same shape and dtype, and the residual a computed tensor."""
    if not isinstance(product, relax.Var) or not isinstance(residual, relax.Var):
        return False
    types = [v.ty for v in (product, residual, result)]
    if any(getattr(t, "shape", None) is None for t in types) or len({str(t.dtype) for t in types}) != 1:
        return False
    shapes = [list(t.shape) for t in types]
    if len({len(s) for s in shapes}) != 1:
        return False
    return all(_same(d, e) for s in shapes[1:] for d, e in zip(shapes[0], s, strict=True))


def _same(a: Any, b: Any) -> bool:
    if ir.is_constant(a) and ir.is_constant(b):
        return int(a) == int(b)
    return bool(a.same_as(b))
