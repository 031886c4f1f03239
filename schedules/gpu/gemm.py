"""Matrix times packed weight on the matrix units: tiles in shared memory, copied ahead in several stages.

A block of threads computes rows x columns of y; a stage holds 32 columns of x and of the weight. x rows are 64 bytes there,
whose four pieces of 16 bytes are permuted so that ldmatrix meets no bank twice; the weight's 8 x 8 pieces are 128
consecutive bytes already (schedules/layout.py), and are the second operand of an mma as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.gemv import ROWS, Operands

_DEPTH = 32  # columns of x per stage
_CHUNK = 8  # elements in 16 bytes
_CHUNKS = _DEPTH // _CHUNK


@dataclass(frozen=True)
class TileConfig:
    """How a block's work is cut.

    Attributes:
        rows, columns: of y per block (columns of the weight's rows: gated ones give half as many of y).
        warp_rows, warp_columns: of a warp's part; multiples of 16.
        stages: copies in flight, and one that is read.
    """

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    stages: int

    def __post_init__(self) -> None:
        wrong = self.rows % self.warp_rows or self.columns % self.warp_columns
        if wrong or self.warp_rows % 16 or self.warp_columns % 16 or self.stages < 2:
            raise ValueError(f"not a tile: {self}")

    @property
    def threads(self) -> int:
        return self.rows // self.warp_rows * (self.columns // self.warp_columns) * g.WARP

    @property
    def shared_bytes(self) -> int:
        return 2 * self.stages * _DEPTH * (self.rows + self.columns)


FEW_ROWS = TileConfig(16, 64, 16, 16, 6)
SOME_ROWS = TileConfig(64, 64, 32, 32, 4)
MANY_ROWS = TileConfig(128, 128, 64, 32, 3)


def takes(cfg: Any, caps: Capabilities) -> bool:
    """Whether the matrix units take this matmul; rows of x must lie on multiples of 16 bytes."""
    has = {"bfloat16": caps.has_mma_bf16, "float16": caps.has_mma_f16}
    return has.get(cfg.in_dtype, False) and caps.has_async_copy and cfg.k % _CHUNK == 0


def gemm(ops: Operands, caps: Capabilities, tile: TileConfig) -> None:
    """One launch over all of y."""
    blocks = ops.shape[0]
    column_blocks = -(-blocks * ROWS // tile.columns)
    row_blocks = e.ceildiv(ops.t, tile.rows)
    with g.launch(row_blocks * column_blocks, tile.threads) as (number, thread):
        # neighbouring blocks read the same weights: they stay in the second-level cache
        first_row = e.let(number % row_blocks * tile.rows)
        first_block = e.let(number // row_blocks * (tile.columns // ROWS))
        Block(ops, caps, tile, first_row, first_block, thread).run()


class Block:
    """One block of threads.

    Args:
        ops: gemv.Operands, or of the same members.
        first_row, first_block: of x, and of the weight's blocks of rows.
    """

    def __init__(
        self,
        ops: Any,
        caps: Capabilities,
        tile: TileConfig,
        first_row: Any,
        first_block: Any,
        thread: Any,
    ) -> None:
        self.ops, self.caps, self.tile, self.thread = ops, caps, tile, thread
        self.first_row, self.first_block = first_row, first_block
        bits = "uint16" if ops.cfg.in_dtype == "bfloat16" else ops.cfg.in_dtype
        self.x = g.shared(tile.stages * tile.rows * _DEPTH, bits, "x_tile")
        self.w = g.shared(tile.stages * tile.columns * _DEPTH, bits, "w_tile")
        self.m_tiles, self.n_tiles = tile.warp_rows // 16, tile.warp_columns // ROWS
        warps_across = tile.columns // tile.warp_columns
        warp = e.let(thread // g.WARP)
        self.lane = e.let(thread % g.WARP)
        self.warp_row = e.let(warp // warps_across * tile.warp_rows)
        self.warp_block = e.let(warp % warps_across * self.n_tiles)
        self.acc = [[g.local(4) for _ in range(self.n_tiles)] for _ in range(self.m_tiles)]

    def run(self) -> None:
        tile = self.tile
        for row in self.acc:
            for registers in row:
                for i in range(4):
                    e.store(registers, i, e.f32(0.0), 1)
        steps = -(-self.ops.shape[1] // _CHUNKS)
        for stage in range(tile.stages - 1):
            self._copy(g.i32(stage), stage)
            unit.commit()
        with g.loop(steps) as step:
            unit.wait(tile.stages - 2)
            # the stage has arrived for everybody, and everybody is done with the one that is overwritten next
            g.barrier()
            ahead = e.let(step + (tile.stages - 1))
            self._copy(ahead, e.let(ahead % tile.stages))
            unit.commit()
            self._multiply(e.let(step % tile.stages))
        self._store()

    # -- global to shared --------------------------------------------------------------------------------------------

    def _copy(self, step: Any, slot: Any) -> None:
        """Begin to copy columns [32 step, 32 step + 32) to a stage; zeros where there are none."""
        ops, tile = self.ops, self.tile
        blocks, chunks, _, _ = ops.shape
        k = ops.cfg.k

        def x_piece(i: Any) -> None:
            row, chunk = e.let(i // _CHUNKS), e.let(i % _CHUNKS)
            column = e.let(step * _CHUNKS + chunk)
            valid = T.And(column < k // _CHUNK, self.first_row + row < ops.t)
            token, piece = T.min(self.first_row + row, ops.t - 1), T.min(column, k // _CHUNK - 1)
            to = self._x_at(slot, row, chunk)
            unit.copy16(self.x, to, ops.x, e.let(ops.x_at(token) + piece * _CHUNK), valid)

        def w_piece(i: Any) -> None:
            block, chunk, row = e.let(i // (_CHUNKS * ROWS)), e.let(i // ROWS % _CHUNKS), e.let(i % ROWS)
            column, number = e.let(step * _CHUNKS + chunk), e.let(self.first_block + block)
            valid = T.And(column < chunks, number < blocks)
            where = T.min(number, e.i64(blocks - 1)) * chunks + T.min(column, chunks - 1)
            to = e.let(slot * (tile.columns * _DEPTH) + i * _CHUNK)
            unit.copy16(self.w, to, ops.w, e.let((where * ROWS + row) * _CHUNK + ops.w_first), valid)

        self._share(tile.rows * _CHUNKS, x_piece)
        self._share(tile.columns * _CHUNKS, w_piece)

    def _share(self, count: int, body: Any) -> None:
        """body(i) for i < count, by all threads, unrolled."""
        threads = self.tile.threads
        for turn in range(-(-count // threads)):
            i = e.let(self.thread + turn * threads)
            if (turn + 1) * threads <= count:
                body(i)
            else:
                with g.when(i < count):
                    body(i)

    def _x_at(self, slot: Any, row: Any, chunk: Any) -> Any:
        """Element of a stage at which 16 bytes of a row of x lie: two rows fill the banks once."""
        permuted = T.bitwise_xor(chunk, row // 2 % _CHUNKS)
        return e.let(slot * (self.tile.rows * _DEPTH) + row * _DEPTH + permuted * _CHUNK)

    # -- shared to registers -----------------------------------------------------------------------------------------

    def _multiply(self, slot: Any) -> None:
        """One stage: two mma steps of 16 columns."""
        dtype = self.ops.cfg.in_dtype
        for half in range(_DEPTH // 16):
            left = [g.local(4, "uint32") for _ in range(self.m_tiles)]
            for i, registers in enumerate(left):
                row = e.let(self.warp_row + i * 16 + self.lane % 16)
                at = self._x_at(slot, row, self.lane // 16 + 2 * half)
                unit.load_x4(registers, self.x, at)
            right = [g.local(4, "uint32") for _ in range(self.n_tiles // 2)]
            for j, registers in enumerate(right):
                # matrices: columns 0..7 and 8..15 of this half for one block of the weight, then for the next
                block = e.let(self.warp_block + 2 * j + self.lane // 16)
                chunk = e.let(self.lane // 8 % 2 + 2 * half)
                piece = e.let((block * _CHUNKS + chunk) * ROWS + self.lane % 8)
                at = e.let(slot * (self.tile.columns * _DEPTH) + piece * _CHUNK)
                unit.load_x4(registers, self.w, at)
            for i, row in enumerate(self.acc):
                for j, registers in enumerate(row):
                    unit.mma(registers, left[i], right[j // 2], 2 * (j % 2), dtype)

    # -- results -----------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        """Thread l holds columns 2 (l % 4) and the next of rows l / 4 and l / 4 + 8 of each 16 x 8 piece."""
        cfg = self.ops.cfg
        for i, pieces in enumerate(self.acc):
            for j, registers in enumerate(pieces):
                block = e.let(self.first_block + self.warp_block + j)
                for part in range(4):
                    row = e.let(self.first_row + self.warp_row + (i * 16 + part // 2 * 8) + self.lane // 4)
                    inside = e.let(self.lane % 4 * 2 + part % 2)
                    if not cfg.gated:
                        self.ops.store(self.caps, [registers[part]], e.let(block * ROWS + inside), row)
                        continue
                    # gates are columns 0..3 of a block, what they multiply 4..7: two threads away
                    other = e.let(g.across(registers[part], 2))
                    sums = [registers[part], other]
                    if cfg.gate_second:
                        sums.reverse()
                    with g.when(inside < ROWS // 2):
                        self.ops.store(self.caps, sums, e.let(block * (ROWS // 2) + inside), row)
