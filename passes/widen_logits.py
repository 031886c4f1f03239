"""WidenLogits: the head writes float32 logits instead of rounding them to the model's dtype."""

from __future__ import annotations

from typing import Any

from tvm import relax

from llmc import ir
from llmc.passes.rewrite import Builder, Graph, update_function
from llmc.passes.step_module import LoweredGraph

_SHAPES_ONLY = frozenset({"relax.reshape", "relax.squeeze", "relax.expand_dims"})


class WidenLogits:
    """Move the logits' cast to float32 up to the head's matmul.

    before: y = matmul(x, w) (+ b) as bfloat16;  logits = reshape(y)
    after:  y = matmul(x, w) (+ b) as bfloat16;  z = astype(y, float32);  logits = reshape(z)

    Rounded to bfloat16, near ties of the two best tokens become real ties. Runs before LowerLinear, which takes the cast
    into the kernel, whose sums are float32 anyway. Logits that are computed on after the head (softcap, scale) stay as
    the source has them.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        body = graph.source(func.body.body)
        if not isinstance(body, relax.Var) or not isinstance(body.ty, relax.TensorType):
            return lowered  # a debug variant with taps
        chain, head = self._chain(graph, body)
        if head is None or str(body.ty.dtype) == "float32":
            return lowered
        build = Builder()
        wide: dict[Any, Any] = {}
        for binding in graph.bindings:
            if binding.var in chain:
                call = binding.value
                args = [wide[graph.source(call.args[0])], *call.args[1:]]
                wide[binding.var] = build.emit(relax.Call(call.op, args, call.attrs, call.ty_args), "logits")
                continue
            build.keep(binding)
            if binding.var == head:
                wide[head] = build.emit(relax.op.astype(head, "float32"), "logits")
        new = build.function(func.params, wide[body], func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), lowered.params)

    def _chain(self, graph: Graph, body: Any) -> tuple[set[Any], Any | None]:
        """(shape changes between head and result, the head's variable or None)."""
        chain: set[Any] = set()
        var = body
        while ir.op_name(graph.definition(var)) in _SHAPES_ONLY and graph.uses.get(var, 0) == 1:
            chain.add(var)
            var = graph.source(graph.definition(var).args[0])
        value = graph.definition(var)
        is_biased = ir.is_op(value, "relax.add") and any(
            ir.is_op(graph.resolve(arg), "relax.matmul") for arg in value.args
        )
        if graph.uses.get(var, 0) != 1 or not (ir.is_op(value, "relax.matmul") or is_biased):
            return set(), None
        return chain, var
