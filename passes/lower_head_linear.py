"""LowerHeadLinear: llmc.head_linear becomes a kernel over a packed weight per head."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from tvm import relax

from llmc import ir
from llmc.caps import Capabilities
from llmc.ops import HEAD_LINEAR, HeadLinearAttrs
from llmc.passes.rewrite import Builder, Graph, Kernels, update_function
from llmc.passes.step_module import LoweredGraph
from llmc.passes.weight_layouts import WeightLayouts
from llmc.schedules.head_linear import HeadLinearConfig
from llmc.schedules.kernels import builders
from llmc.schedules.layout import linear_layout


class LowerHeadLinear:
    """Replace llmc.head_linear by its kernel.

    before: y = llmc.head_linear(x, w[h, n, k], cos?, sin?)
    after:  y = call_tir(head_linear, x, cos?, sin?, w'[h, n/nb, k/kp, nb, kp])

    Runs beside LowerLinear, before LegalizeOps, which does not know the op.
    """

    def __init__(self, caps: Capabilities, layouts: WeightLayouts | None = None) -> None:
        self.caps = caps
        self.layouts = layouts or WeightLayouts()

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        params, infos = list(func.params), list(lowered.params)
        index_of = {var: i for i, var in enumerate(params[2:])}
        module = ir.shallow_copy(lowered.module)
        kernels, build = Kernels(module), Builder()
        packed: dict[Any, Any] = {}
        changed = False
        for binding in graph.bindings:
            match = ir.match_opaque(binding.value, HEAD_LINEAR)
            if match is None:
                build.keep(binding)
                continue
            changed = True
            (x, weight, *tensors), text = match
            weight = graph.source(weight)
            info = infos[index_of[weight]]
            _, n, k = info.shape
            dtype = str(x.ty.dtype)
            layout = self.layouts.blocked(info.sources, dtype) or linear_layout(dtype, self.caps)
            config = HeadLinearConfig(
                HeadLinearAttrs.from_json(text),
                n,
                k,
                dtype,
                _shape(x),
                tuple(_shape(t) for t in tensors),
                str(tensors[0].ty.dtype) if tensors else "float32",
                layout,
            )
            build_it = partial(builders(self.caps).head_linear, config, self.caps)
            gvar = kernels.get(config, f"head_linear_{n}_{k}", build_it)
            shape = config.packed_shape(self.caps)
            if weight not in packed:
                packed[weight] = relax.Var(
                    info.name.replace(".", "_") + "_packed", ir.tensor_type(shape, dtype)
                )
                params.append(packed[weight])
                infos.append(replace(info, dtype=dtype, shape=shape, layout=layout.as_text()))
            build.bind(binding.var, relax.call_tir(gvar, [x, *tensors, packed[weight]], binding.var.ty))
        if not changed:
            return lowered
        new = build.function(params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(module, "main", new), tuple(infos))


def _shape(var: Any) -> tuple[int, ...]:
    """-1 = the number of tokens."""
    return tuple(int(d) if ir.is_constant(d) else -1 for d in ir.dims(var))
