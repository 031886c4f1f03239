"""FuseAddNorm: a residual addition and the norm of its sum become one op with two results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax

from llmc import ir
from llmc.ops import NORM, NormAttrs
from llmc.passes.fuse_linear_epilogue import alike
from llmc.passes.rewrite import Builder, Graph, update_function
from llmc.passes.step_module import LoweredGraph


class FuseAddNorm:
    """Add and normalise in one pass over the row (RMSNorm and LayerNorm).

    before: s = a + b;  ...  y = llmc.norm(s, w)
    after:  s, y = llmc.norm(a, b, w, {adds})

    For additions that no matmul took into its epilogue: behind experts, post-norms (Gemma 2) and in parallel blocks. Runs
    after FuseNorm, which makes the ops, and after FuseLinearEpilogue, which is cheaper where it applies.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        weights = set(func.params[2:])
        norm_of: dict[Any, Any] = {}  # sum -> binding of its norm
        for binding in graph.bindings:
            match = ir.match_opaque(binding.value, NORM)
            if match is None:
                continue
            total = graph.source(match[0][0])
            added = graph.definition(total)
            fixed = all(graph.source(v) in weights or ir.is_tensor_constant(v) for v in match[0][1:])
            if not fixed or not ir.is_op(added, "relax.add") or total in norm_of:
                continue
            if alike(added.args[0], added.args[1], total):
                norm_of[total] = binding
        if not norm_of:
            return lowered
        moved = {binding.var for binding in norm_of.values()}
        build = Builder()
        for binding in graph.bindings:
            if binding.var in moved:
                continue
            norm = norm_of.get(binding.var)
            if norm is None:
                build.keep(binding)
                continue
            operands, text = ir.match_opaque(norm.value, NORM) or ([], "")
            attrs = replace(NormAttrs.from_json(text), adds=True)
            args = [*binding.value.args, *operands[1:]]
            both = relax.TupleType([binding.var.ty, norm.var.ty])
            pair = build.emit(ir.opaque_call(NORM, args, attrs.to_json(), both), "add_norm")
            build.bind(binding.var, relax.TupleGetItem(pair, 0))
            build.bind(norm.var, relax.TupleGetItem(pair, 1))
        new = build.function(func.params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), lowered.params)
