"""Rows of activations times blocks of a quantized weight: what the kernels on quantized weights have in common.

Few rows are multiplied while codes are unpacked in registers, each weight once for all of them. Many rows share
columns that are unpacked into the second-level cache, and run the plain micro-kernel over them. Either way a
piece of columns with one scale is summed up in registers, and then added, scaled, to float32 totals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.layout import BlockedLayout
from llmc.schedules.linear import MicroKernel
from llmc.schedules.matrix_tile import multiply_bf16
from llmc.schedules.qactivations import Activations, prepare
from llmc.schedules.qcodes import QuantCodes
from llmc.schedules.qlayout import UNIT, QuantLayout

_CHUNK = 512  # columns that many rows share unpacked
_SIZES = (1, 2, 4, 8)
_LONG = 128  # columns of a piece from which on totals need not be in registers
_ROW_MAJOR = 4  # so many rows are read where they are; more would fall into the same cache sets

Write = Callable[[MicroKernel, list[list[Any]], list[Any]], None]


@dataclass(frozen=True)
class Unpacked:
    """Pieces of a block as floats.

    Attributes:
        data: [pieces, steps, n_block]; bf16 pairs as int32, or float32.
        scales, shifts: float32 [pieces, n_block].
        steps: of a piece.
        first: the number of the first piece.
        pieces: how many.
    """

    data: Any
    scales: Any
    shifts: Any | None
    steps: int
    first: Any
    pieces: Any


class QuantBlocks:
    """Multiplies rows of x with blocks of a quantized weight.

    Args:
        x: flat view of the activations in in_dtype, [rows, k].
        w: the packed weight as declared; `copies` of them behind one another (experts).
        prefetch: bytes that the weight stream is asked for ahead of its use.
        copy_of: which copy a row of x is multiplied with; None = there is one.
    """

    def __init__(
        self,
        caps: Capabilities,
        layout: QuantLayout,
        in_dtype: str,
        x: Any,
        rows: Any,
        w: Any,
        copies: int = 1,
        prefetch: int = 2304,
        copy_of: Callable[[Any], Any] | None = None,
    ) -> None:
        self.caps, self.layout, self.in_dtype = caps, layout, in_dtype
        self.x, self.rows, self.prefetch, self.copy_of = x, rows, prefetch, copy_of
        self.block_bytes = layout.block_bytes
        self.copy_bytes = 1
        for size in layout.packed_shape:
            self.copy_bytes *= size
        self.codes = QuantCodes(caps, layout, w, copies * self.copy_bytes)
        self.lanes, self.vectors = self.codes.lanes, self.codes.vectors
        self.pieces = layout.padded_k // layout.piece
        # steps of a piece
        self.steps = self.codes.steps * layout.piece // UNIT
        self.dot = in_dtype == "bfloat16" and self.codes.by_pairs
        # accumulators that leave room for weights, a row's value, tables
        fit = caps.vector_registers * 3 // 4
        self.sizes = [size for size in _SIZES if size <= fit]

    @property
    def row_major(self) -> list[int]:
        """Sizes for `few` on rows that lie one after the other."""
        return [size for size in self.sizes if size <= _ROW_MAJOR]

    def parallel(self, extent: Any) -> Any:
        """e.parallel with the functions that unpacking needs."""
        return T.parallel(e.i64(extent), annotations=self.codes.import_text())

    def prepare(self, side: int = 0) -> Activations:
        """x, converted, padded and reordered if need be; with `side`, its rows (at most so many) side by side."""
        return prepare(self.codes, self.x, self.rows, self.in_dtype, self.dot, side, self._order_of)

    def _order_of(self, r: Any) -> Any:
        """Where the order of the inputs that row r of x is multiplied with begins, in elements."""
        first = self.layout.order_at // 4
        if self.copy_of is None:
            return e.i64(first)
        return e.let(self.copy_of(r) * (self.copy_bytes // 4) + first)

    def micro(self, x: Activations, scratch: Any) -> MicroKernel:
        """The plain micro-kernel over unpacked columns; also what stores results."""
        layout = BlockedLayout(self.layout.n_block, 2 if x.dot else 1)
        dtype = "bfloat16" if x.dot else "float32"
        return MicroKernel(self.caps, layout, dtype, self.layout.padded_k, x.data, scratch, 0)

    def few(self, x: Activations, size: int, rows: list[Any], count: Any, base: Any, write: Write) -> None:
        """`count` rows of x times the block whose bytes begin at `base`.

        Args:
            size: rows that are multiplied, one of `sizes`, at least `count`.
            rows: their numbers; those past `count` are multiplied too, but not written. Unused if x is side by side.
            write: gets (micro-kernel, accumulators, [index into rows]) of each row once it is complete.
        """
        lanes, nb, codes = self.lanes, self.layout.n_block, self.codes
        width = max(v for v in (1, 2, 4) if self.vectors % v == 0 and (v * size <= self._fit() or v == 1))
        totals = e.scratch(size * nb)
        for at in range(0, size * nb, lanes):
            e.store(totals, at, e.splat(0.0, lanes), lanes)
        starts = [] if x.side else [e.let(row * x.stride) for row in rows]
        step_columns = codes.each * (1 if x.dot else 2)

        def column(r: int, at: Any) -> Any:
            return x.data[at * x.side + r] if x.side else x.data[starts[r] + at]

        with e.loop(self.pieces) as p:
            place = codes.place(base, p)
            with _loop_or_once(self.vectors // width) as part_of:
                row = e.let(part_of * (width * lanes)) if width < self.vectors else e.i64(0)
                part = [[e.scratch(lanes) for _ in range(width)] for _ in range(size)]
                for vector in (v for r in part for v in r):
                    e.store(vector, 0, e.splat(0.0, lanes), lanes)
                with e.loop(self.steps) as s:
                    step = codes.step(place, s, row, width)
                    self._prefetch(place, s, part_of, self.vectors // width)
                    first = e.let((p * self.steps + s) * step_columns)
                    # chains of values, not of stores: a quarter of the statements, which passes over TIR are slow at
                    sums = [[e.load(vector, 0, lanes) for vector in r] for r in part]
                    for i in codes.turns:
                        if x.dot:
                            a = [e.let(e.splat(column(r, first + i), lanes)) for r in range(size)]
                            pairs = [e.let(step.pairs(i, v)) for v in range(width)]
                            sums = [
                                [e.let(e.dot_bf16(sums[r][v], a[r], pairs[v])) for v in range(width)]
                                for r in range(size)
                            ]
                            continue
                        values = [[e.let(f) for f in step.floats(i, v)] for v in range(width)]
                        for h in (0, 1):
                            a = [e.let(e.splat(column(r, first + 2 * i + h), lanes)) for r in range(size)]
                            sums = [
                                [e.let(sums[r][v] + a[r] * values[v][h]) for v in range(width)]
                                for r in range(size)
                            ]
                    for r in range(size):
                        for v in range(width):
                            e.store(part[r][v], 0, sums[r][v], lanes)
                for v in range(width):
                    at = e.let(row + v * lanes)
                    scale = e.let(codes.scale(place.scales, at, lanes, place.tops))
                    shift = e.let(codes.shift(place, at, lanes, scale)) if x.sums is not None else None
                    for r in range(size):
                        value = e.load(part[r][v], 0, lanes) * scale
                        if shift is not None:
                            number = r if x.side else rows[r]
                            value = value + shift * e.splat(x.sums[number * self.pieces + p], lanes)
                        to = r * nb + at
                        e.store(totals, to, e.load(totals, to, lanes) + value, lanes)
        self._write_rows(self.micro(x, codes.bytes), totals, count, write)

    def _fit(self) -> int:
        # 16-byte registers: tables are several of them
        return self.caps.vector_registers * (3 if self.lanes == 4 else 5) // 8

    def _prefetch(self, place: Any, s: Any, part: Any, parts: int) -> None:
        """Ask for the share of the stream that a step stands for."""
        if not self.prefetch:
            return
        size = self.layout.unit_bytes // self.codes.steps // parts
        at = e.let(place.units + ((place.step + s) * parts + part) * size + self.prefetch)
        for line in range(0, size, 64):
            e.prefetch(self.codes.bytes, at + line)

    def many(
        self, x: Activations, count: Any, most: int, base: Any, row_of: Callable[[Any], Any], write: Write
    ) -> None:
        """Rows row_of(0 .. count - 1) times the block at `base`: columns are unpacked once for all of them.

        Args:
            most: upper bound of count.
            write: as for `few`.
        """
        layout, lanes, nb, codes = self.layout, self.lanes, self.layout.n_block, self.codes
        steps = layout.piece // 2 if x.dot else layout.piece
        per_chunk = min(self.pieces, max(1, _CHUNK // layout.piece))
        unpacked = e.workspace(per_chunk * steps * nb, "int32" if x.dot else "float32")
        scales = e.workspace(per_chunk * nb)
        shifts = e.workspace(per_chunk * nb) if x.sums is not None else None
        micro = self.micro(x, unpacked)
        # long pieces have no totals in registers, and so place for twice as many vectors
        width = self.vectors if layout.piece >= _LONG else -(-self.vectors // 2)
        in_registers = self.vectors if layout.piece >= _LONG else 2 * width
        # sums, totals, weights, a row's value; 6 rows with 32 registers
        tile = (self.caps.vector_registers - width - 2) // in_registers // 2 * 2
        if x.dot and self.caps.has_bf16_mma:
            tile = min(tile, 4)  # operands of two rows and two outputs take registers too
        totals = e.workspace(-(-most // tile) * tile * nb)
        tiles = e.let((count + (tile - 1)) // tile)
        with e.loop(tiles * (tile * self.vectors)) as i:
            e.store(totals, i * lanes, e.splat(0.0, lanes), lanes)
        with e.loop(-(-self.pieces // per_chunk)) as c:
            first = e.let(c * per_chunk)
            inside = (
                per_chunk if self.pieces % per_chunk == 0 else e.let(T.min(per_chunk, self.pieces - first))
            )
            with e.loop(inside) as q:
                place = codes.place(base, e.let(first + q))
                with e.loop(self.steps) as s:
                    self._unpack(x, unpacked, place, s, e.let(q * steps * nb))
                for v in range(self.vectors):
                    scale = e.let(codes.scale(place.scales, v * lanes, lanes, place.tops))
                    e.store(scales, q * nb + v * lanes, scale, lanes)
                    if shifts is not None:
                        e.store(
                            shifts, q * nb + v * lanes, codes.shift(place, v * lanes, lanes, scale), lanes
                        )
            with e.loop(tiles) as i:
                # the last tile is filled up with its last row, whose further totals are not used
                rows = [e.let(row_of(T.min(i * tile + r, count - 1))) for r in range(tile)]
                for v in range(0, self.vectors, width):
                    at = e.let(i * (tile * nb) + v * lanes)
                    kept = Unpacked(unpacked, scales, shifts, steps, first, inside)
                    self._tile(x, kept, rows, v, min(width, self.vectors - v), totals, at)
        self._write_rows(micro, totals, count, write)

    def _tile(
        self, x: Activations, kept: Unpacked, rows: list[Any], first: int, width: int, totals: Any, at: Any
    ) -> None:
        """Some rows times `width` vectors of unpacked columns, from vector `first` on, added to the totals at `at`.

        Totals stay in registers too, unless pieces are long: stores take more time than the products of a short piece.
        """
        lanes, nb = self.lanes, self.layout.n_block
        all_ = [(r, v) for r in range(len(rows)) for v in range(width)]
        total = {rv: e.scratch(lanes) for rv in all_ if self.layout.piece < _LONG}
        part = {rv: e.scratch(lanes) for rv in all_}
        for r, v in total:
            e.store(total[r, v], 0, e.load(totals, at + r * nb + v * lanes, lanes), lanes)
        with e.loop(kept.pieces) as q:
            for rv in all_:
                e.store(part[rv], 0, e.splat(0.0, lanes), lanes)
            starts = [e.let(row * x.stride + (kept.first + q) * kept.steps) for row in rows]
            base = e.let((q * kept.steps) * nb + first * lanes)
            if x.dot and self.caps.has_bf16_mma:  # a piece has an even number of steps
                multiply_bf16(
                    [[part[r, v] for v in range(width)] for r in range(len(rows))],
                    kept.steps,
                    lambda r, s, at=starts: e.load(x.data, at[r] + s, 2),
                    lambda s, v, at=base: e.load(kept.data, at + s * nb + v * lanes, lanes),
                )
            else:
                with e.loop(kept.steps) as s:
                    weights = [
                        e.let(e.load(kept.data, base + s * nb + v * lanes, lanes)) for v in range(width)
                    ]
                    for r, start in enumerate(starts):
                        a = e.let(e.splat(x.data[start + s], lanes))
                        for v in range(width):
                            old = e.load(part[r, v], 0, lanes)
                            new = e.dot_bf16(old, a, weights[v]) if x.dot else old + a * weights[v]
                            e.store(part[r, v], 0, new, lanes)
            for v in range(width):
                to = e.let(q * nb + (first + v) * lanes)
                scale = e.let(e.load(kept.scales, to, lanes))
                shift = None if kept.shifts is None else e.let(e.load(kept.shifts, to, lanes))
                for r, row in enumerate(rows):
                    buffer, index = (total[r, v], 0) if total else (totals, e.let(at + r * nb + v * lanes))
                    value = e.load(buffer, index, lanes) + e.load(part[r, v], 0, lanes) * scale
                    if shift is not None:
                        number = row * self.pieces + kept.first + q
                        value = value + shift * e.splat(x.sums[number], lanes)
                    e.store(buffer, index, value, lanes)
        for r, v in total:
            e.store(totals, at + r * nb + v * lanes, e.load(total[r, v], 0, lanes), lanes)

    def _unpack(self, x: Activations, to: Any, place: Any, s: Any, at: Any) -> None:
        """A step of a piece, as the micro-kernel reads it; the piece begins at `at`."""
        lanes, nb, codes = self.lanes, self.layout.n_block, self.codes
        step = codes.step(place, s, 0, self.vectors)
        for i in codes.turns:
            for v in range(self.vectors):
                values = [step.pairs(i, v)] if x.dot else step.floats(i, v)
                for h, value in enumerate(values):
                    line = (s * codes.each + i) * len(values) + h
                    e.store(to, at + line * nb + v * lanes, value, lanes)

    def _write_rows(self, micro: MicroKernel, totals: Any, count: Any, write: Write) -> None:
        nb, lanes = self.layout.n_block, self.lanes
        with e.loop(count) as r:
            acc = micro.new_accumulators(1)
            for v in range(self.vectors):
                e.store(acc[0][v], 0, e.load(totals, r * nb + v * lanes, lanes), lanes)
            write(micro, acc, [r])


def choose(ways: Sequence[tuple[int, Callable[[], None]]], count: Any, otherwise: Callable[[], None]) -> None:
    """The first way whose bound (ascending) is at least `count`, or else the other one."""
    if not ways:
        otherwise()
        return
    with T.If(count <= ways[0][0]):
        with T.Then():
            ways[0][1]()
        with T.Else():
            choose(ways[1:], count, otherwise)


def by_size(sizes: Sequence[int], count: Any, body: Callable[[int], None]) -> None:
    """body(size) for the smallest of the ascending sizes that is at least `count`; the largest is."""
    choose([(size, partial(body, size)) for size in sizes[:-1]], count, partial(body, sizes[-1]))


@contextmanager
def _loop_or_once(turns: int) -> Iterator[Any]:
    if turns == 1:
        yield e.i64(0)
        return
    with e.loop(turns) as i:
        yield i
