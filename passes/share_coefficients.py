"""ShareCoefficients: what depends on positions alone is computed once, not once per layer."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import relax

from llmc.passes.head_elements import position_only
from llmc.passes.rewrite import Builder, Graph, substituted, update_function
from llmc.passes.step_module import LoweredGraph


class ShareCoefficients:
    """Merge equal computations on positions and constants (rotation tables, ALiBi distances).

    before: layer 0: s0 = take(table, positions);  layer 1: s1 = take(table, positions)
    after:  layer 0: s0 = take(table, positions);  layer 1: uses s0

    Runs before FuseRoPE: layers whose heads take one pair of coefficient tensors share one kernel.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph, build = Graph(func), Builder()
        shared = position_only(graph)
        replaced: dict[Any, Any] = {}
        known: dict[int, list[tuple[Any, Any]]] = {}
        for binding in graph.bindings:
            value = substituted(binding.value, replaced)
            if binding.var in shared:
                bare = _untyped(value)
                same = known.setdefault(tvm_ffi.structural_hash(bare), [])
                first = next((var for old, var in same if tvm_ffi.structural_equal(old, bare)), None)
                if first is not None:
                    replaced[binding.var] = first
                    continue
                same.append((bare, binding.var))
            build.keep(binding) if value is binding.value else build.bind(binding.var, value)
        if not replaced:
            return lowered
        body = substituted(func.body.body, replaced)
        new = build.function(func.params, body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), lowered.params)


def _untyped(value: Any) -> Any:
    """A call without the type that was deduced for it: a rewritten one has none yet."""
    if isinstance(value, relax.Call):
        return relax.Call(value.op, value.args, value.attrs, value.ty_args)
    return value
