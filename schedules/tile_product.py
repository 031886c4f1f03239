"""Rows times one block of a packed weight on tile registers: the loops that kernels of all dtypes share.

A block of the packed layouts is, for every 32-bit step of columns, a row of lanes with one output each; sixteen steps of sixteen
lanes are a right operand as it is, at a stride of one row of lanes. Rows of activations are packed into left operands
first (`Rows`), because their own stride, often a power of two, would put all sixteen into one set of the cache.
Sums stay in memory between passes over columns, tile by tile without gaps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.tiles import ELEMENTS, ROW_BYTES, ROWS, TileDot, Tiles

PAIR = 2 * ROWS  # rows that share the loads of a right operand
_SUMS = 4  # tiles of sums at a time
LEFT, RIGHT = (4, 5), (6, 7)
# a single tile of rows: more right operands, in turns
NARROW_LEFT, NARROW_RIGHT = (4,), (5, 6, 7)


@dataclass(frozen=True)
class TileSchedule:
    """How a kernel goes through its tiles.

    Attributes:
        rows: rows of one task.
        columns: columns of a pass, whose right operands stay in the first-level cache.
        blocks: weight blocks of one task, which take turns in every pass: its rows come from the second-level cache for
            all but the first; 0 = 4 where the rows do not stay in that cache for a whole product, else 1.
        unroll: steps of columns per turn of the inner loop.
        prefetch: ask for the weights of the next pass during this one.
        wide: all outputs of a block for two tiles of rows, then the next rows; else all rows for 32 outputs, then the next
            outputs.
    """

    rows: int
    columns: int
    blocks: int = 0
    unroll: int = 2
    prefetch: bool = True
    wide: bool = False


class Rows:
    """Where rows of activations lie as left operands: pair by pair of tiles, step by step of 64 bytes.

    Args:
        row_bytes: of the columns of a row, padded to whole steps of 64.
        item: bytes of an element.
    """

    def __init__(self, row_bytes: int, item: int) -> None:
        self.steps, self.item = row_bytes // ROW_BYTES, item
        self.tile = ROWS * ROW_BYTES // item  # elements
        self.per_step = ROW_BYTES // item

    def size(self, rows: Any) -> Any:
        """Elements that `rows` rows take."""
        return (rows + (PAIR - 1)) // PAIR * (2 * self.tile * self.steps)

    def place(self, row: Any, column: Any) -> Any:
        """The element of (row, column)."""
        step = column // self.per_step
        tile = (row // PAIR * self.steps + step) * 2 + row % PAIR // ROWS
        return tile * self.tile + row % ROWS * self.per_step + column % self.per_step

    def tile_at(self, pair: Any, step: Any, which: int) -> Any:
        """The first element of a tile: pair of tiles, step, and which of both."""
        return ((pair * self.steps + step) * 2 + which) * self.tile


@dataclass(frozen=True)
class RightOperands:
    """Steps of a weight block, as right operands; each has as many columns as a left operand.

    Attributes:
        buffer: flat, of 32-bit elements.
        base: the element of the first lane of the first row.
        first: number of the first step in the rows of activations.
        steps: how many.
    """

    buffer: Any
    base: Any
    first: Any
    steps: Any


class TileProduct:
    """Sums of up to `most` rows by one block of n_block outputs.

    Args:
        kind: of the products.
        most: rows of a task; up to 16 of them take one tile of rows by four of outputs, more two by two.
        left: activations as left operands, flat; laid out by `rows`.
        inner: bytes of a row of a left operand in one product: 64, or 32 where sums end earlier.
    """

    def __init__(
        self,
        caps: Capabilities,
        schedule: TileSchedule,
        kind: TileDot,
        n_block: int,
        most: int,
        rows: Rows,
        left: Any,
        inner: int = ROW_BYTES,
    ) -> None:
        self.caps, self.schedule, self.kind = caps, schedule, kind
        self.n_block, self.vectors = n_block, n_block // ROWS
        self.rows, self.left, self.inner = rows, left, inner
        self.most = most
        # columns of tiles that are computed together: (first, how many)
        self.narrow = most <= ROWS
        self.heights = 1 if self.narrow else 2
        self.each = _SUMS if self.narrow else _SUMS // 2
        self.parts = [(v, min(self.each, self.vectors - v)) for v in range(0, self.vectors, self.each)]
        self.left_tiles: tuple[int, ...] = NARROW_LEFT if self.narrow else LEFT
        self.right_tiles: tuple[int, ...] = NARROW_RIGHT if self.narrow else RIGHT

    def tiles(self) -> Tiles:
        """The unit, configured for this product."""
        return Tiles(self.caps, self.left_tiles, self.right_tiles, self.inner)

    @property
    def dtype(self) -> str:
        return "float32" if self.kind is TileDot.BF16 else "int32"

    @property
    def size(self) -> int:
        """Elements of all sums."""
        pairs = -(-self.most // PAIR)
        return pairs * len(self.parts) * _SUMS * ELEMENTS

    @property
    def part_size(self) -> int:
        """Elements of the sums of a pair of row tiles and a part of the block."""
        return _SUMS * ELEMENTS

    def part_at(self, pair: Any, part: int) -> Any:
        """The element where the sums of a pair of row tiles and a part of the block begin."""
        return (pair * len(self.parts) + part) * (_SUMS * ELEMENTS)

    def vector_at(self, row: Any, v: int) -> Any:
        """The element of the first of sixteen sums: row of the task, vector of outputs."""
        part, column = divmod(v, self.each)
        width = self.parts[part][1]
        tile = column if self.narrow else row % PAIR // ROWS * width + column
        return self.part_at(row // PAIR, part) + tile * ELEMENTS + row % ROWS * ROWS

    def accumulate(
        self,
        tiles: Tiles,
        sums: Any,
        at: Any,
        pair: Any,
        part: int,
        right: RightOperands,
        fresh: Any,
        ahead: Callable[[Any], None] | None = None,
    ) -> None:
        """The sums from element `at` on += a pair of row tiles times `right`.

        Args:
            pair: number of the pair in all activations.
            part: of the block.
            fresh: the sums are nothing so far: True, False, or an expression.
            ahead: emits what shall be asked for in step k.
        """
        numbers = [
            [r * self.parts[part][1] + c for c in range(self.parts[part][1])] for r in range(self.heights)
        ]
        flat = [number for row in numbers for number in row]

        def zero() -> None:
            for number in flat:
                tiles.zero(number)

        def load() -> None:
            for number in flat:
                tiles.load(number, sums, at + number * ELEMENTS, ROW_BYTES)

        if isinstance(fresh, bool):
            (zero if fresh else load)()
        else:
            with T.If(fresh):
                with T.Then():
                    zero()
                with T.Else():
                    load()
        self._steps(tiles, numbers, pair, part, right, ahead)
        for number in flat:
            tiles.store(number, sums, at + number * ELEMENTS)

    def _steps(
        self,
        tiles: Tiles,
        numbers: list[list[int]],
        pair: Any,
        part: int,
        right: RightOperands,
        ahead: Callable[[Any], None] | None,
    ) -> None:
        """The inner loop: tiles of sums += left operands of `pair` times right operands."""
        first = self.parts[part][0]
        per_step = self.inner // 4 * self.n_block
        # steps of less than a row of a tile: several lie side by side in it
        per_tile = ROW_BYTES // self.inner
        left = e.let(self.rows.tile_at(pair, right.first // per_tile, 0))

        def step(k: Any) -> None:
            base = e.let(right.base + k * per_step + first * ROWS)
            at = left + k * (2 * self.rows.tile)
            if per_tile > 1:
                number = right.first % per_tile + k
                at = left + number // per_tile * (2 * self.rows.tile)
                at = at + number % per_tile * (self.inner // self.rows.item)
            at = e.let(at)
            if ahead is not None:
                ahead(k)
            for c in range(len(numbers[0])):
                to = self.right_tiles[c % len(self.right_tiles)]
                tiles.load(to, right.buffer, base + c * ROWS, self.n_block * 4)
                for r, row in enumerate(numbers):
                    if c == 0:
                        tiles.load(self.left_tiles[r], self.left, at + r * self.rows.tile, ROW_BYTES)
                    tiles.dot(self.kind, row[c], self.left_tiles[r], to)

        unroll = self.schedule.unroll
        known = isinstance(right.steps, int)
        if known and right.steps <= unroll:
            for k in range(right.steps):
                step(e.i64(k))
            return
        whole = e.let(right.steps // unroll) if not known else right.steps // unroll
        with e.loop(whole) as j:
            for u in range(unroll):
                step(j * unroll + u)
        if unroll > 1 and not (known and right.steps % unroll == 0):
            with e.loop(whole * unroll, right.steps) as k:
                step(k)

    def ahead(
        self, right: RightOperands, pair: Any, part: int, chunk: int, following: Any = None
    ) -> Callable[[Any], None] | None:
        """Asks, spread over the steps of a pass of `chunk` steps, for the weights of the pass that follows.

        Args:
            pair: of the task.
            following: the element where these begin; None = behind those of this one.
        """
        if not self.schedule.prefetch:
            return None
        turns = -(-self.most // PAIR) * len(self.parts) * chunk
        lines = chunk * self.inner // 4 * self.n_block * 4 // 64
        each = -(-lines // turns)
        start = e.let(
            right.base + chunk * (self.inner // 4) * self.n_block if following is None else following
        )
        number = e.let((pair * len(self.parts) + part) * chunk)

        def ask(k: Any) -> None:
            for line in range(each):
                e.prefetch(right.buffer, start + ((number + k) * each + line) * 16, level=2)

        return ask

    def over(self, count: Any, body: Callable[[Any, int], None]) -> None:
        """body(pair, part) for all sums of `count` rows, in the schedule's order."""
        pairs = e.let((count + (PAIR - 1)) // PAIR)
        if self.schedule.wide or self.narrow:
            with e.loop(pairs) as pair:
                for part in range(len(self.parts)):
                    body(pair, part)
            return
        for part in range(len(self.parts)):
            with e.loop(pairs) as pair:
                body(pair, part)
