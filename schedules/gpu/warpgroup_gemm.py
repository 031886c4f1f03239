"""Matrix times packed weight for many rows, on matrix units that read both operands from shared memory.

A block of threads is one warpgroup that fetches and two that multiply (64 rows each); between them are a few stages, each
64 columns of x and of the weight, and two barriers per stage: it is filled, it is free. A block works through many tiles of y,
and the next tile is fetched while the sums of the last one are stored.

Of the weight, 8 rows of a stage are 1024 consecutive bytes in memory as in the stage (schedules/layout.py): one bulk copy. x
lies in rows; threads copy 16 bytes each to where the same layout wants them, which needs no description of the tensor on the
host, drops rows past the last one, and is one instruction of a warp per 512 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import bulk
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu import warpgroup as wg
from llmc.schedules.gpu.fragment_store import FragmentStore
from llmc.schedules.gpu.gemv import ROWS, Operands

_DEPTH = 64  # columns of a stage
_CHUNK = 8  # elements in 16 bytes
_CHUNKS = _DEPTH // _CHUNK
_STEP = 16  # columns of one instruction
_BLOCK_BYTES = _CHUNKS * wg.PIECE_BYTES  # of 8 rows in a stage
_WARPS = wg.WARPGROUP // g.WARP
_BEHIND = 2  # stages of x that are on their way when the one before them is announced
_GROUP = 16  # tiles that lie below each other and are computed one after the other, before the next columns


@dataclass(frozen=True)
class WarpgroupTile:
    """How y is cut.

    Attributes:
        columns: of the weight's rows, per block; 64 rows of x for each warpgroup that multiplies.
        stages: of 64 columns.
        warpgroups: that multiply.
        fetch_registers, multiply_registers: of a thread, by its part; multiples of 8.
    """

    columns: int
    stages: int
    warpgroups: int = 2
    fetch_registers: int = 40
    multiply_registers: int = 232

    def __post_init__(self) -> None:
        per_thread = self.fetch_registers + self.warpgroups * self.multiply_registers
        # a stage is free when the next one is being multiplied, and filled when _BEHIND more are on their way
        if self.columns % 64 or not 64 <= self.columns <= 256 or self.stages < _BEHIND + 2:
            raise ValueError(f"not a tile: {self}")
        if per_thread * wg.WARPGROUP > 65536:
            raise ValueError(f"a multiprocessor has 65536 registers: {self}")

    @property
    def rows(self) -> int:
        return wg.ROWS * self.warpgroups

    @property
    def threads(self) -> int:
        return wg.WARPGROUP * (self.warpgroups + 1)

    @property
    def stage_bytes(self) -> int:
        return (self.rows + self.columns) * 2 * _DEPTH

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.stage_bytes + 2 * bulk.BARRIER_BYTES)


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
    return e.ceildiv(ops.t, tile.rows) * -(-ops.shape[0] * ROWS // tile.columns)


def gemm(ops: Operands, caps: Capabilities, tile: WarpgroupTile) -> None:
    """One launch over all of y."""
    tiles = tiles_of(ops, tile)
    blocks = T.min(tiles, e.i64(caps.multiprocessors))
    with g.launch(blocks, tile.threads) as (number, thread), g.at_most_one_block():
        _Block(ops, caps, tile, thread, lambda: Tiles(ops, tile, number, blocks)).run()


class Tiles:
    """Which tiles a block computes, in order: `blocks` apart, neighbours of few columns and a group of rows.

    Blocks that run at the same time then share x and the weight in the second-level cache.
    """

    def __init__(self, ops: Operands, tile: WarpgroupTile, number: Any, blocks: Any) -> None:
        self._tile = tile
        self._number, self._blocks = g.i32(number), g.i32(blocks)
        self._down = _kept(g.i32(e.ceildiv(ops.t, tile.rows)))
        self._across = -(-ops.shape[0] * ROWS // tile.columns)
        total = self._down * self._across
        self.count = _kept(tirx.truncdiv(total - self._number + self._blocks - 1, self._blocks))

    def at(self, turn: Any) -> tuple[Any, Any]:
        """(first row of x, first block of 8 rows of the weight) of the block's tile `turn`, int32."""
        index = _kept(self._number + turn * self._blocks)
        per_group = g.i32(_GROUP * self._across)
        first = _kept(tirx.truncdiv(index, per_group) * _GROUP)
        inside = _kept(tirx.truncmod(index, per_group))
        height = _kept(T.min(self._down - first, g.i32(_GROUP)))
        row = _kept((first + tirx.truncmod(inside, height)) * self._tile.rows)
        return row, _kept(tirx.truncdiv(inside, height) * (self._tile.columns // ROWS))


def _kept(value: Any) -> Any:
    """An int32 in a register: TVM writes what a name stands for in its place, and a long expression again and again."""
    register = g.local(1, "int32")
    e.store(register, 0, value, 1)
    return register[0]


class _Block:
    """One block of threads."""

    def __init__(
        self, ops: Operands, caps: Capabilities, tile: WarpgroupTile, thread: Any, tiles: Callable[[], Tiles]
    ) -> None:
        self.ops, self.caps, self.tile, self.thread = ops, caps, tile, thread
        self.tiles_of_part = tiles  # each part of the block counts for itself: fewer registers
        self.chunks = ops.cfg.k // _CHUNK
        self.steps = -(-ops.cfg.k // _DEPTH)
        self.elements = g.arena(tile.shared_bytes)
        self.x_bytes = tile.rows * 2 * _DEPTH  # of a stage
        self.w_bytes = tile.columns * 2 * _DEPTH
        self.w_at = tile.stages * self.x_bytes
        self.barriers_at = tile.stages * tile.stage_bytes

    def run(self) -> None:
        tile = self.tile
        with g.when(self.thread == 0):
            for stage in range(tile.stages):
                # filled: each warp that fetches, with x and with the weight; free: the warps that multiply
                bulk.init(self._filled(stage), 2 * _WARPS)
                bulk.init(self._free(stage), tile.warpgroups * _WARPS)
            bulk.async_fence()
        g.barrier()
        with T.If(self.thread < wg.WARPGROUP):
            with T.Then():
                bulk.set_registers(tile.fetch_registers, more=False)
                self._fetch()
            with T.Else():
                bulk.set_registers(tile.multiply_registers, more=True)
                self._multiply()

    def _filled(self, stage: Any) -> Any:
        return self._address(self.barriers_at + stage * bulk.BARRIER_BYTES)

    def _free(self, stage: Any) -> Any:
        return self._address(self.barriers_at + (self.tile.stages + stage) * bulk.BARRIER_BYTES)

    def _address(self, byte: Any) -> Any:
        """Of a byte of the shared memory, a multiple of 2."""
        return g.address(self.elements, byte // 2)

    # -- the warpgroup that fetches ----------------------------------------------------------------------------------

    def _fetch(self) -> None:
        tiles = self.tiles_of_part()
        with g.loop(tiles.count) as turn:
            row, block = tiles.at(turn)
            rows = self._x_rows(row)
            with g.loop(self.steps) as step:
                number = e.let(turn * self.steps + step)
                stage = _kept(number % self.tile.stages)
                bulk.wait(self._free(stage), 1 - number // self.tile.stages % 2)
                self._fetch_weight(stage, step, block)
                self._fetch_x(stage, step, rows)
                unit.commit()
                unit.wait(_BEHIND)
                with g.when(number >= _BEHIND):
                    self._announce(number - _BEHIND)
        for left in reversed(range(_BEHIND)):
            unit.wait(left)
            number = e.let(tiles.count * self.steps - (left + 1))
            with g.when(number >= 0):
                self._announce(number)

    def _x_rows(self, first: Any) -> list[tuple[Any, Any]]:
        """(where its row begins in x, bytes to copy of it) of each piece that the thread copies of a stage.

        Neighbouring threads take 8 neighbouring rows of a chunk: their 16 bytes are one piece of 128 in the stage.
        """
        found = []
        t = self.thread
        for turn in range(self.tile.rows * _CHUNKS // wg.WARPGROUP):
            row = e.let(first + (turn * 2 + t // 64) * ROWS + t % ROWS)
            last = T.min(e.i64(row), self.ops.t - 1)
            found.append((e.let(last * self.ops.cfg.k), e.let(e.i64(row) < self.ops.t)))
        return found

    def _fetch_x(self, stage: Any, step: Any, rows: list[tuple[Any, Any]]) -> None:
        column = e.let(step * _CHUNKS + self.thread // ROWS % _CHUNKS)

        def copies() -> None:
            for turn, (start, there) in enumerate(rows):
                to = e.let(stage * (self.x_bytes // 2) + (turn * wg.WARPGROUP + self.thread) * _CHUNK)
                unit.copy16(self.elements, to, self.ops.x, e.let(start + column * _CHUNK), there)

        if self.chunks % _CHUNKS == 0:
            copies()
        else:  # columns behind the last one are not multiplied
            with g.when(column < self.chunks):
                copies()

    def _fetch_weight(self, stage: Any, step: Any, first: Any) -> None:
        """A thread for each block of 8 rows of the weight, as many in each warp: a warp begins its copies one by one."""
        ops, per_warp = self.ops, self.tile.columns // ROWS // _WARPS
        warp, lane = e.let(self.thread // g.WARP), e.let(self.thread % g.WARP)
        mine = e.let(first + warp * per_warp)
        there = e.let(T.max(T.min(ops.shape[0] - mine, per_warp), 0))
        chunks = g.i32(_CHUNKS)
        if self.chunks % _CHUNKS:
            chunks = e.let(T.min(self.chunks - step * _CHUNKS, chunks))
        size = e.let(chunks * wg.PIECE_BYTES)
        barrier = self._filled(stage)
        with g.when(lane == 0):
            bulk.expect(barrier, there * size)
        g.warp_barrier()
        with g.when(lane < there):
            source = (e.i64(mine + lane) * ops.shape[1] + step * _CHUNKS) * (ROWS * _CHUNK)
            to = self.w_at + stage * self.w_bytes + (warp * per_warp + lane) * _BLOCK_BYTES
            bulk.copy(self._address(to), g.address(ops.w, e.let(source)), size, barrier)

    def _announce(self, number: Any) -> None:
        """The thread's part of x of stage `number` has arrived: one arrival per warp."""
        bulk.async_fence()
        g.warp_barrier()
        with g.when(self.thread % g.WARP == 0):
            bulk.arrive(self._filled(_kept(number % self.tile.stages)))

    # -- warpgroups that multiply ------------------------------------------------------------------------------------

    def _multiply(self) -> None:
        tile, dtype = self.tile, self.ops.cfg.in_dtype
        inside = e.let(self.thread - wg.WARPGROUP)
        # the same in all threads of a warp, and known to be: descriptors are kept once per warp
        group = e.let(g.from_first(inside // wg.WARPGROUP))
        sums = g.local(wg.registers_of(tile.columns))
        first = e.let(group * (wg.ROWS // ROWS * _BLOCK_BYTES))
        left = e.let(wg.descriptor(self._address(first), wg.PIECE_BYTES, _BLOCK_BYTES))
        right = e.let(wg.descriptor(self._address(self.w_at), wg.PIECE_BYTES, _BLOCK_BYTES))

        def products(number: Any, step: Any, count: int) -> None:
            stage = _kept(number % tile.stages)
            bulk.wait(self._filled(stage), number // tile.stages % 2)
            a = e.let(left + tirx.Cast("uint64", stage * (self.x_bytes // wg.UNIT)))
            b = e.let(right + tirx.Cast("uint64", stage * (self.w_bytes // wg.UNIT)))
            wg.fence()
            for part in range(count):
                ahead = tirx.IntImm("uint64", part * 2 * wg.PIECE_BYTES // wg.UNIT)
                add = g.i32(1) if part else tirx.Cast("int32", step > 0)
                wg.mma(sums, a + ahead, b + ahead, add, tile.columns, dtype)
            wg.commit()

        tiles = self.tiles_of_part()
        with g.loop(tiles.count) as turn:
            row, block = tiles.at(turn)
            tail = self.ops.cfg.k % _DEPTH // _STEP
            with g.loop(self.steps - (tail > 0)) as step:
                number = e.let(turn * self.steps + step)
                products(number, step, _DEPTH // _STEP)
                wg.wait(1)
                with g.when(step > 0):
                    self._release(number - 1)
            last = e.let(turn * self.steps + (self.steps - 1))
            if tail:
                products(last, g.i32(self.steps - 1), tail)
            wg.wait_for(sums, tile.columns, dtype)
            if tail and self.steps > 1:
                self._release(last - 1)
            self._release(last)
            FragmentStore(self.ops, self.caps, sums, inside % g.WARP).store(
                e.i64(row + group * wg.ROWS + inside % wg.WARPGROUP // g.WARP * 16),
                e.i64(block),
                tile.columns // ROWS,
            )

    def _release(self, number: Any) -> None:
        """The warp has multiplied stage `number`."""
        with g.when(self.thread % g.WARP == 0):
            bulk.arrive(self._free(_kept(number % self.tile.stages)))
