"""ViewReshapes: kernels that only give a tensor another shape become views."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax, tirx
from tvm.relax.analysis import has_reshape_pattern

from llmc import ir
from llmc.passes.rewrite import Builder, Graph
from llmc.passes.step_module import StepModule


class ViewReshapes:
    """Read a tensor in another shape without copying it.

    before: b = call_tir(reshape, a) : [1, T, 2048]           (a: [1, T, 32, 64]; the kernel copies)
    after:  b = reshape(a)                                    (the VM makes a view)

    Also for the result: relax.transform.RewriteDataflowReshape copies there. Memory planning follows a view to its
    tensor. Runs after FuseTIR, when a reshape that goes into another kernel has gone there, and before DefaultSchedule,
    because a scheduled function is not recognised any more.
    """

    def __call__(self, step_module: StepModule) -> StepModule:
        module = step_module.module
        func = module["step"]
        known: dict[str, bool] = {}
        viewed: set[str] = set()
        build = Builder()
        for binding in Graph(func).bindings:
            source = _viewed(module, binding, known)
            if source is None:
                build.keep(binding)
                continue
            viewed.add(binding.value.args[0].name_hint)
            view = relax.op.reshape(source, relax.ShapeExpr(ir.dims(binding.var)))
            build.bind(binding.var, view)
        if not viewed:
            return step_module
        out = ir.shallow_copy(module)
        still = {b.value.args[0].name_hint for b in build.bindings if ir.is_op(b.value, "relax.call_tir")}
        for name in viewed - still:
            del out[out.get_global_var(name)]
        new = build.function(func.params, func.body.body, func.attrs, symbol="step")
        out.update_func(out.get_global_var("step"), new)
        return replace(step_module, module=out)


def _viewed(module: Any, binding: Any, known: dict[str, bool]) -> Any | None:
    """The tensor that a call gives another shape, else None."""
    value = binding.value
    if not ir.is_op(value, "relax.call_tir") or len(value.args) != 2 or len(value.args[1].fields) != 1:
        return None
    name = value.args[0].name_hint
    if name not in known:
        func = module[name]
        known[name] = isinstance(func, tirx.PrimFunc) and bool(has_reshape_pattern(func))
    source = value.args[1].fields[0]
    same = isinstance(binding.var.ty, relax.TensorType) and binding.var.ty.dtype == source.ty.dtype
    return source if known[name] and same else None
