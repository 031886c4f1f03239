"""Matrix times quantized weight on the matrix units, for any number of rows.

A warp computes the 32 rows of a weight block times 8 or more rows of x. Codes go from global memory to registers and become
16-bit pairs there: no shared memory, no barrier in the loop. The weight is the first operand of an mma and x the second one:
the first takes four neighbouring registers, which unpacking fills as it likes, the second two, as a load brings them; the
other way round each mma would need four moves. And 8 rows of x are a tile, not 16.

An mma sums over 16 columns in any order, so thread q of the four that share a row takes 8 neighbouring columns of a unit
(16 bytes of x, one word of 4-bit codes) for two mmas; with groups of 16 columns it takes 4 for one. Warps of a block share
out the columns and add up at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

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

ROWS = 8  # of x in a tile
TILES = WARP_ROWS // 16  # of 16 rows of the weight
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
    """One launch over all of y; arguments as of launch."""
    launch(ops, caps, Block, tiles, warps)


def rows_of(tiles: int) -> int:
    """Rows of x of a block with so many tiles of 16; 0 = half a tile."""
    return max(ROWS, 16 * tiles)


def launch(
    ops: Operands,
    caps: Capabilities,
    kind: Callable[..., Tiles],
    tiles: int,
    warps: int,
    as_stored: bool = False,
) -> None:
    """One launch over all of y.

    Args:
        kind: what blocks of threads do.
        tiles: of 16 rows of x, per block; 0 = 8 rows.
        warps: of a block.
        as_stored: see ThreadCodes.
    """
    layout, size = ops.cfg.layout, rows_of(tiles)
    row_blocks = e.ceildiv(ops.t, size)
    with g.launch(row_blocks * layout.blocks, warps * g.WARP) as (number, thread):
        # once, not in every address: a division by what is known at run time only
        across = g.held(g.i32(row_blocks))
        block = g.held(e.i64(T.truncdiv(g.i32(number), across)))
        rows = Rows(g.held(e.i64(T.truncmod(g.i32(number), across)) * size), ops.t)
        codes = ThreadCodes(caps, layout, ops.packed, ops.size, as_stored)
        kind(ops, caps, codes, tiles, warps, thread).run(block, e.let(block * layout.block_bytes), rows)


class Tiles:
    """What blocks of threads do that multiply tiles in registers, whatever their operands are.

    Args:
        codes: unpacks the weight.
        tiles: of 16 rows of x; 0 = 8 rows.
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
        self.ops, self.caps, self.codes = ops, caps, codes
        self.tiles = rows_of(tiles) // ROWS
        self.warps, self.thread, self._stride = warps, thread, row_stride
        self.lane, self.warp = e.let(thread % g.WARP), e.let(thread // g.WARP)
        self.row, self.part = e.let(self.lane // 4), e.let(self.lane % 4)

    def chunk(self, total: list[Any], tokens: list[Any], base: Any, number: Any) -> None:
        """Add the products of chunk `number` of the block at `base` to the totals [tile of x][tile of the weight].

        Registers of a total: r of rows 8 (r / 2) + `self.row` of the weight and 2 `self.part` + r % 2 of x.

        Args:
            tokens: where the thread's row of each tile begins in x.
        """
        raise NotImplementedError

    def sums(self, dtype: str) -> list[Any]:
        """Zeros for [tile of x][tile of the weight]."""
        return [[zeros(dtype) for _ in range(TILES)] for _ in range(self.tiles)]

    def outputs(self, tile: int) -> list[Any]:
        """The thread's two rows of a tile of the weight, in the block."""
        return [e.let(self.row + (16 * tile + 8 * half)) for half in range(2)]

    def group_scales(self, column: Any) -> list[list[Any]]:
        """Of the two rows of x of each total, the scale at a column; None if there is one for the whole row."""
        if self.ops.groups == 1:
            return [[None, None]] * self.tiles
        return [[self.ops.group_scale(row, column) for row in pair] for pair in self._numbers]

    def run(self, block: Any, base: Any, rows: Rows) -> None:
        """Compute `rows` of the outputs of a block of the weight, which begins at `base`."""
        shape = (self.warps, ROWS * self.tiles, WARP_ROWS + _PAD)
        sums = g.shared(math.prod(shape), name="sums")
        self.codes.load_table(self.thread, self.warps * g.WARP)
        if self.codes.has_table:
            g.barrier()
        total = self.sums("float32")
        tokens = [e.let(rows.at(ROWS * i + self.row) * self._stride) for i in range(self.tiles)]
        if self.ops.groups > 1:
            self._numbers = [
                [g.held(g.i32(rows.at(ROWS * i + 2 * self.part + c))) for c in range(2)]
                for i in range(self.tiles)
            ]
        chunks = self.codes.padded_k // self.codes.chunk
        g.strided(self.warp, chunks, self.warps, lambda number: self.chunk(total, tokens, base, number))
        for i in range(self.tiles):
            for j in range(TILES):
                for r in range(4):
                    row = ROWS * i + 2 * self.part + r % 2
                    at = (self.warp * shape[1] + row) * shape[2] + self.outputs(j)[r // 2]
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
        part = self.sums("float32") if codes.scaled else total
        row_sums = [zeros("float32") for _ in range(self.tiles)] if codes.offsets else []
        shifts = [[codes.zero(place, row) for row in self.outputs(j)] for j in range(TILES)]
        first = e.let(half * self.depth + self.part * self.columns)
        steps = range(0, self.columns // 2, 2)  # pairs of columns that an mma takes of a thread
        with g.loop(codes.chunk // UNIT) as u:
            unit_at = codes.unit_at(place, u)
            x = [self._x(row, e.let(column + u * UNIT + first)) for row in tokens]
            words = [
                [codes.words(unit_at, first, self.columns, row) for row in self.outputs(j)]
                for j in range(TILES)
            ]
            for j in range(TILES):
                low, high = (
                    codes.pairs(of_row, self.columns, shift, self.dtype)
                    for of_row, shift in zip(words[j], shifts[j], strict=True)
                )
                for s in steps:
                    weights = [low[s], high[s], low[s + 1], high[s + 1]]
                    for i in range(self.tiles):
                        unit.mma(part[i][j], weights, x[i], s, self.dtype)
            for i, ones in enumerate(row_sums):
                for s in steps:
                    unit.mma(ones, [unit.ones(self.dtype)] * 4, x[i], s, self.dtype)
        if not codes.scaled:
            return
        factors = self.group_scales(column)
        for j in range(TILES):
            for h, row in enumerate(self.outputs(j)):
                scale, offset = codes.scale_of(place, row)
                for i in range(self.tiles):
                    for c in range(2):
                        r, factor = 2 * h + c, factors[i][c]
                        product = part[i][j][r] * scale
                        value = total[i][j][r] + (product if factor is None else product * factor)
                        if offset is not None:
                            value = value + row_sums[i][c] * offset
                        e.store(total[i][j], r, value, 1)

    def _x(self, base: Any, column: Any) -> Any:
        """Columns of a row of x as uint32 registers; zeros past the last column."""
        ops, count = self.ops, self.columns // 2
        registers = g.local(count, "uint32")

        def load() -> None:
            vector = e.let(e.load(ops.x_pairs, e.let((base + column) // 2), count))
            for i, value in enumerate(g.elements(vector, count)):
                e.store(registers, i, value, 1)

        if self.padded_k == self.k:
            load()
            return registers
        for i in range(count):
            e.store(registers, i, g.u32(0), 1)
        with g.when(column < self.k):
            load()
        return registers


def zeros(dtype: str) -> Any:
    """Four registers of a tile."""
    registers = g.local(4, dtype)
    for i in range(4):
        e.store(registers, i, tirx.const(0, dtype), 1)
    return registers
