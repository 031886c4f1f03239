"""Which kernel multiplies many rows: warps by themselves, or warpgroups where the machine has units for them."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules.gpu import gemm, warpgroup_gemm
from llmc.schedules.gpu.gemv import Operands

WARPGROUP_ROWS = 64  # up to so many rows, half of a warpgroup kernel's tile would be idle


def many_rows(ops: Operands, caps: Capabilities, tile: gemm.TileConfig, most: int = 0) -> None:
    """The launches for more rows than the smallest tile has, up to `most` (0 = any); `tile` without warpgroup units."""
    if not warpgroup_gemm.takes(ops.cfg, caps):
        gemm.gemm(ops, caps, tile)
        return
    if 0 < most <= WARPGROUP_ROWS:
        gemm.gemm(ops, caps, gemm.SOME_ROWS)
        return
    with T.If(ops.t <= WARPGROUP_ROWS):
        with T.Then():
            gemm.gemm(ops, caps, gemm.SOME_ROWS)
        with T.Else():
            _on_warpgroups(ops, caps)


def _on_warpgroups(ops: Operands, caps: Capabilities) -> None:
    """Wide tiles have more work per byte; narrow ones where there are too few wide ones to occupy every multiprocessor."""
    wide, narrow = warpgroup_gemm.WIDE, warpgroup_gemm.NARROW
    with T.If(warpgroup_gemm.tiles_of(ops, wide) >= caps.multiprocessors):
        with T.Then():
            warpgroup_gemm.gemm(ops, caps, wide)
        with T.Else():
            warpgroup_gemm.gemm(ops, caps, narrow)
