"""A schedule for every PrimFunc that is not a hand-written kernel, on a machine with threads."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

from llmc.schedules import rules

_THREADS = 256
_SCHEDULED = "tirx.is_scheduled"


def schedule_module(module: Any) -> Any:
    """Bind the loops of every unscheduled function to blocks and threads."""
    out = tvm.IRModule(dict(module.functions.items()), attrs=module.attrs)
    for gvar, func in module.functions.items():
        if isinstance(func, tirx.PrimFunc) and not (func.attrs and func.attrs.get(_SCHEDULED)):
            done = func if _launches(func) else schedule(func)
            out.update_func(gvar, done.with_attr(_SCHEDULED, True))
    return out


def _launches(func: Any) -> bool:
    """Whether the function binds threads itself, as TVM's own scatter does."""
    found: list[Any] = []

    def look(node: Any) -> None:
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            found.append(node)

    rules.visit(func.body, look)
    return bool(found)


def schedule(func: Any) -> Any:
    """Elementwise producers inlined; the axes that are not reduced shared among threads, reductions in one thread each.

    before: for i, j: a[i, j] = f(x);  for i, k: s[i] += a[i, k]
    after:  for block: for thread: for k: s[i] += f(x)

    Right for any shape, and fast enough for what is left beside the kernels of this folder. A result that several blocks
    need is computed by a launch of its own.
    """
    sch = s_tir.Schedule(func)
    for block in rules._blocks(sch):
        if not rules._is_reduction(sch, block):
            rules._try_inline(sch, block)
    for block in rules._blocks(sch):
        loops = sch.get_loops(block)
        if any(rules._extent(sch, loop) == 0 for loop in loops):
            continue  # nothing to compute
        loops = [sch.add_unit_loop(block)] if not loops else list(loops)
        reduced = [loop for loop in loops if rules._reduces(sch, block, loop)]
        free = [loop for loop in loops if not any(loop.same_as(r) for r in reduced)]
        if not free:
            free = [sch.add_unit_loop(loops[0])]
        if reduced:
            sch.reorder(*free, *reduced)
        one = sch.fuse(*free) if len(free) > 1 else free[0]
        across, thread = sch.split(one, [None, _THREADS])
        sch.bind(across, "blockIdx.x")
        sch.bind(thread, "threadIdx.x")
    return sch.mod["main"]
