"""DefaultSchedule: a schedule for every PrimFunc that is not a hand-written kernel, without tuning."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

from llmc.caps import Capabilities
from llmc.schedules.rules import RULES, Rule
from llmc.schedules.vmath import use_vector_math

SCHEDULED = "tirx.is_scheduled"  # attribute of functions that need no schedule
_PARALLEL_ELEMENTS = 16384  # about 4 us on one core: below that, waking the other threads costs more


class DefaultSchedule:
    """Give each PrimFunc the schedule of the first rule that matches; leave it sequential if none does.

    before: for t: for j in 2048: y[t, j] = f(x[t, j])
    after:  if T * 2048 >= 16384: parallel for t: for j in 128: vector of 16
            else:                 for t: for j in 128: vector of 16

    Also switches exp, tanh, sigmoid and erf to vector polynomials for what is compiled in this process. Runs after
    FuseTIR, because fusion makes the functions; hand-written kernels carry the attribute ``tirx.is_scheduled``.
    """

    def __init__(self, caps: Capabilities) -> None:
        self.caps = caps

    def __call__(self, module: Any) -> Any:
        if self.caps.simt:
            from llmc.schedules.gpu.generic import schedule_module

            return schedule_module(module)
        use_vector_math()
        out = tvm.IRModule(dict(module.functions.items()), attrs=module.attrs)
        for gvar, func in module.functions.items():
            if isinstance(func, tirx.PrimFunc) and not _is_scheduled(func):
                out.update_func(gvar, schedule(func, self.caps))
        return out


def schedule(func: Any, caps: Capabilities) -> Any:
    """The scheduled function; the same function if no rule matches."""
    for rule in RULES:
        serial = _apply(rule, func, caps, threads=False)
        if serial is None:
            continue
        elements = _work(func)
        if isinstance(elements, int) and elements < _PARALLEL_ELEMENTS:
            return _wrap(func, serial.body)
        threaded = _apply(rule, func, caps, threads=True)
        if threaded is None:
            return _wrap(func, serial.body)
        if isinstance(elements, int):
            return _wrap(func, threaded.body)
        condition = elements >= tirx.IntImm("int64", _PARALLEL_ELEMENTS)
        return _wrap(func, tirx.IfThenElse(condition, threaded.body, serial.body))
    return func.with_attr(SCHEDULED, True)


def _is_scheduled(func: Any) -> bool:
    return bool(func.attrs and SCHEDULED in func.attrs and func.attrs[SCHEDULED])


def _apply(rule: Rule, func: Any, caps: Capabilities, threads: bool) -> Any | None:
    """The function lowered to plain loops after a rule, or None if the rule does not match."""
    try:
        sch = rule(func, caps, threads)
    except s_tir.ScheduleError:
        return None
    return None if sch is None else _lower(sch.mod["main"])


def _lower(func: Any) -> Any:
    """Blocks to loops, with intermediate buffers shrunk to what one row needs."""
    t = s_tir.transform
    passes = [
        t.LowerInitBlock(),
        t.PlanAndUpdateBufferAllocationLocation(),
        t.ConvertBlocksToOpaque(),
        t.CompactBufferAllocation(),
        t.LowerMatchBuffer(),
        t.LowerOpaqueBlock(),
        t.StmtSimplify(),
    ]
    return tvm.transform.Sequential(passes)(tvm.IRModule({"main": func}))["main"]


def _wrap(func: Any, body: Any) -> Any:
    """The function with another body, inside a root block; variables that occur in both branches are renamed."""
    root = s_tir.SBlock([], [], [], "root", body)
    out = func.with_body(s_tir.SBlockRealize([], tirx.IntImm("bool", 1), root))
    out = s_tir.transform.ConvertSSA()(tvm.IRModule({"main": out}))["main"]
    return out.with_attr(SCHEDULED, True)


def _work(func: Any) -> Any:
    """Elements of the largest argument: an int, or an expression of the symbolic dimensions."""
    best: Any = 0
    static, symbolic = 0, None
    for param in func.params:
        if not isinstance(param.ty, tirx.BufferType):
            continue
        size, variable = 1, None
        for extent in param.ty.shape:
            if isinstance(extent, tirx.IntImm):
                size *= int(extent)
            else:
                variable = extent if variable is None else variable * extent
        if variable is None:
            static = max(static, size)
        elif symbolic is None or size > best:
            best, symbolic = size, variable
    if symbolic is None:
        return static
    return symbolic * tirx.IntImm("int64", best)
