"""LowerEmbedding: row gathers from a weight that is packed for the head read the packed copy (tied embeddings)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from tvm import relax

from llmc import ir
from llmc.caps import Capabilities
from llmc.passes.rewrite import Builder, Graph, Kernels, update_function
from llmc.passes.step_module import LoweredGraph, PackedParam
from llmc.passes.weight_layouts import WeightLayouts
from llmc.quant.schemes import by_name
from llmc.schedules.gather import EmbeddingConfig
from llmc.schedules.kernels import builders
from llmc.schedules.layout import BlockedLayout
from llmc.schedules.qgather import QuantEmbeddingConfig
from llmc.schedules.qlayout import QuantLayout, quant_layout


class LowerEmbedding:
    """Replace ``take(w, ids, axis=0)`` by the embedding kernel.

    before: e = take(w [V, K], ids [1, T], axis=0)        and w' = blocked(w) exists for the head
    after:  e = call_tir(embedding, ids, w')              so that a tied weight is stored once

    Runs after LowerLinear, which decides what is packed. Weights without a packed copy are gathered from their rows.
    """

    def __init__(self, caps: Capabilities, layouts: WeightLayouts | None = None) -> None:
        self.caps = caps
        self.layouts = layouts or WeightLayouts()

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        params, infos = list(func.params), list(lowered.params)
        index_of = {var: i for i, var in enumerate(params[2:])}
        packed: dict[tuple[str, str], Any] = {}
        for var, info in zip(params[2:], lowered.params, strict=True):
            plain = info.layout != "rows" and not info.transposed and not info.more and not info.gated
            if plain and len(info.shape) == 4:
                packed[info.source, info.dtype] = (var, info)
            elif plain and info.scheme and QuantLayout.is_layout(info.layout):
                packed[info.source, info.scheme] = (var, info)
        module = ir.shallow_copy(lowered.module)
        kernels, build = Kernels(module), Builder()
        build_kernel = builders(self.caps)
        for binding in graph.bindings:
            value = binding.value
            table = self._table(graph, value, index_of)
            if table is None:
                build.keep(binding)
                continue
            info = lowered.params[index_of[table]]
            ids, dtype = value.args[1], str(value.ty.dtype)
            if info.scheme:
                config = QuantEmbeddingConfig(
                    layout=self.layouts.quantized(info.sources)
                    or quant_layout(by_name(info.scheme), info.shape[0], info.shape[1], self.caps),
                    dtype=dtype,
                    ids_dtype=str(ids.ty.dtype),
                    lead=len(ids.ty.shape) - 1,
                )
                if (info.source, info.scheme) not in packed:
                    packed[info.source, info.scheme] = _packed(info, config.layout, params, infos)
                gvar = kernels.get(
                    config, "embedding", partial(build_kernel.quant_embedding, config, self.caps)
                )
                args = [ids, packed[info.source, info.scheme][0]]
                build.bind(binding.var, relax.call_tir(gvar, args, binding.var.ty))
                continue
            weight, layout = table, None
            if (info.source, info.dtype) in packed:
                weight, packed_info = packed[info.source, info.dtype]
                layout = BlockedLayout.parse(packed_info.layout)
            plain_config = EmbeddingConfig(
                rows=info.shape[0],
                k=info.shape[1],
                dtype=dtype,
                ids_dtype=str(ids.ty.dtype),
                lead=len(ids.ty.shape) - 1,
                layout=layout,
            )
            gvar = kernels.get(
                plain_config, "embedding", partial(build_kernel.embedding, plain_config, self.caps)
            )
            build.bind(binding.var, relax.call_tir(gvar, [ids, weight], binding.var.ty))
        new = build.function(params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(module, "main", new), tuple(infos))

    def _table(self, graph: Graph, value: Any, index_of: dict[Any, int]) -> Any | None:
        """The parameter that `value` gathers rows from, or None."""
        if (
            not ir.is_op(value, "relax.take")
            or int(value.attrs.axis if value.attrs.axis is not None else -1) != 0
        ):
            return None
        table = graph.source(value.args[0])
        if table not in index_of or len(table.ty.shape) != 2:
            return None
        ids = ir.dims(value.args[1]) if getattr(value.args[1].ty, "shape", None) is not None else None
        if ids is None or len(ids) < 1 or any(not ir.is_one(d) for d in ids[:-1]):
            return None
        return table


def _packed(
    info: PackedParam, layout: QuantLayout, params: list[Any], infos: list[PackedParam]
) -> tuple[Any, PackedParam]:
    """A quantized table of its own, appended to `params` and `infos`."""
    shape = layout.packed_shape
    packed = replace(info, dtype="uint8", shape=shape, layout=layout.as_text())
    var = relax.Var(info.name.replace(".", "_") + "_packed", ir.tensor_type(shape, "uint8"))
    params.append(var)
    infos.append(packed)
    return var, packed
