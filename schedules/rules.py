"""Schedule rules for the PrimFuncs that Relax makes: elementwise kernels and reductions along rows.

A rule gives a schedule, or None: "not mine". Each is valid for all shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import s_tir, tirx

from llmc.caps import Capabilities

# (function, capabilities, whether the loop over rows runs on all threads) -> schedule
Rule = Callable[[Any, Capabilities, bool], "Any | None"]


def elementwise(func: Any, caps: Capabilities, threads: bool) -> Any | None:
    """Blocks without reductions: producers inlined, one loop over rows, the last axis in vectors.

    before: for i, j: a[i, j] = f(x);  for i, j: y[i, j] = g(a[i, j])
    after:  for row: for c: for lane in vectorized: y = g(f(x))
    """
    sch = s_tir.Schedule(func)
    if any(_is_reduction(sch, block) for block in _blocks(sch)):
        return None
    for block in _blocks(sch):
        _try_inline(sch, block)
    for block in _blocks(sch):
        loops = sch.get_loops(block)
        if not loops:
            continue
        if len(loops) == 1:
            _vectorize(sch, block, loops[0], caps)
            continue
        row = sch.fuse(*loops[:-1]) if len(loops) > 2 else loops[0]
        _vectorize(sch, block, sch.get_loops(block)[-1], caps)
        if threads:
            sch.parallel(row)
    return sch


def row_reduction(func: Any, caps: Capabilities, threads: bool) -> Any | None:
    """Norms, softmax and other reductions over the last axis: everything of a row in one loop over rows.

    before: for i, k: s[i] += x[i, k];  for i, j: y[i, j] = x[i, j] * rsqrt(s[i])
    after:  for row: (for k: for lane in vectorized: p[lane] += x;  s = sum(p));  for j in vectors: y = ...
    """
    sch = s_tir.Schedule(func)
    blocks = _blocks(sch)
    reductions = [b for b in blocks if _is_reduction(sch, b)]
    if not reductions or any(not _reduces_last(sch, b) for b in reductions):
        return None
    for block in blocks:
        if not _is_reduction(sch, block) and not _is_per_row(sch, block):
            _try_inline(sch, block)
    for block in _blocks(sch):
        if _is_reduction(sch, block):
            _reduce_in_lanes(sch, block, caps)
    blocks = _blocks(sch)
    spatial = min(len([k for k in _kinds(sch, b) if k == "S"]) for b in blocks)
    first = blocks[0]
    leading = _leading_rows(sch, first)
    if not leading or spatial == 0:
        return None
    row = sch.fuse(*leading) if len(leading) > 1 else leading[0]
    for block in blocks[1:]:
        sch.reverse_compute_at(block, row, preserve_unit_loops=True)
    if threads:
        sch.parallel(row)  # before the reductions lose their init, which the check of this step needs
    for block in blocks:
        loops = sch.get_loops(block)
        if _is_reduction(sch, block):
            inner = [lp for lp in loops if _reduces(sch, block, lp)]
            if inner:
                sch.decompose_reduction(block, inner[0])
        elif len(loops) > 1:
            _vectorize(sch, block, loops[-1], caps)
    return sch


RULES: tuple[Rule, ...] = (elementwise, row_reduction)


def _blocks(sch: Any) -> list[Any]:
    root = sch.get_sblock("root")
    return list(sch.get_child_blocks(root))


def _kinds(sch: Any, block: Any) -> str:
    """One letter per block axis: S(patial), R(eduction), O(ther)."""
    letters = {tirx.IterVar.DataPar: "S", tirx.IterVar.CommReduce: "R"}
    return "".join(letters.get(v.iter_type, "O") for v in sch.get(block).iter_vars)


def _is_reduction(sch: Any, block: Any) -> bool:
    return any(k != "S" for k in _kinds(sch, block))


def _extent(sch: Any, loop: Any) -> int | None:
    value = sch.get(loop).extent
    return int(value) if isinstance(value, tirx.IntImm) else None


def _reduces_last(sch: Any, block: Any) -> bool:
    """Spatial axes, then one reduction axis, whose loops are the block's in order; reads it contiguously."""
    kinds = _kinds(sch, block)
    if kinds.count("R") != 1 or not kinds.endswith("R") or "O" in kinds:
        return False
    if len(sch.get_loops(block)) != len(kinds):
        return False
    var = sch.get(block).iter_vars[-1].var
    for read in sch.get(block).reads:
        for axis, rng in enumerate(read.region):
            if axis < len(read.region) - 1 and _mentions(rng.min, var):
                return False
    return True


def _mentions(expr: Any, var: Any) -> bool:
    return any(v.same_as(var) for v in tirx.analysis.undefined_vars(expr))


def _is_per_row(sch: Any, block: Any) -> bool:
    """One value per row of a symbolic number of rows: cheap, and wasteful to repeat for every element of a row."""
    extents = [_extent(sch, loop) for loop in sch.get_loops(block)]
    if None not in extents:
        return False
    behind = extents[len(extents) - 1 - extents[::-1].index(None) + 1 :]
    size = 1
    for extent in behind:
        size *= extent or 1
    return size == 1


def _try_inline(sch: Any, block: Any) -> None:
    try:
        sch.compute_inline(block)
    except s_tir.ScheduleError:
        return  # an output, or read in a way that cannot be inverted


def _lanes(extent: int | None, most: int) -> int:
    """Largest power of two up to `most` that divides the extent."""
    if extent is None:
        return 1
    lanes = most
    while lanes > 1 and extent % lanes:
        lanes //= 2
    return lanes


def _vectorize(sch: Any, block: Any, loop: Any, caps: Capabilities) -> None:
    lanes = _lanes(_extent(sch, loop), caps.lanes_f32)
    for bound in _branch_points(sch.get(block)):
        lanes = _lanes(bound, lanes)
    if lanes >= 4:
        _, inner = sch.split(loop, [None, lanes])
        sch.vectorize(inner)


def _reduce_in_lanes(sch: Any, block: Any, caps: Capabilities) -> None:
    """Split a reduction into lanes that accumulate side by side, and the sum over lanes."""
    loops = sch.get_loops(block)
    lanes = _lanes(_extent(sch, loops[-1]), caps.lanes_f32)
    if lanes < 4:
        return
    _, lane = sch.split(loops[-1], [None, lanes])
    partial = sch.rfactor(lane, factor_axis=len(sch.get(block).writes[0].region))
    partial_loops = sch.get_loops(partial)
    sch.vectorize(partial_loops[-1])


def _leading_rows(sch: Any, block: Any) -> list[Any]:
    """The loops of a block that run over rows: the spatial ones, without the columns of an elementwise block."""
    loops = sch.get_loops(block)
    if _is_reduction(sch, block):
        reducing = [_reduces(sch, block, loop) for loop in loops]
        return list(loops[: reducing.index(True)])
    return list(loops[:-1])


def _reduces(sch: Any, block: Any, loop: Any) -> bool:
    """True if a reduction axis of the block depends on the loop."""
    var = sch.get(loop).loop_var
    return any(
        iv.iter_type == tirx.IterVar.CommReduce and _mentions(value, var)
        for iv, value in _bindings(sch, block)
    )


def _bindings(sch: Any, block: Any) -> list[tuple[Any, Any]]:
    get = tvm.get_global_func("s_tir.schedule.GetSBlockRealize")
    realize = get(sch, block)
    return list(zip(realize.block.iter_vars, realize.iter_values, strict=True))


def _branch_points(block: Any) -> list[int]:
    """Constants that conditions on the last axis of a block compare with: a vector must not straddle one."""
    last = block.iter_vars[-1].var
    found: list[int] = []

    def condition(node: Any) -> None:
        sides = [side for side in (getattr(node, "a", None), getattr(node, "b", None)) if side is not None]
        if len(sides) == 2 and any(_mentions(side, last) for side in sides):
            found.extend(int(side) for side in sides if isinstance(side, tirx.IntImm))

    def node(n: Any) -> None:
        if isinstance(n, tvm.ir.Call) and getattr(n.op, "name", "") == "tirx.if_then_else":
            visit(n.args[0], condition)
        elif isinstance(n, tirx.Select):
            visit(n.condition, condition)

    visit(block.body, node)
    return found


_CHILDREN = (
    "a",
    "b",
    "value",
    "condition",
    "true_value",
    "false_value",
    "body",
    "block",
    "then_case",
    "else_case",
)


def visit(node: Any, f: Callable[[Any], None]) -> None:
    """f on every expression below a statement or expression."""
    f(node)
    for name in _CHILDREN:
        child = getattr(node, name, None)
        if isinstance(child, (tirx.Expr, tirx.Stmt)):
            visit(child, f)
    for name in ("args", "indices", "seq"):
        for child in getattr(node, name, None) or ():
            if isinstance(child, (tirx.Expr, tirx.Stmt)):
                visit(child, f)
