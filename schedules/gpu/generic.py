"""A schedule for every PrimFunc that is not a hand-written kernel, on a machine with threads."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import dlight

from llmc.schedules.generic import SCHEDULED


def schedule_module(module: Any) -> Any:
    """Bind the loops of every unscheduled function to blocks and threads; runs under the target.

    What is elementwise is inlined, the axes that are not reduced are shared among threads, reductions run in one thread
    (TVM's fallback rule for GPUs): right for any shape, and fast enough for what is left beside the kernels of this folder.
    """
    names = [
        gvar
        for gvar, func in module.functions.items()
        if isinstance(func, tirx.PrimFunc) and not (func.attrs and func.attrs.get(SCHEDULED))
    ]
    out = tvm.IRModule(dict(module.functions.items()), attrs=module.attrs)
    for gvar in names:
        one = tvm.IRModule({"main": module[gvar].with_attr("global_symbol", "main")})
        done = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(one)["main"]
        done = done.with_attr("global_symbol", gvar.name_hint).with_attr(SCHEDULED, True)
        out.update_func(gvar, done)
    return out
