"""Matrix times quantized weight on the matrix units, for any number of rows.

A warp computes 16 or more rows of x by the 32 rows of a weight block. Codes go from global memory to registers and become
16-bit pairs there: no shared memory, no barrier in the loop. An mma sums over 16 columns in any order, so thread q of the
four that share a row takes 8 neighbouring columns of a unit (16 bytes of x, one word of 4-bit codes) for two mmas; with
groups of 16 columns it takes 4 for one. Warps of a block share out the columns and add up at the end.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from llmc.caps import Capabilities, Fp8Mma
from llmc.quant.schemes import Code
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.qcodes import ThreadCodes, Weights
from llmc.schedules.gpu.qoperands import Operands
from llmc.schedules.gpu.rows import Rows
from llmc.schedules.qcodes import Place
from llmc.schedules.qlayout import UNIT, WARP_ROWS
from llmc.schedules.qlinear import QuantLinearConfig

TILES = WARP_ROWS // 8  # of 8 columns of y
_PAD = 1  # of a row of sums in shared memory


def takes(ops: Operands, caps: Capabilities) -> bool:
    """Whether the matrix units can do it: 16-bit x in the stored order, rows on multiples of 16 bytes, exact values.

    x that is rounded to e4m3 comes as bfloat16 where there is no better way; rounded rows are padded.
    """
    return fits(ops.cfg, caps)


def fits(cfg: QuantLinearConfig, caps: Capabilities) -> bool:
    """As takes, of what is computed."""
    has = {"bfloat16": caps.has_mma_bf16, "float16": caps.has_mma_f16}
    of = cfg.layout.of
    if of.order or of.activations is Code.INT or of.code is Code.NF4:
        return False
    if of.activations is Code.E4M3:
        return caps.fp8_mma is Fp8Mma.NONE and caps.has_mma_bf16
    return has.get(cfg.in_dtype, False) and cfg.layout.k % 8 == 0


def gemm(ops: Operands, caps: Capabilities, tiles: int, warps: int) -> None:
    """One launch over all of y.

    Args:
        tiles: of 16 rows of x, per block.
        warps: of a block.
    """
    row_blocks = e.ceildiv(ops.t, 16 * tiles)
    with g.launch(row_blocks * ops.cfg.layout.blocks, warps * g.WARP) as (number, thread):
        block = e.let(number // row_blocks)
        rows = Rows(e.let(number % row_blocks * (16 * tiles)), ops.t)
        codes = ThreadCodes(caps, ops.cfg.layout, ops.packed, ops.size)
        Block(ops, caps, codes, tiles, warps, thread).run(
            block, e.let(block * ops.cfg.layout.block_bytes), rows
        )


class Tiles:
    """What blocks of threads do that multiply 16 x 8 tiles in registers, whatever their operands are.

    Args:
        codes: unpacks the weight.
        tiles: of 16 rows of x.
        row_stride: from one row of x to the next, in what the subclass counts it in.
    """

    def __init__(
        self,
        ops: Operands,
        caps: Capabilities,
        codes: Weights,
        tiles: int,
        warps: int,
        thread: Any,
        row_stride: int,
    ) -> None:
        self.ops, self.caps, self.codes, self.tiles = ops, caps, codes, tiles
        self.warps, self.thread, self._stride = warps, thread, row_stride
        self.lane, self.warp = e.let(thread % g.WARP), e.let(thread // g.WARP)
        self.row, self.part = e.let(self.lane // 4), e.let(self.lane % 4)

    def chunk(self, total: list[Any], tokens: list[Any], base: Any, number: Any) -> None:
        """Add the products of chunk `number` of the block at `base` to the totals [tile of rows][tile of outputs].

        Args:
            tokens: where the thread's two rows of each tile begin in x.
        """
        raise NotImplementedError

    def group_scales(self, column: Any) -> list[list[Any]]:
        """Of the thread's two rows of each tile, the scale of x at a column; None if there is one for the whole row."""
        if self.ops.groups == 1:
            return [[None, None]] * self.tiles
        return [[self.ops.group_scale(row, column) for row in pair] for pair in self._numbers]

    def run(self, block: Any, base: Any, rows: Rows) -> None:
        """Compute `rows` of the outputs of a block of the weight, which begins at `base`."""
        shape = (self.warps, 16 * self.tiles, WARP_ROWS + _PAD)
        sums = g.shared(math.prod(shape), name="sums")
        self.codes.load_table(self.thread, self.warps * g.WARP)
        if self.codes.has_table:
            g.barrier()
        total = [[zeros("float32") for _ in range(TILES)] for _ in range(self.tiles)]
        numbers = [[rows.at(16 * i + 8 * h + self.row) for h in range(2)] for i in range(self.tiles)]
        tokens = [[e.let(number * self._stride) for number in pair] for pair in numbers]
        if self.ops.groups > 1:
            self._numbers = [[g.held(g.i32(number)) for number in pair] for pair in numbers]
        chunks = self.codes.padded_k // self.codes.chunk
        g.strided(self.warp, chunks, self.warps, lambda number: self.chunk(total, tokens, base, number))
        for i in range(self.tiles):
            for j in range(TILES):
                for r in range(4):
                    row = 16 * i + r // 2 * 8 + self.row
                    at = (self.warp * shape[1] + row) * shape[2] + 8 * j + 2 * self.part + r % 2
                    e.store(sums, at, total[i][j][r], 1)
        g.barrier()
        self.ops.store_sums(self.caps, sums, block, rows, shape, self.thread)


class Block(Tiles):
    """16-bit pairs of activations and weights."""

    def __init__(
        self, ops: Operands, caps: Capabilities, codes: Weights, tiles: int, warps: int, thread: Any
    ) -> None:
        super().__init__(ops, caps, codes, tiles, warps, thread, ops.columns)
        self.k, self.padded_k, self.dtype = ops.columns, codes.padded_k, ops.pairs_dtype
        # columns of a thread in a step, and what a step covers
        self.columns = 4 if codes.subgroups > 1 else 8
        self.depth = 4 * self.columns

    def chunk(self, total: list[Any], tokens: list[Any], base: Any, number: Any) -> None:
        place = self.codes.chunk_at(base, number)
        column = e.let(number * self.codes.chunk)
        for half in range(self.codes.subgroups):
            group = self.codes.group_at(place, half) if self.codes.subgroups > 1 else place
            self._group(total, tokens, group, column, half)

    def _group(self, total: list[Any], tokens: list[Any], place: Place, column: Any, half: int) -> None:
        """A group's part of a chunk: its products, scaled, onto the totals."""
        codes = self.codes
        part = (
            [[zeros("float32") for _ in range(TILES)] for _ in range(self.tiles)] if codes.scaled else total
        )
        row_sums = [zeros("float32") for _ in range(self.tiles)] if codes.offsets else []
        shifts = [codes.zero(place, e.let(self.row + 8 * j)) for j in range(TILES)]
        first = e.let(half * self.depth + self.part * self.columns)
        with g.loop(codes.chunk // UNIT) as u:
            unit_at = codes.unit_at(place, u)
            left = [self._x(rows, e.let(column + u * UNIT + first)) for rows in tokens]
            words = [codes.words(unit_at, first, self.columns, e.let(self.row + 8 * j)) for j in range(TILES)]
            for j in range(TILES):
                pairs = codes.pairs(words[j], self.columns, shifts[j], self.dtype)
                for i in range(self.tiles):
                    self._multiply(part[i][j], left[i], pairs)
            for i, ones in enumerate(row_sums):
                self._multiply(ones, left[i], [unit.ones(self.dtype)] * (self.columns // 2))
        if not codes.scaled:
            return
        factors = self.group_scales(column)
        for j in range(TILES):
            for c in range(2):
                row = e.let(8 * j + 2 * self.part + c)
                scale, offset = codes.scale_of(place, row)
                for i in range(self.tiles):
                    for r in (c, c + 2):
                        factor = factors[i][r // 2]
                        product = part[i][j][r] * scale
                        value = total[i][j][r] + (product if factor is None else product * factor)
                        if offset is not None:
                            value = value + row_sums[i][r] * offset
                        e.store(total[i][j], r, value, 1)

    def _x(self, rows: list[Any], column: Any) -> list[Any]:
        """Columns of two rows of x as uint32 registers [row][pair]; zeros past the last column."""
        ops, count = self.ops, self.columns // 2
        out = []
        whole = self.padded_k == self.k
        for base in rows:
            registers = g.local(count, "uint32")

            def load(base: Any = base, registers: Any = registers) -> None:
                vector = e.let(e.load(ops.x_pairs, e.let((base + column) // 2), count))
                for i, value in enumerate(g.elements(vector, count)):
                    e.store(registers, i, value, 1)

            if whole:
                load()
            else:
                for i in range(count):
                    e.store(registers, i, g.u32(0), 1)
                with g.when(column < self.k):
                    load()
            out.append(registers)
        return out

    def _multiply(self, acc: Any, left: list[Any], pairs: list[Any]) -> None:
        low, high = left
        for s in range(self.columns // 4):
            a = [low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]]
            unit.mma(acc, a, pairs, 2 * s, self.dtype)


def zeros(dtype: str) -> Any:
    """Four registers of a tile."""
    registers = g.local(4, dtype)
    for i in range(4):
        e.store(registers, i, tirx.const(0, dtype), 1)
    return registers
