"""LowerTopK: the choice of experts becomes a kernel, where there is no library that does it."""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax

from llmc import ir
from llmc.caps import Capabilities
from llmc.passes.rewrite import Builder, Graph, Kernels, update_function
from llmc.passes.step_module import LoweredGraph
from llmc.schedules.gpu.topk import TopKConfig
from llmc.schedules.kernels import builders


class LowerTopK:
    """Replace ``topk`` along the last axis by a kernel on machines with threads.

    before: v, i = topk(x [1, T, E], k)
    after:  v, i = call_tir(top_k, x)

    Elsewhere TVM's runtime has a routine for it, which DispatchSortScan takes.
    """

    def __init__(self, caps: Capabilities) -> None:
        self.caps = caps

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        build_it = builders(self.caps).top_k
        func = lowered.module["main"]
        graph = Graph(func)
        if build_it is None or not any(ir.is_op(b.value, "relax.topk") for b in graph.bindings):
            return lowered
        module = ir.shallow_copy(lowered.module)
        kernels, build = Kernels(module), Builder()
        for binding in graph.bindings:
            config = _config(binding.value)
            if config is None:
                build.keep(binding)
                continue
            gvar = kernels.get(
                config, f"top_{config.k}_of_{config.shape[-1]}", partial(build_it, config, self.caps)
            )
            types = list(binding.var.ty.fields)
            build.bind(binding.var, relax.call_tir(gvar, [binding.value.args[0]], types))
        new = build.function(func.params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(module, "main", new), lowered.params)


def _config(value: Any) -> TopKConfig | None:
    if not ir.is_op(value, "relax.topk") or not isinstance(value.ty, relax.TupleType):
        return None
    x, attrs = value.args[0], value.attrs
    shape = tuple(int(d) if ir.is_constant(d) else -1 for d in ir.dims(x))
    dtype = str(x.ty.dtype)
    if int(attrs.axis) not in (-1, len(shape) - 1) or shape[-1] < 0 or not dtype.startswith("float"):
        return None
    return TopKConfig(shape, int(attrs.k), bool(attrs.largest), dtype, str(attrs.dtype))
