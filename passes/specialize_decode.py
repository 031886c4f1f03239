"""SpecializeDecode: derive ``decode`` (one new token per sequence) from ``step``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tvm import relax

from llmc import ir
from llmc.caps import Capabilities
from llmc.passes.rewrite import Builder, Graph, Kernels
from llmc.passes.step_module import StepModule
from llmc.schedules.attention import attention_decode, partial_shape


class SpecializeDecode:
    """Copy ``step`` and swap the attention kernel for the one that splits the context.

    before: step:   o = call_tir(attention_prefill_0, q, pk, pv, query_start, context_len, block_table_0, layer)
    after:  decode: o, partial = call_tir(attention_decode_0, ...same...)

    The copy shares every other kernel. Runs after FuseTIR and DefaultSchedule, so that fusion and scheduling are done once.
    """

    def __init__(self, caps: Capabilities) -> None:
        self.caps = caps

    def __call__(self, step_module: StepModule) -> StepModule:
        module = ir.shallow_copy(step_module.module)
        kernels = Kernels(module)
        func = module["step"]
        graph, build = Graph(func), Builder()
        tokens = func.params[0].ty.shape[0]  # one per sequence
        configs = dict(step_module.attention)
        for binding in graph.bindings:
            value = binding.value
            name = value.args[0].name_hint if ir.is_op(value, "relax.call_tir") else ""
            config = configs.get(name)
            if config is None:
                build.keep(binding)
                continue
            gvar = kernels.get(
                config,
                name.replace("attention_prefill", "attention_decode"),
                partial(attention_decode, config, self.caps),
            )
            scratch = ir.tensor_type([tokens, *partial_shape(config)], "float32")
            both = build.emit(relax.call_tir(gvar, value.args[1], [binding.var.ty, scratch]), "split")
            build.bind(binding.var, relax.TupleGetItem(both, 0))
        decode = build.function(func.params, func.body.body, None, symbol="decode")
        decode = relax.utils.copy_with_new_vars(decode)
        for key, attr in dict(func.attrs or {}).items():
            if key != "global_symbol":
                decode = decode.with_attr(key, attr)
        module[relax.GlobalVar("decode")] = decode.with_attr("global_symbol", "decode")
        return replace(step_module, module=module)
