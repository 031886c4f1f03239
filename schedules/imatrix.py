"""Integer products of many rows with matrix instructions on bytes (smmla): twice the products of a dot product each.

Few rows stay with dot products (iblocks.py). For more, codes of a pass are unpacked once, in the order that the
instruction takes (matrix_tile.py), into a piece that the first-level cache holds for all rows.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules import emit as e
from llmc.schedules.iactivations import IntActivations
from llmc.schedules.iblocks import IntBlocks
from llmc.schedules.ilanes import LaneIntBlocks
from llmc.schedules.isums import RowOf, Vectors, Write
from llmc.schedules.matrix_tile import LANES, both_rows, turned, zipped
from llmc.schedules.qlayout import UNIT

_FEW = 4  # up to so many rows take dot products: a piece is not worth its unpacking
_PIECE = 256  # columns of a pass: 4 KiB of bytes per block of 16 outputs
_COLUMNS = 16  # of a turn of the inner loop: a register of bytes of a row


class MatrixIntBlocks(LaneIntBlocks):
    """IntBlocks with matrix instructions for more than a few rows."""

    def rows(self, x: IntActivations, count: Any, most: int, base: Any, row_of: RowOf, write: Write) -> None:
        """As IntBlocks.rows."""
        with T.If(count <= _FEW):
            with T.Then():
                self.few(x, count, min(most, _FEW), base, row_of, write)
            with T.Else():
                self.many(x, count, most, base, row_of, write)

    def many(self, x: IntActivations, count: Any, most: int, base: Any, row_of: RowOf, write: Write) -> None:
        """As IntBlocks.many; rows are taken four (with groups) or eight at a time, the last of them repeated."""
        layout = self.layout
        # sums of integers, and with groups as many of float32, beside operands: 16 registers of 32
        tile = 4 if self.grouped else 8
        size = self._pass_columns(_PIECE)
        piece = _MatrixPiece(self, size)
        tiles = e.let((count + (tile - 1)) // tile)
        partial = self._partial(
            x, e.let(tiles * tile), -(-most // tile) * tile, self._repeated(row_of, count)
        )
        with e.loop(-(-layout.padded_k // size)) as p:
            first = e.let(p * size)
            columns = e.let(T.min(e.i64(size), layout.padded_k - first))
            piece.fill(base, first, columns)
            with e.loop(tiles) as i:
                start = e.let(i * tile)
                index = [e.let(row_of(T.min(start + r, count - 1))) for r in range(tile)]
                bases = [e.let(at * x.stride + first // 4) for at in index]
                groups = [e.let(at * layout.groups + first // layout.group) for at in index]
                with e.loop(self.vectors // 2) as half:
                    sums = self._load_tiles(partial, start, tile, half)
                    if self.grouped:
                        self._groups(x, sums, bases, groups, piece, columns // layout.group, half)
                    else:
                        self._multiply(x, sums, bases, piece, e.i64(0), columns // _COLUMNS, half)
                    self._keep_tiles(partial, start, tile, half, sums)
        self._finish(x, partial, count, base, row_of, write)

    def _repeated(self, row_of: RowOf, count: Any) -> RowOf:
        return lambda r: row_of(T.min(r, count - 1))

    def _load_tiles(self, partial: Any, start: Any, rows: int, half: Any) -> Vectors:
        """Sums of two vectors of outputs, [row pair][tile of two outputs]."""
        sums = [[e.scratch(LANES, str(partial.dtype)) for _ in range(4)] for _ in range(rows // 2)]
        for p, pair in enumerate(sums):
            for v in range(2):
                lines = [
                    e.let(e.load(partial, self._at(start + (2 * p + i), half, v), LANES)) for i in range(2)
                ]
                for h, value in enumerate(turned(*lines)):
                    e.store(pair[2 * v + h], 0, value, LANES)
        return sums

    def _keep_tiles(self, partial: Any, start: Any, rows: int, half: Any, sums: Vectors) -> None:
        for p, pair in enumerate(sums):
            for v in range(2):
                tiles = [e.let(e.load(pair[2 * v + h], 0, LANES)) for h in range(2)]
                for i, line in enumerate(turned(*tiles)):
                    e.store(partial, self._at(start + (2 * p + i), half, v), line, LANES)

    def _at(self, row: Any, half: Any, v: int) -> Any:
        return row * self.nb + half * (2 * LANES) + v * LANES

    def _groups(
        self,
        x: IntActivations,
        sums: Vectors,
        bases: list[Any],
        groups: list[Any],
        piece: _MatrixPiece,
        count: Any,
        half: Any,
    ) -> None:
        """sums += `count` groups: integer sums of each, then its scales."""
        turns = self.layout.group // _COLUMNS
        with e.loop(count) as g:
            part = [[e.scratch(LANES, "int32") for _ in pair] for pair in sums]
            for p, pair in enumerate(part):
                starts = [e.let(e.splat(x.starts[groups[2 * p + i] + g], 2)) for i in range(2)]
                begin = both_rows(*starts)
                for tile in pair:
                    e.store(tile, 0, begin, LANES)
            at = [e.let(b + g * (self.layout.group // 4)) for b in bases]
            self._multiply(x, part, at, piece, e.let(g * turns), turns, half)
            for h in range(4):
                scale = e.let(e.load(piece.scales, (g * (self.nb // 2) + half * 4 + h) * LANES, LANES))
                for p, pair in enumerate(part):
                    value = tirx.Cast("float32x4", e.load(pair[h], 0, LANES)) * scale
                    e.store(sums[p][h], 0, e.load(sums[p][h], 0, LANES) + value, LANES)

    def _multiply(
        self,
        x: IntActivations,
        sums: Vectors,
        bases: list[Any],
        piece: _MatrixPiece,
        first: Any,
        turns: Any,
        half: Any,
    ) -> None:
        """sums += the products of `turns` times 16 columns of the rows with those of the piece from turn `first` on."""
        each = self.nb // 2  # operands of eight columns
        with e.loop(turns) as t:
            operands = []
            for p in range(len(sums)):
                rows = [e.let(e.load(x.data, bases[2 * p + i] + t * LANES, LANES)) for i in range(2)]
                operands.append(turned(*rows))
            for step in range(2):
                at = e.let(((first + t) * (2 * each) + step * each + half * 4) * LANES)
                for h in range(4):
                    weight = e.let(e.load(piece.words, at + h * LANES, LANES))
                    for pair, operand in zip(sums, operands, strict=True):
                        value = e.mma_bytes(e.load(pair[h], 0, LANES), operand[step], weight)
                        e.store(pair[h], 0, value, LANES)


class _MatrixPiece:
    """Columns of a block as operands: [8 columns][two outputs][2 x 8 bytes], and the scales as a tile needs them."""

    def __init__(self, work: IntBlocks, columns: int) -> None:
        self.work = work
        self.words = e.workspace(columns // 4 * work.nb, "int32")
        self.scales = e.workspace(columns // work.layout.group * 2 * work.nb) if work.grouped else None

    def fill(self, base: Any, first: Any, columns: Any) -> None:
        """Unpack `columns` columns from `first` of the block at `base`."""
        work, layout = self.work, self.work.layout
        if not work.grouped:
            self._units(e.let(base + first // UNIT * layout.unit_bytes), e.i64(0), columns // UNIT)
            return
        lanes, nb = work.lanes, work.nb
        units = layout.group // UNIT
        with e.loop(columns // layout.group) as g:
            data = e.let(base + (first // layout.group + g) * layout.group_bytes)
            self._units(data, e.let(g * units), units)
            tail = e.let(data + units * layout.unit_bytes)
            for v in range(work.vectors):
                scale = e.let(work.codes.scale(tail, v * lanes, lanes))
                # each output's scale for both rows of a tile
                for h, value in enumerate(turned(scale, scale)):
                    e.store(self.scales, g * (2 * nb) + (2 * v + h) * lanes, value, lanes)

    def _units(self, data: Any, first: Any, count: Any) -> None:
        """`count` units at byte `data`, which become units `first` and following of the piece."""
        work = self.work
        lanes, nb = work.lanes, work.nb
        words = 1 if work.nibbles else 2  # of an output for eight columns
        with e.loop(count * (UNIT // 8)) as j:
            at = e.let(data // 4 + j * (words * nb))
            to = e.let((first * (UNIT // 8) + j) * (2 * nb))
            for v in range(work.vectors):
                loaded = [e.let(e.load(work.words, at + i * nb + v * lanes, lanes)) for i in range(words)]
                quads = work._quads(loaded[0]) if work.nibbles else loaded
                ready = [work.dot.weights(quad)[0] for quad in quads]
                for h, operand in enumerate(zipped(*ready)):
                    e.store(self.words, to + (2 * v + h) * lanes, operand, lanes)
