"""LowerNorm: norm ops become calls of the norm kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax

from llmc import ir
from llmc.caps import Capabilities
from llmc.ops import NORM, NormAttrs
from llmc.passes.rewrite import Builder, Graph, Kernels, update_function
from llmc.passes.step_module import LoweredGraph
from llmc.schedules.costs import kernel_cost
from llmc.schedules.kernels import builders
from llmc.schedules.norm import NormConfig
from llmc.schedules.tuned_choice import Tuned


class LowerNorm:
    """Replace llmc.norm by its kernel.

    before: y = llmc.norm(x, w, {eps})                     s, y = llmc.norm(a, b, w, {adds})
    after:  y = call_tir(rms_norm_K, x, w)                 s, y = call_tir(add_rms_norm_K, a, b, w)

    Runs after the passes that make and widen the ops; before LegalizeOps, which does not know them.
    """

    def __init__(self, caps: Capabilities, tuned: Tuned | None = None) -> None:
        self.caps, self.tuned = caps, tuned or Tuned()

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        module = ir.shallow_copy(lowered.module)
        kernels, build = Kernels(module), Builder()
        changed = False
        for binding in graph.bindings:
            match = ir.match_opaque(binding.value, NORM)
            if match is None:
                build.keep(binding)
                continue
            changed = True
            operands, attrs = match[0], NormAttrs.from_json(match[1])
            out = binding.var.ty
            types = list(out.fields) if isinstance(out, relax.TupleType) else [out]
            vectors = operands[2 if attrs.adds else 1 :]
            config = NormConfig(
                shape=tuple(int(d) if ir.is_constant(d) else -1 for d in ir.dims(operands[0])),
                dtype=str(operands[0].ty.dtype),
                weight_dtype=str(vectors[0].ty.dtype) if vectors else "float32",
                attrs=attrs,
            )
            name = f"{_name(attrs)}_{config.shape[-1]}"
            tuned = self.tuned.apply(config)
            build_it = partial(builders(self.caps).norm, tuned, self.caps)
            gvar = kernels.get(tuned, name, build_it, kernel_cost(config))
            call: Any = relax.call_tir(gvar, operands, types if len(types) > 1 else types[0])
            build.bind(binding.var, call)
        if not changed:
            return lowered
        new = build.function(func.params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(module, "main", new), lowered.params)


def _name(attrs: NormAttrs) -> str:
    """What is computed, in order."""
    parts = [_kind(attrs.before)] if attrs.before else []
    parts += ["add"] if attrs.adds else []
    return "_".join([*parts, *([] if attrs.only_sum else [_kind(attrs)])])


def _kind(attrs: NormAttrs) -> str:
    return "layer_norm" if attrs.center else "rms_norm"
