"""Rows of int8 activations times blocks of a quantized weight, in passes that the first-level cache holds.

One packed weight serves one row and many. Up to FEW rows multiply while codes are unpacked in registers; more go through
a piece of the weight that is unpacked into the first-level cache once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules import emit as e
from llmc.schedules.iactivations import IntActivations
from llmc.schedules.idot import SHORT
from llmc.schedules.isums import IntSums, RowOf, Vectors, Write
from llmc.schedules.layout import usual_vectors
from llmc.schedules.micro_kernel import for_tiles
from llmc.schedules.qlayout import UNIT

FEW = 128  # up to so many rows unpack in registers
_PIECE = 256  # columns of a pass: 64 outputs of bytes are half of a first-level cache
_LINES = 128  # bytes of the next pass that a tile of many rows asks for
_LINE = 64  # bytes of the cache
_AHEAD = 9216  # bytes: nearer lines, of narrow blocks, are used before they have come


class IntBlocks(IntSums):
    """Multiplies rows of int8 activations with blocks of a weight in quads; arguments as of IntSums."""

    @property
    def max_rows(self) -> int:
        """Rows of a tile over all vectors of outputs: their sums fit into the registers beside a step's weights.

        With groups these are integer and float32 sums. Fewer rows, but no sums go through memory for every group.
        """
        vectors = self.width(2)
        spare = self.caps.vector_registers - (vectors + 1) * self.dot.registers
        return max(1, min(6, spare // (vectors * (2 if self.grouped else 1))))

    def width(self, rows: int) -> int:
        """Vectors of a block that so many rows take at a time; fewer than all where it is made for more registers."""
        if rows == 1:
            return min(self.vectors, self.caps.vector_registers // 2)
        return min(self.vectors, usual_vectors(self.caps))

    def parts(self, rows: int) -> AbstractContextManager[Any]:
        """A loop over the parts of a block that so many rows take one after the other."""
        return e.loop_or_once(self.vectors // self.width(rows))

    @property
    def _few_rows(self) -> int:
        """Rows of a tile that unpacks codes on the way: many, over few vectors of outputs, so that it is done seldom."""
        return self.caps.vector_registers // 4 if self.nibbles else self.max_rows

    def _few_vectors(self, rows: int) -> int:
        """Vectors of outputs of such a tile."""
        if not self.nibbles:
            return self.width(rows)
        return next(v for v in (4, 2, 1) if self.vectors % v == 0 and (v * rows <= self._few_rows or v == 1))

    def rows(self, x: IntActivations, count: Any, most: int, base: Any, row_of: RowOf, write: Write) -> None:
        """Rows row_of(0 .. count - 1) times the block at byte `base`.

        Args:
            most: upper bound of count.
            write: gets (sums, rows) once they are complete.
        """
        if not self.nibbles or self.dot.in_words:
            self.few(x, count, most, base, row_of, write)
            return
        with T.If(count <= FEW):
            with T.Then():
                self.few(x, count, min(most, FEW), base, row_of, write)
            with T.Else():
                self.many(x, count, most, base, row_of, write)

    def few(self, x: IntActivations, count: Any, most: int, base: Any, row_of: RowOf, write: Write) -> None:
        """Rows row_of(0 .. count - 1) times the block at byte `base`, read from memory once; codes unpacked in registers.

        Columns are taken in passes that the first-level cache holds for the further tiles of rows.
        """
        layout = self.layout
        # with sums of 16 bits products are few instructions, and sums that go through memory count
        size = self._pass_columns(2 * _PIECE if self.dot.in_words else _PIECE)
        partial = self._partial(x, count, most, row_of)
        with e.loop(-(-layout.padded_k // size)) as p:
            first = e.opaque(p * size)
            columns = e.opaque(T.min(e.i64(size), layout.padded_k - first))
            begin = e.opaque(base + self._bytes_to(first))

            def tile_of(rows: int, start: Any) -> None:
                index = [e.let(row_of(start + r)) for r in range(rows)]
                width = self._few_vectors(rows)
                parts = self.vectors // width
                with e.loop_or_once(parts) as number:
                    tile = _Tile(index, begin, first, columns, e.let(number * (width * self.lanes)), width)
                    fetch = self._fetch(tile, start, count, size, number, parts)
                    self._few_tile(x, partial, e.let(start * self.nb + tile.output), tile, fetch)

            for_tiles(self._few_rows, count, tile_of, whole=True)
        self._finish(x, partial, count, base, row_of, write)

    def _fetch(
        self, tile: _Tile, start: Any, count: Any, size: int, number: Any, parts: int
    ) -> _Fetch | None:
        """What a tile of rows from `start` on asks for, in part `number` of the outputs; passes have `size` columns.

        A machine by itself follows a stream that never pauses: that of one tile of all rows and all outputs. Asking for it
        costs bandwidth. Other tiles go through a pass again, or jump in it, and meanwhile memory would stand still:
        two of them ask for the next pass, of which the second gets what found no room the first time.
        """
        rows = len(tile.rows)
        each, piece = (
            (self.layout.group, self.layout.group_bytes) if self.grouped else (UNIT, self.layout.unit_bytes)
        )
        if rows > 1:
            ahead = max(self.prefetch, size // each * piece, _AHEAD)
            wanted = start < 2 * self._few_rows
            wanted = e.let(wanted if parts > 1 else tirx.And(wanted, count > rows))
        elif self.prefetch:
            ahead, wanted = self.prefetch, tirx.const(True, "bool")
        else:
            return None
        step = piece // parts
        at = e.opaque(tile.begin + ahead + number * (tile.columns // each * step))
        return _Fetch(at, step, 1 if rows == 1 else 2, wanted)

    def _few_tile(self, x: IntActivations, partial: Any, to: Any, tile: _Tile, fetch: _Fetch | None) -> None:
        """Multiplies a tile; its sums are in `partial` from element `to` on."""
        layout = self.layout
        bases = [e.let(i * x.stride + tile.first // 4) for i in tile.rows]
        sums = self._load(partial, to, len(bases), tile.width)

        def ask(turn: Any) -> None:
            if fetch is None:
                return
            with T.If(fetch.wanted), T.Then():
                for line in range(0, fetch.step, _LINE):
                    e.prefetch(self.codes.bytes, fetch.at + turn * fetch.step + line, level=fetch.level)

        def units(
            part: Vectors, data: Any, columns: list[Any], count: Any, turn: Callable[[Any], None]
        ) -> None:
            with e.loop(count) as u:
                turn(u)
                unit = e.let(data + u * layout.unit_bytes)
                self._unit(x, part, unit, tile.output, [e.let(c + u * (UNIT // 4)) for c in columns])

        if not self.grouped:
            units(sums, tile.begin, bases, tile.columns // UNIT, ask)
        else:
            starts = [e.let(i * layout.groups + tile.first // layout.group) for i in tile.rows]
            with e.loop(tile.columns // layout.group) as g:
                ask(g)
                part = self._starts(x, [s + g for s in starts], tile.width)
                data = e.let(tile.begin + g * layout.group_bytes)
                places = [e.let(b + g * (layout.group // 4)) for b in bases]
                units(part, data, places, layout.group // UNIT, lambda _: None)
                tail = e.let(data + layout.group // UNIT * layout.unit_bytes)
                scale = lambda v: self.codes.scale(tail, tile.output + v * self.lanes, self.lanes)  # noqa: E731
                self._scale(sums, part, scale)
        self._keep(partial, to, sums)

    def many(self, x: IntActivations, count: Any, most: int, base: Any, row_of: RowOf, write: Write) -> None:
        """As `few`, with 4-bit codes of a pass unpacked into the first-level cache once for all rows."""
        layout = self.layout
        size = self._pass_columns(_PIECE)
        piece = _Piece(self, size)
        partial = self._partial(x, count, most, row_of)
        with e.loop(-(-layout.padded_k // size)) as p:
            first = e.let(p * size)
            columns = e.let(T.min(e.i64(size), layout.padded_k - first))
            piece.fill(base, first, columns)

            def tile_of(rows: int, start: Any) -> None:
                index = [e.let(row_of(start + r)) for r in range(rows)]
                bases = [e.let(i * x.stride + first // 4) for i in index]
                after = base + self._bytes_to(first + size) + start // self.max_rows * _LINES
                for line in range(0, _LINES, 64):
                    e.prefetch(self.codes.bytes, after + line)
                groups = [e.let(i * layout.groups + first // layout.group) for i in index]
                with self.parts(rows) as number:
                    width = self.width(rows)
                    row = e.let(number * (width * self.lanes))
                    to = e.let(start * self.nb + row)
                    sums = self._load(partial, to, rows, width)
                    if self.grouped:
                        self._tile(x, sums, bases, groups, piece, columns // layout.group, row)
                    else:
                        self._products(x, sums, bases, piece.words, row, columns // 4)
                    self._keep(partial, to, sums)

            for_tiles(self.max_rows, count, tile_of)
        self._finish(x, partial, count, base, row_of, write)

    def _unit(self, x: IntActivations, part: Vectors, unit: Any, at: Any, columns: list[Any]) -> None:
        """part plus a unit's products, outputs from `at` on."""
        if not self.dot.in_words:
            self._unit_sums(x, part, unit, at, columns)
            return
        short = self._zeros(part)
        self._unit_sums(x, short, unit, at, columns)
        self._settle(part, short)

    def _zeros(self, part: Vectors) -> Vectors:
        """Sums that begin with nothing, as many as `part` has."""
        zero = e.const("int32", 0, self.lanes)
        sums = self._scratch(len(part), "int32", len(part[0]))
        self._store(sums, [[zero] * len(row) for row in part])
        return sums

    def _settle(self, part: Vectors, short: Vectors) -> None:
        """part plus sums of 16 bits."""
        for row, words in zip(part, short, strict=True):
            for vector, word in zip(row, words, strict=True):
                held = (e.load(v, 0, self.lanes) for v in (vector, word))
                e.store(vector, 0, self.dot.settle(*held), self.lanes)

    def _unit_sums(self, x: IntActivations, part: Vectors, unit: Any, at: Any, columns: list[Any]) -> None:
        """As _unit, in sums of whatever width; more than one row takes its words in a loop: less code."""
        words = UNIT // 8 if self.nibbles else UNIT // 4
        base = e.let(unit // 4 + at)
        if len(columns) == 1:
            sums = [[e.load(vector, 0, self.lanes) for vector in row] for row in part]
            for j in range(words):
                sums = self._word(x, sums, base, columns, j)
            self._store(part, sums)
            return
        if not self.nibbles:
            self._quad_sums(x, part, columns, self.words, base, words)
            return
        with e.loop(words) as j:
            sums = [[e.load(vector, 0, self.lanes) for vector in row] for row in part]
            self._store(part, self._word(x, sums, base, columns, j))

    def _word(self, x: IntActivations, sums: Vectors, base: Any, columns: list[Any], j: Any) -> Vectors:
        """sums plus word j of every row of a unit times those of x: one quad, or two of 4-bit codes."""
        quads = 2 if self.nibbles else 1
        spread = [[self.dot.activations(x.data[c + (j * quads + h)]) for h in range(quads)] for c in columns]
        out: Vectors = [[] for _ in columns]
        for v in range(len(sums[0])):
            word = e.let(e.load(self.words, base + j * self.nb + v * self.lanes, self.lanes))
            parts = [self.dot.weights(w) for w in self._quads(word)]
            for r in range(len(columns)):
                value = sums[r][v]
                for h, weights in enumerate(parts):
                    value = e.let(self.dot.add(value, weights, spread[r][h]))
                out[r].append(value)
        return out

    def _quads(self, word: Any) -> list[Any]:
        """A word of codes as vectors of bytes, four columns each."""
        if not self.nibbles:
            return [word]
        mask = e.const("int32", 0x0F0F0F0F, self.lanes)
        high = T.shift_right(word, e.const("int32", 4, self.lanes))
        return [e.let(T.bitwise_and(word, mask)), e.let(T.bitwise_and(high, mask))]

    def _tile(
        self,
        x: IntActivations,
        acc: Vectors,
        bases: list[Any],
        groups: list[Any],
        piece: _Piece,
        count: Any,
        row: Any,
    ) -> None:
        """acc += `count` groups of a piece times those of some rows of x; integer sums of a group, then its scales.

        Args:
            bases: where the rows' columns of the piece begin in x.data.
            groups: where the rows' groups of the piece begin in x.starts.
            row: of the block, where the sums begin.
        """
        quads = self.layout.group // 4
        with e.loop(count) as g:
            part = self._starts(x, [at + g for at in groups], len(acc[0]))
            begin = e.let(g * quads)
            rows = [e.let(at + begin) for at in bases]
            self._products(x, part, rows, piece.words, e.let(begin * self.nb + row), quads)
            at = e.let(g * self.nb + row)
            self._scale(acc, part, lambda v: e.load(piece.scales, at + v * self.lanes, self.lanes))

    def _products(
        self, x: IntActivations, sums: Vectors, bases: list[Any], source: Any, begin: Any, quads: Any
    ) -> None:
        """sums += `quads` quads of bytes in `source` times those of some rows of x; whole units."""
        if not self.dot.in_words:
            self._quad_sums(x, sums, bases, source, begin, quads)
            return
        with e.loop(quads // SHORT) as i:
            short = self._zeros(sums)
            first = e.let(i * SHORT)
            rows = [e.let(base + first) for base in bases]
            self._quad_sums(x, short, rows, source, e.let(begin + first * self.nb), SHORT)
            self._settle(sums, short)

    def _quad_sums(
        self, x: IntActivations, sums: Vectors, bases: list[Any], source: Any, begin: Any, quads: Any
    ) -> None:
        """As _products, in sums of whatever width."""
        lanes = self.lanes
        with e.loop(quads) as q:
            weights = []
            for v in range(len(sums[0])):
                word = e.let(e.load(source, begin + q * self.nb + v * lanes, lanes))
                weights.append(self.dot.weights(word))
            for base, row in zip(bases, sums, strict=True):
                spread = self.dot.activations(x.data[base + q])
                for vector, w in zip(row, weights, strict=True):
                    e.store(vector, 0, self.dot.add(e.load(vector, 0, lanes), w, spread), lanes)


@dataclass(frozen=True)
class _Tile:
    """Rows times columns times outputs.

    Attributes:
        rows: of x.
        begin: the byte where the columns begin.
        first, columns: the first column and how many.
        output, width: the first output of the block and how many vectors of them.
    """

    rows: list[Any]
    begin: Any
    first: Any
    columns: Any
    output: Any
    width: int


@dataclass(frozen=True)
class _Fetch:
    """What is asked for on the way.

    Attributes:
        at: the byte where it begins.
        step: bytes at each turn: a group, or a unit without groups.
        level: of the cache that it is to come to.
        wanted: whether.
    """

    at: Any
    step: int
    level: int
    wanted: Any


class _Piece:
    """Columns of a block of 4-bit codes, unpacked: bytes in quads, and the scales of its groups in float32."""

    def __init__(self, work: IntBlocks, columns: int) -> None:
        self.work = work
        self.words = e.workspace(columns // 4 * work.nb, "int32")
        self.scales = e.workspace(columns // work.layout.group * work.nb)

    def fill(self, base: Any, first: Any, columns: Any) -> None:
        """Unpack `columns` columns from `first` of the block at `base`."""
        work, layout = self.work, self.work.layout
        lanes, nb = work.lanes, work.nb
        with e.loop(columns // layout.group) as g:
            group = e.let(base + (first // layout.group + g) * layout.group_bytes)
            with e.loop(layout.group // 8) as j:
                at = e.let(group + j * (4 * nb))
                for v in range(work.vectors):
                    word = e.let(e.load(work.words, at // 4 + v * lanes, lanes))
                    for h, quad in enumerate(work._quads(word)):
                        to = (g * (layout.group // 4) + 2 * j + h) * nb + v * lanes
                        e.store(self.words, to, quad, lanes)
            tail = e.let(group + layout.group // UNIT * layout.unit_bytes)
            for v in range(work.vectors):
                e.store(self.scales, g * nb + v * lanes, work.codes.scale(tail, v * lanes, lanes), lanes)
