"""SpecializeDecode: derive ``decode`` (one new token per sequence) from ``step``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tvm import relax

from llmc import ir
from llmc.caps import Capabilities
from llmc.passes.rewrite import Builder, Graph, Kernels
from llmc.passes.step_module import StepModule
from llmc.schedules.attention import attention_decode, partial_shape
from llmc.schedules.costs import attention_cost
from llmc.schedules.rope import RopeConfig


class SpecializeDecode:
    """Copy ``step`` and swap the attention kernel for the one that splits the context.

    before: step:   o = call_tir(attention_prefill_0, q, pk, pv, query_start, context_len, block_table_0, layer)
    after:  decode: o, partial = call_tir(attention_decode_0, ...same...)

    A kernel that rotates q and appends k and v goes into the attention kernel: with one token per sequence that is little
    work, and a launch less. The copy shares every other kernel. Runs after FuseTIR and DefaultSchedule, so that fusion
    and scheduling are done once.

    Args:
        fuse: False leaves the rotating kernel where it is.
    """

    def __init__(self, caps: Capabilities, *, fuse: bool = True) -> None:
        self.caps = caps
        self.fuse = fuse

    def __call__(self, step_module: StepModule) -> StepModule:
        module = ir.shallow_copy(step_module.module)
        kernels = Kernels(module)
        func = module["step"]
        graph, build = Graph(func), Builder()
        tokens = func.params[0].ty.shape[0]  # one per sequence
        configs = dict(step_module.attention)
        ropes = _ropes(graph, configs, dict(step_module.rope)) if self.fuse else {}
        parts = {var for rope in ropes.values() for var in (rope.var, *rope.parts.values())}
        for binding in graph.bindings:
            value = binding.value
            if binding.var in parts:
                continue  # comes with its attention
            name = value.args[0].name_hint if ir.is_op(value, "relax.call_tir") else ""
            config = configs.get(name)
            if config is None:
                build.keep(binding)
                continue
            rope = ropes.get(binding.var)
            gvar = kernels.get(
                (config, rope.config if rope else None),
                name.replace("attention_prefill", "attention_decode"),
                partial(attention_decode, config, self.caps, rope.config if rope else None),
                attention_cost(config, rope.config if rope else None),
            )
            scratch = ir.tensor_type([tokens, *partial_shape(config)], "float32")
            outputs = [binding.var.ty, scratch]
            if rope is None:
                both = build.emit(relax.call_tir(gvar, value.args[1], outputs), "split")
                build.bind(binding.var, relax.TupleGetItem(both, 0))
                continue
            rest = list(value.args[1].fields[3:])
            if not rope.pools:  # of another layer: only read
                args = relax.Tuple([*rope.args, *value.args[1].fields[1:]])
                both = build.emit(relax.call_tir(gvar, args, outputs), "split")
                build.bind(binding.var, relax.TupleGetItem(both, 0))
                continue
            args = relax.Tuple([*rope.args, *rest])
            at = len(rope.args) - 2
            types = [*outputs, *(pool.ty for pool in rope.pools)]
            call = relax.op.call_tir_inplace(gvar, args, [-1, -1, at, at + 1], types)
            four = build.emit(call, "split")
            build.bind(binding.var, relax.TupleGetItem(four, 0))
            for index, var in rope.parts.items():
                if index > 0:
                    build.bind(var, relax.TupleGetItem(four, index + 1))
        decode = build.function(func.params, func.body.body, None, symbol="decode")
        decode = relax.utils.copy_with_new_vars(decode)
        for key, attr in dict(func.attrs or {}).items():
            if key != "global_symbol":
                decode = decode.with_attr(key, attr)
        module[relax.GlobalVar("decode")] = decode.with_attr("global_symbol", "decode")
        return replace(step_module, module=module)


@dataclass(frozen=True)
class _Rope:
    """A rotating kernel whose q only one attention reads.

    Attributes:
        var: what its call is bound to.
        parts: index in its result -> variable; q alone is `var` itself.
        args: of the call, up to the pools.
        pools: page tensors that it writes; empty without k and v.
    """

    config: RopeConfig
    var: Any
    parts: dict[int, Any]
    args: list[Any]
    pools: list[Any]


def _ropes(graph: Graph, configs: dict[str, Any], ropes: dict[str, RopeConfig]) -> dict[Any, _Rope]:
    """attention's result -> the rotating kernel in front of it."""
    found: dict[Any, _Rope] = {}
    parts: dict[Any, dict[int, Any]] = {}
    for binding in graph.bindings:
        if isinstance(binding.value, relax.TupleGetItem):
            parts.setdefault(binding.value.tuple_value, {})[int(binding.value.index)] = binding.var
    for binding in graph.bindings:
        value = binding.value
        if not ir.is_op(value, "relax.call_tir") or value.args[0].name_hint not in configs:
            continue
        q = value.args[1].fields[0]
        var = q
        if isinstance(graph.definition(q), relax.TupleGetItem):
            var = graph.definition(q).tuple_value
        call = graph.definition(var)
        in_place = ir.is_op(call, "relax.call_tir_inplace")
        if not in_place and not ir.is_op(call, "relax.call_tir"):
            continue
        config = ropes.get(call.args[0].name_hint)
        if config is None or graph.uses.get(q, 0) != 1:
            continue
        fields = list(call.args[1].fields)
        if not in_place:
            found[binding.var] = _Rope(config, var, {}, fields, [])
            continue
        fields.pop()  # the layer follows with the attention's own
        own = parts.get(var, {})
        if [own.get(1), own.get(2)] == list(value.args[1].fields[1:3]):
            found[binding.var] = _Rope(config, var, own, fields, fields[-2:])
    return found
