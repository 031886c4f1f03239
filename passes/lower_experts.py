"""LowerExperts: expert_linear ops become calls of the grouped expert kernel on packed weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from tvm import relax

from llmc import ir
from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.ops import EXPERT_LINEAR, ExpertLinearAttrs
from llmc.passes.rewrite import Builder, Graph, Kernels, update_function
from llmc.passes.step_module import LoweredGraph
from llmc.passes.weight_layouts import WeightLayouts
from llmc.quant.schemes import by_name
from llmc.schedules.choice import ByRows
from llmc.schedules.experts import ExpertConfig, SortConfig, plan_size
from llmc.schedules.kernels import builders
from llmc.schedules.layout import BlockedLayout, linear_layout, own_vectors
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qlayout import QuantLayout, quant_layout
from llmc.schedules.tune_experts import ExpertKernel, ExpertSchedule
from llmc.schedules.tuned_choice import Tuned


class LowerExperts:
    """Replace llmc.expert_linear by its kernel.

    before: y = llmc.expert_linear(x[n,d], ids[n], w[e,o,d], b?)
    after:  y = call_tir(expert_linear, x, ids, w'[e, o/nb, d/kp, nb, kp], b?)

    On a machine with threads rows are sorted once for all expert linears of the same ids:

    after:  plan = call_tir(sort_experts, ids)
            y = call_tir(expert_linear, x, plan, w'[e, o/nb, d/kp, nb, kp], b?)

    Runs beside LowerLinear, before LegalizeOps, which does not know the op.
    """

    def __init__(
        self, caps: Capabilities, tuned: Tuned | None = None, layouts: WeightLayouts | None = None
    ) -> None:
        self.caps = caps
        self.tuned = tuned or Tuned()
        self.layouts = layouts or WeightLayouts()

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        params, infos = list(func.params), list(lowered.params)
        index_of = {var: i for i, var in enumerate(params[2:])}
        module = ir.shallow_copy(lowered.module)
        kernels, build = Kernels(module), Builder()
        packed_vars: dict[tuple[Any, bool], Any] = {}
        decided: dict[
            tuple[Any, bool], dict[str, int]
        ] = {}  # about the layout, by the first kernel of a weight
        plans: dict[tuple[Any, int], Any] = {}
        changed = False
        for binding in graph.bindings:
            match = ir.match_opaque(binding.value, EXPERT_LINEAR)
            if match is None:
                build.keep(binding)
                continue
            changed = True
            operands, text = match
            attrs = ExpertLinearAttrs.from_json(text)
            x, ids, weight = operands[0], operands[1], graph.source(operands[2])
            if weight not in index_of:
                raise LlmcError(
                    "expert-weight-computed",
                    f"Expert weights must be parameters of the model; {operands[2].name} is computed in the graph.",
                    hint="Please report the model's architecture.",
                )
            info = infos[index_of[weight]]
            experts = info.shape[0]
            n, k = (info.shape[2], info.shape[1]) if attrs.transposed else (info.shape[1], info.shape[2])
            dtype = str(x.ty.dtype)
            common: dict[str, Any] = dict(
                in_dtype=dtype,
                out_dtype=str(binding.var.ty.dtype),
                ids_dtype=str(ids.ty.dtype),
                has_bias=attrs.has_bias,
            )
            layout: BlockedLayout | QuantLayout
            if info.scheme:
                layout = packing = self.layouts.quantized(info.sources) or quant_layout(
                    by_name(info.scheme), n, k, self.caps
                )
                shape: tuple[int, ...] = (experts, *packing.packed_shape)
                if packing.quads:  # as LowerLinear
                    common["prefetch"] = 0
                quantized = QuantExpertConfig(experts, packing, **common)
                build_it = builders(self.caps)
                builder = build_it.int_expert_linear if packing.quads else build_it.quant_expert_linear
                chosen = self.tuned.apply(quantized)
                kernel = kernels.get(
                    chosen,
                    f"expert_linear_{info.scheme}_{n}_{k}",
                    partial(builder, chosen, self.caps),
                )
            else:
                config = ExpertConfig(experts=experts, n=n, k=k, weight_dtype=dtype, **common)
                key = (weight, attrs.transposed)
                given = self.layouts.blocked(info.sources, dtype)
                vectors = None if given is None else own_vectors(given, dtype, self.caps)
                if given is not None and vectors is None:
                    config = replace(config, layout=given)
                elif vectors is not None:
                    decided[key] = {"vectors": vectors}
                tuned = ExpertKernel(config, self._schedules(config, decided.get(key)))
                decided.setdefault(key, {"vectors": tuned.schedule.choices[0].vectors})
                layout = blocked = given or linear_layout(dtype, self.caps, decided[key]["vectors"])
                shape = (experts, *blocked.packed_shape(n, k))
                kernel = kernels.get(
                    tuned,
                    f"expert_linear_{n}_{k}",
                    partial(builders(self.caps).expert_linear, tuned, self.caps),
                )
            key = (weight, attrs.transposed)
            if key not in packed_vars:
                stored = "uint8" if info.scheme else dtype
                packed_vars[key] = relax.Var(
                    info.name.replace(".", "_") + "_packed", ir.tensor_type(shape, stored)
                )
                params.append(packed_vars[key])
                infos.append(
                    replace(
                        info,
                        dtype=stored,
                        shape=shape,
                        layout=layout.as_text(),
                        transposed=attrs.transposed,
                    )
                )
            if (ids, experts) not in plans:
                plans[ids, experts] = self._plan(kernels, build, ids, experts)
            args = [x, plans[ids, experts], packed_vars[key], *operands[3:]]
            build.bind(binding.var, relax.call_tir(kernel, args, binding.var.ty))
        if not changed:
            return lowered
        new = build.function(params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(module, "main", new), tuple(infos))

    def _plan(self, kernels: Kernels, build: Builder, ids: Any, experts: int) -> Any:
        """What the kernels take for ids: themselves, or their rows in order."""
        sort = builders(self.caps).sort_experts
        if sort is None:
            return ids
        config = SortConfig(experts, str(ids.ty.dtype))
        kernel = kernels.get(config, f"sort_experts_{experts}", partial(sort, config, self.caps))
        shape = [plan_size(ids.ty.shape[0], experts)]
        return build.emit(relax.call_tir(kernel, [ids], ir.tensor_type(shape, "int32")), "plan")

    def _schedules(self, config: ExpertConfig, shared: dict[str, int] | None) -> ByRows[ExpertSchedule]:
        """Tuned schedules, or the default for any number of rows."""
        kernel = self.tuned.apply(config, shared=shared)
        if isinstance(kernel, ExpertKernel):
            return kernel.schedule
        decided: dict[str, Any] = shared or {}
        return ByRows((ExpertSchedule(**decided),))
