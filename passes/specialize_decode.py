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
from llmc.schedules.attention import partial_shape
from llmc.schedules.costs import attention_cost
from llmc.schedules.kernels import builders
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
        parts = {var for rope in ropes.values() for var in rope.bound}
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
                partial(
                    builders(self.caps).attention_decode, config, self.caps, rope.config if rope else None
                ),
                attention_cost(config, rope.config if rope else None),
            )
            scratch = ir.tensor_type([tokens, *partial_shape(config)], "float32")
            outputs = [binding.var.ty, scratch]
            if rope is None:
                both = build.emit(relax.call_tir(gvar, value.args[1], outputs), "split")
                build.bind(binding.var, relax.TupleGetItem(both, 0))
                continue
            fields = list(value.args[1].fields)
            if not rope.pools:  # of another layer: only read
                args = relax.Tuple([*rope.args, *fields[1:]])
                both = build.emit(relax.call_tir(gvar, args, outputs), "split")
                build.bind(binding.var, relax.TupleGetItem(both, 0))
                continue
            count = len(rope.pools)
            before = list(rope.args)
            if rope.config.q is None:  # q is there already; it comes before the slots
                before.insert(-1 - count, fields[0])
            args = relax.Tuple([*before, *fields[1 + count :]])
            at = len(before) - count
            where, types = [at + j for j in range(count)], [pool.ty for pool in rope.pools]
            call = relax.op.call_tir_inplace(gvar, args, [-1, -1, *where], [*outputs, *types])
            all_ = build.emit(call, "split")
            build.bind(binding.var, relax.TupleGetItem(all_, 0))
            for j, var in rope.after.items():
                build.bind(var, relax.TupleGetItem(all_, 2 + j))
        decode = build.function(func.params, func.body.body, None, symbol="decode")
        decode = relax.utils.copy_with_new_vars(decode)
        for key, attr in dict(func.attrs or {}).items():
            if key != "global_symbol":
                decode = decode.with_attr(key, attr)
        module[relax.GlobalVar("decode")] = decode.with_attr("global_symbol", "decode")
        return replace(step_module, module=module)


@dataclass(frozen=True)
class _Rope:
    """A rotating kernel of whose results only one attention reads.

    Attributes:
        bound: what its call and the parts of its result are bound to.
        args: of the call, up to the pools.
        pools: page tensors that it writes; empty without k and v.
        after: number of a pool -> what it is bound to afterwards.
    """

    config: RopeConfig
    bound: tuple[Any, ...]
    args: list[Any]
    pools: list[Any]
    after: dict[int, Any]


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
        attention = configs[value.args[0].name_hint]
        fields = value.args[1].fields
        # latents are appended by a kernel that gives the pool alone; queries come from elsewhere
        var = fields[1 if attention.latent else 0]
        if isinstance(graph.definition(var), relax.TupleGetItem):
            var = graph.definition(var).tuple_value
        call = graph.definition(var)
        in_place = ir.is_op(call, "relax.call_tir_inplace")
        if not in_place and not ir.is_op(call, "relax.call_tir"):
            continue
        config = ropes.get(call.args[0].name_hint)
        if config is None or (config.q is not None and graph.uses.get(fields[0], 0) != 1):
            continue
        args = list(call.args[1].fields)
        if not in_place:
            found[binding.var] = _Rope(config, (var,), args, [], {})
            continue
        args.pop()  # the layer follows with the attention's own
        own = parts.get(var, {})
        if attention.latent:
            found[binding.var] = _Rope(config, (var,), args, args[-1:], {0: var})
        elif [own.get(1), own.get(2)] == list(fields[1:3]):
            after = {index - 1: var for index, var in own.items() if index > 0}
            found[binding.var] = _Rope(config, (var, *own.values()), args, args[-2:], after)
    return found
