"""Matrix times packed weight for many rows, on matrix units that read both operands from shared memory.

Of the weight, 8 rows of a stage are 1024 consecutive bytes in memory as in the stage (schedules/layout.py): one bulk copy. For
everything else see warpgroup_block.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import bulk, warpgroup_block
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import warpgroup as wg
from llmc.schedules.gpu.gemv import ROWS, Operands
from llmc.schedules.gpu.warpgroup_block import (
    BLOCK_BYTES,
    CHUNKS,
    WARPS,
    Block,
    Place,
    Tiles,
    WarpgroupTile,
)

_CHUNK = 8  # elements in 16 bytes
_STEP = 2 * _CHUNK  # columns of one instruction

WIDE = WarpgroupTile(256, 4)
NARROW = WarpgroupTile(128, 6)


def takes(cfg: Any, caps: Capabilities) -> bool:
    """Whether this kernel can do it: 16-bit types, whole instructions of columns, rows of y on multiples of 16 bytes."""
    return (
        caps.has_wgmma
        and cfg.in_dtype == cfg.weight_dtype
        and cfg.in_dtype in ("bfloat16", "float16")
        and cfg.k % _STEP == 0
        and cfg.n % _CHUNK == 0
    )


def tiles_of(ops: Operands, tile: WarpgroupTile) -> Any:
    """Tiles of y."""
    return warpgroup_block.tiles_of(ops.t, ops.shape[0] * ROWS, tile)


def gemm(ops: Any, caps: Capabilities, tile: WarpgroupTile, experts: tuple[Any, int] | None = None) -> None:
    """One launch over all of y.

    Args:
        ops: gemv.Operands, or of several experts experts.DenseOperands.
        experts: as of warpgroup_block.launch.
    """
    outputs = ops.shape[0] * ROWS
    make = lambda thread, tiles: _Block(ops, caps, tile, thread, tiles)  # noqa: E731
    warpgroup_block.launch(ops.t, outputs, caps, tile, make, experts)


class _Block(Block):
    """16-bit weights, copied as they lie."""

    arrivals = 2 * WARPS

    def __init__(
        self, ops: Any, caps: Capabilities, tile: WarpgroupTile, thread: Any, tiles: Callable[[], Tiles]
    ) -> None:
        x = warpgroup_block.Rows(ops.x, ops.cfg.in_dtype, ops.cfg.k, ops.cfg.k)
        super().__init__(ops, caps, tile, thread, tiles, x, ROWS)

    def fetch_weight(self, stage: Any, step: Any, place: Place) -> None:
        """A thread for each block of 8 rows of the weight, as many in each warp: a warp begins its copies one by one."""
        ops, per_warp = self.ops, self.tile.columns // ROWS // WARPS
        chunks = ops.cfg.k // _CHUNK
        warp, lane = e.let(self.thread // g.WARP), e.let(self.thread % g.WARP)
        mine = e.let(place.column // ROWS + warp * per_warp)
        there = e.let(T.max(T.min(ops.shape[0] - mine, per_warp), 0))
        size = g.i32(BLOCK_BYTES)
        if chunks % CHUNKS:
            size = e.let(T.min(chunks - step * CHUNKS, CHUNKS) * wg.PIECE_BYTES)
        barrier = self.filled(stage)
        with g.when(lane == 0):
            bulk.expect(barrier, there * size)
        g.warp_barrier()
        with g.when(lane < there):
            line = e.i64(mine + lane)
            if place.expert is not None:
                line = line + place.expert * ops.shape[0]
            source = (line * ops.shape[1] + step * CHUNKS) * (ROWS * _CHUNK)
            to = self.w_at + stage * self.w_bytes + (warp * per_warp + lane) * BLOCK_BYTES
            bulk.copy(self.address(to), g.address(ops.w, e.let(source)), size, barrier)

    def begin(self) -> None:
        self._sums = g.local(wg.registers_of(self.tile.columns))

    def multiply_tile(self, number: Any, place: Place) -> Any:
        self.sum_stages(self._sums, number, self.steps, self.ops.cfg.k % self.depth // _STEP)
        return self._sums
