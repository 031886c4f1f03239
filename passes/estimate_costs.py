"""EstimateCosts: what each kernel that Relax made computes."""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from llmc import ir
from llmc.passes.step_module import StepModule
from llmc.schedules.costs import COST, prim_func_cost


class EstimateCosts:
    """Write the cost of each PrimFunc that Relax made on the function.

    before: fused_cos_cast(x, y)          after: fused_cos_cast(x, y) {llmc.cost: "elementwise|64*D0_1||"}

    Runs before DefaultSchedule, while the functions have blocks; kernels of ours have a cost from their configuration.
    """

    def __call__(self, step_module: StepModule) -> StepModule:
        module = ir.shallow_copy(step_module.module)
        for gvar, func in step_module.module.functions.items():
            if isinstance(func, tirx.PrimFunc) and COST not in (func.attrs or {}):
                module.update_func(gvar, func.with_attr(COST, prim_func_cost(func).as_text()))
        return replace(step_module, module=module)
