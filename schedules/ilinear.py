"""Matrix times quantized weight with integer arithmetic: activations are rounded to int8 per row on the fly.

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

from llmc.caps import ByteDot, Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.iactivations import IntActivations, Outliers, quantize_rows
from llmc.schedules.idot import IntDot
from llmc.schedules.layout import usual_vectors
from llmc.schedules.linear import for_tiles
from llmc.schedules.qcodes import QuantCodes
from llmc.schedules.qlayout import UNIT, QuantLayout
from llmc.schedules.qlinear import QuantLinearConfig, QuantTensors

FEW = 48  # up to so many rows unpack in registers
_PIECE = 256  # columns of a pass: 64 outputs of bytes are half of a first-level cache
_LINES = 128  # bytes of the next pass that a tile of many rows asks for
_LINE = 64  # bytes of the cache

Vectors = list[list[Any]]
RowOf = Callable[[Any], Any]
Write = Callable[[Vectors, list[Any]], None]


class IntBlocks:
    """Multiplies rows of int8 activations with blocks of a weight in quads.

    Args:
        w: the packed weight as declared; `copies` of them behind one another (experts).
        prefetch: bytes that the weight stream is asked for ahead of its use; 0 = that is left to the machine.
    """

    def __init__(
        self, caps: Capabilities, layout: QuantLayout, w: Any, copies: int = 1, prefetch: int = 0
    ) -> None:
        self.caps, self.layout, self.prefetch = caps, layout, prefetch
        self.block_bytes, self.copy_bytes = layout.block_bytes, layout.size
        size = copies * self.copy_bytes
        self.outliers = Outliers(layout, w, copies) if layout.outliers else None
        self.codes = QuantCodes(caps, layout, w, size)
        self.words = e.flat(w, size // 4, "int32")
        self.dot = IntDot(caps, layout.of.bits)
        self.lanes, self.nb = self.codes.lanes, layout.n_block
        self.vectors = self.codes.vectors
        self.grouped = layout.groups > 1
        self.nibbles = layout.of.bits == 4

    def parallel(self, extent: Any) -> Any:
        """e.parallel with the functions that integer products need."""
        return T.parallel(e.i64(extent), annotations=self.dot.import_text())

    def prepare(self, in_dtype: str, x: Any, rows: Any) -> IntActivations:
        """Rows of x, [rows, k] in in_dtype, rounded."""
        return quantize_rows(self.caps, self.layout, in_dtype, x, rows, self.dot.offset, self.outliers)

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
        if not self.nibbles:
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
        size = self._pass_columns(_PIECE)
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
            ahead = max(self.prefetch, size // each * piece)
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

    def _bytes_to(self, column: Any) -> Any:
        """Where a column that begins a group (without groups: a unit) lies in a block."""
        each, size = (
            (self.layout.group, self.layout.group_bytes) if self.grouped else (UNIT, self.layout.unit_bytes)
        )
        return column // each * size

    def _pass_columns(self, columns: int) -> Any:
        """At least a group."""
        return max(columns, self.layout.group) if self.grouped else columns

    def _partial(self, x: IntActivations, count: Any, most: int, row_of: RowOf) -> Any:
        """Sums of rows between passes: float32 with groups, else the integers."""
        partial = e.workspace(most * self.nb, "float32" if self.grouped else "int32")
        with e.loop(count) as r:
            start = e.splat(0.0, self.lanes) if self.grouped else e.splat(x.starts[row_of(r)], self.lanes)
            start = e.let(start)
            for v in range(self.vectors):
                e.store(partial, r * self.nb + v * self.lanes, start, self.lanes)
        return partial

    def _load(self, partial: Any, to: Any, rows: int, width: int = 0) -> Vectors:
        """Sums of some rows and of `width` vectors (0 = all) of outputs, from element `to` on."""
        sums = self._scratch(rows, str(partial.dtype), width)
        for r, row in enumerate(sums):
            for v, vector in enumerate(row):
                at = to + r * self.nb + v * self.lanes
                e.store(vector, 0, e.load(partial, at, self.lanes), self.lanes)
        return sums

    def _keep(self, partial: Any, to: Any, sums: Vectors) -> None:
        for r, row in enumerate(sums):
            for v, vector in enumerate(row):
                at = to + r * self.nb + v * self.lanes
                e.store(partial, at, e.load(vector, 0, self.lanes), self.lanes)

    def _finish(
        self, x: IntActivations, partial: Any, count: Any, base: Any, row_of: RowOf, write: Write
    ) -> None:
        """Scale the sums of each row, add its outliers and write them."""
        with e.loop(count) as r:
            acc = [[e.scratch(self.lanes) for _ in range(self.vectors)]]
            tail = e.let(base + self.layout.padded_k // UNIT * self.layout.unit_bytes)
            row = e.let(row_of(r))
            factor = e.let(e.splat(x.scales[row], self.lanes))
            for v, vector in enumerate(acc[0]):
                value = e.load(partial, r * self.nb + v * self.lanes, self.lanes)
                if not self.grouped:
                    value = tirx.Cast(e.vec("float32", self.lanes), value)
                    value = value * self.codes.scale(tail, v * self.lanes, self.lanes)
                e.store(vector, 0, value * factor, self.lanes)
            self._add_outliers(x, acc[0], row, base)
            write(acc, [row])

    def _add_outliers(self, x: IntActivations, acc: list[Any], row: Any, base: Any) -> None:
        """acc += the columns of a row of x that were kept times their weights in the block at byte `base`."""
        if self.outliers is None:
            return
        fma = T.llvm_lookup_intrinsic_id("llvm.fma")
        dtype, each = e.vec("float32", self.lanes), self.layout.outliers
        with e.loop(each) as j:
            value = e.let(e.splat(x.kept[row * each + j], self.lanes))
            for v, vector in enumerate(acc):
                weights = self.outliers.weights(base, j, v * self.lanes, self.lanes)
                total = T.call_llvm_pure_intrin(dtype, fma, value, weights, e.load(vector, 0, self.lanes))
                e.store(vector, 0, total, self.lanes)

    def _starts(self, x: IntActivations, at: list[Any], width: int = 0) -> Vectors:
        """Integer sums of a group before its first product."""
        values = [e.let(e.splat(x.starts[i], self.lanes)) for i in at]
        part = self._scratch(len(at), "int32", width)
        self._store(part, [[values[r]] * len(row) for r, row in enumerate(part)])
        return part

    def _unit(self, x: IntActivations, part: Vectors, unit: Any, at: Any, columns: list[Any]) -> None:
        """part plus a unit's products, outputs from `at` on; more than one row takes its words in a loop: less code."""
        words = UNIT // 8 if self.nibbles else UNIT // 4
        base = e.let(unit // 4 + at)
        if len(columns) == 1:
            sums = [[e.load(vector, 0, self.lanes) for vector in row] for row in part]
            for j in range(words):
                sums = self._word(x, sums, base, columns, j)
            self._store(part, sums)
            return
        if not self.nibbles:
            self._products(x, part, columns, self.words, base, words)
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
        """sums += `quads` quads of bytes in `source` times those of some rows of x."""
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

    def store(
        self,
        acc: Vectors,
        epilogue: Epilogue,
        rows: list[Any],
        block: Any,
        y: Any,
        bias: Any,
        residual: Any,
        bias_base: Any = 0,
    ) -> None:
        """Apply the epilogue to sums and store them to rows of y."""
        epilogue.store(
            lambda r, v: e.load(acc[r][v], 0, self.lanes),
            lambda r, v, i: acc[r][v][i],
            rows,
            block,
            y,
            self.caps,
            bias,
            residual,
            bias_base,
        )

    def _scale(self, acc: Vectors, part: Vectors, scale: Callable[[int], Any]) -> None:
        """acc += part * scale."""
        for v in range(len(acc[0])):
            factor = e.let(scale(v))
            for total, sums in zip(acc, part, strict=True):
                value = tirx.Cast(e.vec("float32", self.lanes), e.load(sums[v], 0, self.lanes)) * factor
                e.store(total[v], 0, e.load(total[v], 0, self.lanes) + value, self.lanes)

    def _scratch(self, rows: int, dtype: str, width: int = 0) -> Vectors:
        return [[e.scratch(self.lanes, dtype) for _ in range(width or self.vectors)] for _ in range(rows)]

    def _store(self, vectors: Vectors, values: Vectors) -> None:
        for row, new in zip(vectors, values, strict=True):
            for vector, value in zip(row, new, strict=True):
                e.store(vector, 0, value, self.lanes)


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


def int_blocks(
    caps: Capabilities, layout: QuantLayout, w: Any, copies: int = 1, prefetch: int = 0
) -> IntBlocks:
    """The best IntBlocks of a machine; arguments as there."""
    if caps.byte_dot is not ByteDot.SIGNED or not caps.has_lane_operands:
        return IntBlocks(caps, layout, w, copies, prefetch)
    if caps.has_byte_mma:
        from llmc.schedules.imatrix import MatrixIntBlocks

        return MatrixIntBlocks(caps, layout, w, copies, prefetch)
    from llmc.schedules.ilanes import LaneIntBlocks

    return LaneIntBlocks(caps, layout, w, copies, prefetch)


def int_linear(cfg: QuantLinearConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[1 x lead, T, k], w packed, [bias], [residual like y], y[1 x lead, T, n]) with symbolic T."""
    layout, n = cfg.layout, cfg.n
    epilogue = Epilogue(
        n, layout.n_block, cfg.in_dtype, cfg.out_dtype, cfg.activation, cfg.gated, cfg.gate_second
    )
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        args = QuantTensors(cfg, t)
        with e.root():
            args.view()
            work = int_blocks(caps, layout, args.w, prefetch=cfg.prefetch)
            rounded = work.prepare(cfg.in_dtype, args.x, t)

            def write(block: Any, acc: Vectors, rows: list[Any]) -> None:
                work.store(acc, epilogue, rows, block, args.y, args.bias, args.residual)

            # tasks of equal numbers of whole tiles
            tile = work.max_rows
            most = -(-cfg.t_block // tile) * tile
            row_blocks = e.opaque((t + (most - 1)) // most)
            each = e.opaque(((t + row_blocks - 1) // row_blocks + (tile - 1)) // tile * tile)
            with work.parallel(layout.blocks * row_blocks) as task:
                block = e.opaque(task // row_blocks)
                first = e.opaque(task % row_blocks * each)
                count = e.opaque(T.max(e.i64(0), T.min(each, t - first)))
                base = e.opaque(block * work.block_bytes)
                work.rows(
                    rounded,
                    count,
                    most,
                    base,
                    lambda r: first + r,
                    lambda acc, rows: write(block, acc, rows),
                )
    return built[0]
