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
_AHEAD = 16  # registers of the weight that a thread has asked for, and of x
_ANYWHERE = Place(0, 0, 0, 0, 0)  # symmetric codes have the same zero point everywhere


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

    A warp goes through its columns in turns: what a turn needs of the weight is asked for while the one before is multiplied,
    each register as soon as it is free, so that loads are on their way all the time.

    Args:
        codes: unpacks the weight.
        tiles: of 16 rows of x; 0 = 8 rows.
        x: rows of x as uint32, flat.
        row_words: from one row of x to the next.
        sums: type of the matrix units' sums.
    """

    sums = "float32"

    def __init__(
        self,
        ops: Operands,
        caps: Capabilities,
        codes: Weights,
        tiles: int,
        warps: int,
        thread: Any,
        x: Any,
        row_words: int,
        per_word: int,
    ) -> None:
        self.ops, self.caps, self.codes = ops, caps, codes
        self.tiles = rows_of(tiles) // ROWS
        self.warps, self.thread = warps, thread
        self.x, self._row_words, self._per_word = x, row_words, per_word
        self.lane, self.warp = e.let(thread % g.WARP), e.let(thread // g.WARP)
        self.row, self.part = e.let(self.lane // 4), e.let(self.lane % 4)
        # columns of a thread in a step, and what a step covers
        self.columns = 4 if codes.subgroups > 1 else 8
        self.depth = 4 * self.columns
        # first of the thread's rows of the weight
        self._four = e.let(e.i64(self.row) * 4)
        # steps of a turn; some of them share scales
        # beside many sums there are few registers for what is asked for ahead, and a step takes longer
        ahead = _AHEAD if self.tiles <= 2 else _AHEAD // 4
        fits = max(1, ahead // codes.registers(self.columns))
        whole = 1 if codes.subgroups > 1 else codes.chunk // UNIT
        self._shared = max(n for n in range(1, whole + 1) if whole % n == 0 and n <= max(fits, 1))
        self._groups = max(1, fits // self._shared)
        self._count = codes.padded_k // (self._shared * self.depth)
        self._groups = min(self._groups, self._count)

    # -- for subclasses ----------------------------------------------------------------------------------------------

    def multiply(self, part: list[Any], words: list[Any], x: list[Any], zeros: list[Any]) -> None:
        """Add the products of a step to sums [tile of x][tile of the weight].

        Registers of a sum: r of row 4 `self.row` + 2 tile + r / 2 of the weight and row 2 `self.part` + r % 2 of x.

        Args:
            words: of the thread's four rows of the weight, as Weights.words gives them.
            x: registers of the thread's row of each tile of x.
            zeros: zero points of the four rows, float32 or None.
        """
        raise NotImplementedError

    def product(self, part: Any, scale: Any) -> Any:
        """A sum, scaled, as float32."""
        return part * scale

    def row_sums(self) -> list[Any]:
        """Registers for sums of rows of x; `multiply` adds to them."""
        return []

    # -- everything else ---------------------------------------------------------------------------------------------

    def _zeros(self, dtype: str) -> list[Any]:
        return [[zeros(dtype) for _ in range(TILES)] for _ in range(self.tiles)]

    def run(self, block: Any, base: Any, rows: Rows) -> None:
        """Compute `rows` of the outputs of a block of the weight, which begins at `base`."""
        shape = (self.warps, ROWS * self.tiles, WARP_ROWS + _PAD)
        sums = g.shared(math.prod(shape), name="sums")
        self.codes.load_table(self.thread, self.warps * g.WARP)
        if self.codes.has_table:
            g.barrier()
        self.base = base
        self._tokens = [g.held(rows.at(ROWS * i + self.row)) for i in range(self.tiles)]
        if self.ops.groups > 1:
            self._numbers = [
                [g.held(g.i32(rows.at(ROWS * i + 2 * self.part + c))) for c in range(2)]
                for i in range(self.tiles)
            ]
        total = self._zeros("float32")
        self._sweep(total)
        for i in range(self.tiles):
            for j in range(TILES):
                for r in range(4):
                    row = ROWS * i + 2 * self.part + r % 2
                    at = (self.warp * shape[1] + row) * shape[2] + self._four + (2 * j + r // 2)
                    e.store(sums, at, total[i][j][r], 1)
        g.barrier()
        self.ops.store_sums(self.caps, sums, block, rows, shape, self.thread)

    def _sweep(self, total: list[Any]) -> None:
        codes, groups, each = self.codes, self._groups, self._shared
        steps = groups * each
        self._words = [g.local(codes.registers(self.columns), "uint32") for _ in range(steps)]
        self._x_held = [
            [g.local(self.columns // self._per_word, "uint32") for _ in range(self.tiles)]
            for _ in range(steps)
        ]
        self._scales = [g.local(max(1, codes.scale_registers), "uint32") for _ in range(groups)]
        early = steps * self.tiles * (self.columns // self._per_word) <= _AHEAD
        turns = -(-self._count // groups)

        def fetch(turn: Any, group: int, step: int) -> None:
            self._fetch_words(turn, group, step)
            if early:
                self._fetch_x(turn, group, step)

        first = g.held(T.min(e.i64(self.warp), e.i64(turns - 1)))
        for group in range(groups):
            self._fetch_scales(first, group)
            for step in range(each):
                fetch(first, group, step)

        def turn(number: Any) -> None:
            now = g.held(number)
            following = g.held(T.min(now + self.warps, e.i64(turns - 1)))
            for group in range(groups):
                part = self._zeros(self.sums) if codes.scaled else total
                self._row_sums = self.row_sums()
                scales = [codes.fetched_scale(self._scales[group], i) for i in range(4)]
                self._fetch_scales(following, group)
                for step in range(each):
                    slot = group * each + step
                    if not early:
                        self._fetch_x(now, group, step)
                    in_unit = self._columns(self._place(self._number(now, group))[1], step)[1]
                    words = [codes.fetched(self._words[slot], i, in_unit, self.columns) for i in range(4)]
                    self.multiply(part, words, self._x_held[slot], [zero for _, _, zero in scales])
                    fetch(following, group, step)
                if codes.scaled:
                    self._add(total, part, scales, now, group)

        g.strided(self.warp, turns, self.warps, turn)

    def _number(self, turn: Any, group: int) -> Any:
        """Which steps that share scales these are; behind the last ones those again."""
        number = turn * self._groups + group
        return e.let(number if self._count % self._groups == 0 else T.min(number, e.i64(self._count - 1)))

    def _place(self, number: Any) -> tuple[Place, Any]:
        """(place of such steps, their first column in its chunk)."""
        codes, column = self.codes, e.let(number * (self._shared * self.depth))
        place = codes.chunk_at(self.base, e.let(column // codes.chunk))
        inside = e.let(column % codes.chunk)
        if codes.subgroups > 1:
            place = codes.group_at(place, e.let(inside // self.depth))
        return place, inside

    def _columns(self, inside: Any, step: int) -> tuple[Any, Any]:
        """(number of the unit in its chunk, the thread's first column in the unit) of a step."""
        column = inside + step * self.depth
        return column // UNIT, column % UNIT + e.i64(self.part) * self.columns

    def _fetch_words(self, turn: Any, group: int, step: int) -> None:
        place, inside = self._place(self._number(turn, group))
        number, first = self._columns(inside, step)
        unit_at = self.codes.unit_at(place, number)
        self.codes.fetch(self._words[group * self._shared + step], unit_at, first, self.columns, self._four)

    def _fetch_scales(self, turn: Any, group: int) -> None:
        if self.codes.scaled:
            place, _ = self._place(self._number(turn, group))
            self.codes.fetch_scales(self._scales[group], place, self._four)

    def _fetch_x(self, turn: Any, group: int, step: int) -> None:
        """The thread's columns of its row of each tile; zeros past the last column."""
        columns, count = self._row_words * self._per_word, self.columns // self._per_word
        start = self._number(turn, group) * self._shared + step
        column = e.let(start * self.depth + e.i64(self.part) * self.columns)
        for registers, token in zip(self._x_held[group * self._shared + step], self._tokens, strict=True):
            at = token * self._row_words + column // self._per_word
            if self.codes.padded_k <= columns:
                g.load_words(registers, 0, self.x, at, count)
                continue
            for i in range(count):
                e.store(registers, i, g.u32(0), 1)
            with g.when(column < columns):
                g.load_words(registers, 0, self.x, at, count)

    def _factors(self, column: Any) -> list[list[Any]]:
        """Of the two rows of x of each sum, the scale at a column; None if there is one for the whole row."""
        if self.ops.groups == 1:
            return [[None, None]] * self.tiles
        return [[self.ops.group_scale(row, column) for row in pair] for pair in self._numbers]

    def _add(self, total: list[Any], part: list[Any], scales: list[Any], turn: Any, group: int) -> None:
        """Sums that share scales onto the totals."""
        number = e.let(turn * self._groups + group)
        factors = self._factors(e.let(self._number(turn, group) * (self._shared * self.depth)))

        def add() -> None:
            for j in range(TILES):
                for i in range(self.tiles):
                    for r in range(4):
                        row, c = 2 * j + r // 2, r % 2
                        scale, offset, _ = scales[row]
                        value = self.product(part[i][j][r], scale)
                        if factors[i][c] is not None:
                            value = value * factors[i][c]
                        if offset is not None:
                            value = value + self._row_sums[i][c] * offset
                        e.store(total[i][j], r, total[i][j][r] + value, 1)

        if self._count % self._groups == 0:
            add()
        else:
            with g.when(number < self._count):
                add()


class Block(Tiles):
    """16-bit pairs of activations and weights."""

    def __init__(
        self, ops: Operands, caps: Capabilities, codes: Weights, tiles: int, warps: int, thread: Any
    ) -> None:
        super().__init__(ops, caps, codes, tiles, warps, thread, ops.x_pairs, ops.columns // 2, 2)
        self.dtype = ops.pairs_dtype

    def row_sums(self) -> list[Any]:
        return [zeros("float32") for _ in range(self.tiles)] if self.codes.offsets else []

    def multiply(self, part: list[Any], words: list[Any], x: list[Any], zeros: list[Any]) -> None:
        pairs = []
        for of_row, zero in zip(words, zeros, strict=True):
            known = self.codes.zero(_ANYWHERE, 0) if zero is None else zero
            pairs.append(self.codes.pairs(of_row, self.columns, known, self.dtype))
        for s in range(0, self.columns // 2, 2):  # pairs of columns that an mma takes of a thread
            for j in range(TILES):
                low, high = pairs[2 * j : 2 * j + 2]
                for i in range(self.tiles):
                    unit.mma(part[i][j], [low[s], high[s], low[s + 1], high[s + 1]], x[i], s, self.dtype)
            for i, sums in enumerate(self._row_sums):
                unit.mma(sums, [unit.ones(self.dtype)] * 4, x[i], s, self.dtype)


def zeros(dtype: str) -> Any:
    """Four registers of a tile."""
    registers = g.local(4, dtype)
    for i in range(4):
        e.store(registers, i, tirx.const(0, dtype), 1)
    return registers
