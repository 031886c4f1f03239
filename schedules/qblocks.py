"""Rows of activations times blocks of a quantized weight: what the kernels on quantized weights have in common.

Few rows are multiplied while codes are unpacked in registers, each weight once for all of them. Many rows share
columns that are unpacked into the second-level cache, and run the plain micro-kernel over them. Either way a
piece of columns with one scale is summed up in registers, and then added, scaled, to float32 totals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.factivations import round_rows
from llmc.schedules.layout import BlockedLayout
from llmc.schedules.matrix_tile import multiply_bf16
from llmc.schedules.micro_kernel import MicroKernel, for_tiles
from llmc.schedules.qactivations import Activations, prepare
from llmc.schedules.qcodes import QuantCodes
from llmc.schedules.qlayout import UNIT, QuantLayout

ROWS = 8  # of a tile of many rows, at most
FEW = 48  # up to so many rows unpack in registers
_CHUNK = 512  # columns of bf16 that many rows share unpacked: of a vector, half of a first-level cache
_PASS = 256  # columns that the first-level cache holds for few rows
_LINES = 128  # bytes of the next chunk that a tile of many rows asks for

RowOf = Callable[[Any], Any]
Write = Callable[[MicroKernel, list[list[Any]], list[Any]], None]


@dataclass(frozen=True)
class Unpacked:
    """Pieces of a block as floats.

    Attributes:
        data: [vectors, at most `part` / lanes steps, lanes]; bf16 pairs as int32, or float32.
        part: elements from a vector to the next.
        scales, shifts: float32 [pieces, n_block].
        steps: of a piece.
        first: the number of the first piece.
        pieces: how many.
    """

    data: Any
    part: int
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
        self.copy_bytes = layout.size
        self.codes = QuantCodes(caps, layout, w, copies * self.copy_bytes)
        self.lanes, self.vectors = self.codes.lanes, self.codes.vectors
        self.pieces = layout.padded_k // layout.piece
        # steps of a piece
        self.steps = self.codes.steps * layout.piece // UNIT
        # rounded to e4m3, activations of any type are exact in bf16
        self.rounds = layout.of.activations is not None
        self.dot = (in_dtype == "bfloat16" or self.rounds) and self.codes.by_pairs

    def parallel(self, extent: Any) -> Any:
        """e.parallel with the functions that unpacking needs."""
        return T.parallel(e.i64(extent), annotations=self.codes.import_text())

    def prepare(self) -> Activations:
        """x, converted, padded and reordered if need be; or rounded."""
        if self.rounds:
            return round_rows(self.caps, self.layout, self.in_dtype, self.x, self.rows, self.dot)
        return prepare(self.codes, self.x, self.rows, self.in_dtype, self.dot, self._order_of)

    def _order_of(self, r: Any) -> Any:
        """Where the order of the inputs that row r of x is multiplied with begins, in elements."""
        first = self.layout.list_at // 4
        if self.copy_of is None:
            return e.i64(first)
        return e.let(self.copy_of(r) * (self.copy_bytes // 4) + first)

    def micro(self, x: Activations, scratch: Any) -> MicroKernel:
        """The plain micro-kernel over unpacked columns; also what stores results."""
        layout = BlockedLayout(self.layout.n_block, 2 if x.dot else 1)
        dtype = "bfloat16" if x.dot else "float32"
        return MicroKernel(self.caps, layout, dtype, self.layout.padded_k, x.data, scratch, 0)

    def multiply(self, x: Activations, count: Any, most: int, base: Any, row_of: RowOf, write: Write) -> None:
        """Rows row_of(0 .. count - 1) of x times the block whose bytes begin at `base`.

        Args:
            most: upper bound of count.
            write: gets (micro-kernel, accumulators, [row]) of each row once it is complete.
        """
        with T.If(count <= FEW):
            with T.Then():
                self.few(x, count, min(most, FEW), base, row_of, write)
            with T.Else():
                self.many(x, count, most, base, row_of, write)

    def few(self, x: Activations, count: Any, most: int, base: Any, row_of: RowOf, write: Write) -> None:
        """Rows row_of(0 .. count - 1) of x times the block whose bytes begin at `base`; codes unpacked in registers.

        Columns are taken in passes that the first-level cache holds for the further tiles of rows.
        """
        lanes, nb = self.lanes, self.layout.n_block
        totals = self._new_totals(count, most)
        per_pass = max(1, _PASS // self.layout.piece)
        with e.loop(-(-self.pieces // per_pass)) as c:
            first = e.let(c * per_pass)
            inside = e.let(T.min(e.i64(per_pass), self.pieces - first))

            def tile_of(rows: int, start: Any) -> None:
                index = [e.let(row_of(start + r)) for r in range(rows)]
                width = next(
                    v for v in (4, 2, 1) if self.vectors % v == 0 and (v * rows <= self._few_rows or v == 1)
                )
                with e.loop_or_once(self.vectors // width) as part_of:
                    at = e.let(part_of * (width * lanes))
                    self._few_tile(
                        x, index, base, (first, inside), (at, width), totals, e.let(start * nb + at)
                    )

            for_tiles(self._few_rows, count, tile_of)
        self._write_rows(self.micro(x, self.codes.bytes), totals, count, row_of, write)

    def _new_totals(self, count: Any, most: int) -> Any:
        """Zeros, float32 [count, n_block]."""
        totals = e.workspace(most * self.layout.n_block)
        with e.loop(count * self.vectors) as i:
            e.store(totals, i * self.lanes, e.splat(0.0, self.lanes), self.lanes)
        return totals

    @property
    def _few_rows(self) -> int:
        """Rows of a tile that unpacks codes on the way: sums and totals of a vector of outputs each."""
        return self.caps.vector_registers // 4

    def _few_tile(
        self,
        x: Activations,
        rows: list[Any],
        base: Any,
        pieces: tuple[Any, Any],
        outputs: tuple[Any, int],
        totals: Any,
        to: Any,
    ) -> None:
        """Adds rows times a range of pieces to their totals.

        Args:
            rows: of x.
            pieces: the first one and how many.
            outputs: the first one and how many vectors.
            to: where the totals of the first row and output are.
        """
        lanes, nb, codes = self.lanes, self.layout.n_block, self.codes
        (first, inside), (row, width) = pieces, outputs
        all_ = [(r, v) for r in range(len(rows)) for v in range(width)]
        total = {rv: e.scratch(lanes) for rv in all_}
        part = {rv: e.scratch(lanes) for rv in all_}
        for r, v in all_:
            e.store(total[r, v], 0, e.load(totals, to + r * nb + v * lanes, lanes), lanes)
        starts = [e.let(r * x.stride) for r in rows]
        # with more than one row there is time to read the next pass
        ahead = (
            self.prefetch
            if len(rows) == 1
            else max(self.prefetch, self._bytes_of(max(1, _PASS // self.layout.piece)))
        )
        step_columns = codes.each * (1 if x.dot else 2)
        with e.loop(inside) as q:
            p = e.let(first + q)
            place = codes.place(base, p)
            for rv in all_:
                e.store(part[rv], 0, e.splat(0.0, lanes), lanes)
            with e.loop(self.steps) as s:
                step = codes.step(place, s, row, width)
                self._prefetch(place, s, row, width, ahead)
                at = e.let((p * self.steps + s) * step_columns)
                # chains of values, not of stores: a quarter of the statements, which passes over TIR are slow at
                sums = {rv: e.load(part[rv], 0, lanes) for rv in all_}
                for i in codes.turns:
                    for h, values in enumerate(self._values(x, step, i)):
                        column = i if x.dot else 2 * i + h
                        for r, start in enumerate(starts):
                            a = e.let(e.splat(x.data[start + at + column], lanes))
                            for v in range(width):
                                old = sums[r, v]
                                new = e.dot_bf16(old, values[v], a) if x.dot else old + a * values[v]
                                sums[r, v] = e.let(new)
                for rv in all_:
                    e.store(part[rv], 0, sums[rv], lanes)
            for v in range(width):
                output = e.let(row + v * lanes)
                scale = e.let(codes.scale(place.scales, output, lanes, place.tops))
                shift = e.let(codes.shift(place, output, lanes, scale)) if x.sums is not None else None
                for r, number in enumerate(rows):
                    product = e.load(part[r, v], 0, lanes) * scale
                    if x.scales is not None:
                        product = product * e.splat(x.scale(number, p, self.pieces), lanes)
                    value = e.load(total[r, v], 0, lanes) + product
                    if shift is not None:
                        value = value + shift * e.splat(x.sums[number * self.pieces + p], lanes)
                    e.store(total[r, v], 0, value, lanes)
        for r, v in all_:
            e.store(totals, to + r * nb + v * lanes, e.load(total[r, v], 0, lanes), lanes)

    def _values(self, x: Activations, step: Any, i: int) -> list[list[Any]]:
        """Column pair i of a step for each of its vectors: once as pairs, or its even and its odd column."""
        if x.dot:
            return [[e.let(step.pairs(i, v)) for v in range(step.vectors)]]
        both = [[e.let(f) for f in step.floats(i, v)] for v in range(step.vectors)]
        return [[values[h] for values in both] for h in (0, 1)]

    def _bytes_of(self, pieces: int) -> int:
        """About the bytes of so many pieces of a block."""
        return self.block_bytes * pieces // self.pieces

    def _prefetch(self, place: Any, s: Any, row: Any, width: int, ahead: int) -> None:
        """Ask for the share of the stream that a step of `width` vectors from output `row` on stands for."""
        if not ahead:
            return
        size = self.layout.unit_bytes // self.codes.steps
        at = e.let(place.units + (place.step + s) * size + row * size // self.layout.n_block + ahead)
        for line in range(0, size * width // self.vectors, 64):
            e.prefetch(self.codes.bytes, at + line)

    def many(self, x: Activations, count: Any, most: int, base: Any, row_of: RowOf, write: Write) -> None:
        """As `few`, but columns are unpacked into the second-level cache once for all rows.

        Rows are multiplied with one vector of outputs at a time, whose columns the first-level cache holds.
        """
        layout, lanes, nb, codes = self.layout, self.lanes, self.layout.n_block, self.codes
        steps = layout.piece // 2 if x.dot else layout.piece
        per_chunk = min(self.pieces, max(1, (_CHUNK if x.dot else _CHUNK // 2) // layout.piece))
        part = per_chunk * steps * lanes
        unpacked = e.workspace(self.vectors * part, "int32" if x.dot else "float32")
        scales = e.workspace(per_chunk * nb)
        shifts = e.workspace(per_chunk * nb) if x.sums is not None else None
        micro = self.micro(x, unpacked)
        # sums and totals, beside the weights and a row's value
        tile = min(ROWS, (self.caps.vector_registers - 3) // 2)
        totals = self._new_totals(count, most)
        with e.loop(-(-self.pieces // per_chunk)) as c:
            first = e.let(c * per_chunk)
            inside = (
                per_chunk if self.pieces % per_chunk == 0 else e.let(T.min(per_chunk, self.pieces - first))
            )
            with e.loop(inside) as q:
                place = codes.place(base, e.let(first + q))
                with e.loop(self.steps) as s:
                    self._unpack(x, unpacked, place, s, e.let(q * steps * lanes), part)
                for v in range(self.vectors):
                    scale = e.let(codes.scale(place.scales, v * lanes, lanes, place.tops))
                    e.store(scales, q * nb + v * lanes, scale, lanes)
                    if shifts is not None:
                        e.store(
                            shifts, q * nb + v * lanes, codes.shift(place, v * lanes, lanes, scale), lanes
                        )
            kept = Unpacked(unpacked, part, scales, shifts, steps, first, inside)
            with e.loop_or_once(self.vectors) as v:
                ahead = e.let(base + (first + per_chunk) * self._bytes_of(1) + v * (count // tile * _LINES))

                def tile_of(rows: int, start: Any, v: Any = v, ahead: Any = ahead, kept: Any = kept) -> None:
                    index = [e.let(row_of(start + r)) for r in range(rows)]
                    for line in range(0, _LINES, 64):
                        e.prefetch(codes.bytes, ahead + start // tile * _LINES + line)
                    self._tile(x, kept, index, v, totals, e.let(start * nb + v * lanes))

                for_tiles(tile, count, tile_of)
        self._write_rows(micro, totals, count, row_of, write)

    def _tile(self, x: Activations, kept: Unpacked, rows: list[Any], v: Any, totals: Any, at: Any) -> None:
        """Some rows times vector v of unpacked columns, added to the totals at `at`.

        Totals stay in registers too: stores take more time than the products of a short piece.
        """
        lanes, nb = self.lanes, self.layout.n_block
        total = [e.scratch(lanes) for _ in rows]
        part = [e.scratch(lanes) for _ in rows]
        for r, vector in enumerate(total):
            e.store(vector, 0, e.load(totals, at + r * nb, lanes), lanes)
        bases = [e.let(row * x.stride + kept.first * kept.steps) for row in rows]
        with e.loop(kept.pieces) as q:
            for vector in part:
                e.store(vector, 0, e.splat(0.0, lanes), lanes)
            starts = [e.let(start + q * kept.steps) for start in bases]
            base = e.let(v * kept.part + q * (kept.steps * lanes))
            if x.dot and self.caps.has_bf16_mma and len(rows) > 1:  # a piece has an even number of steps
                multiply_bf16(
                    [[vector] for vector in part],
                    kept.steps,
                    lambda r, s, at=starts: e.load(x.data, at[r] + s, 2),
                    lambda s, v, at=base: e.load(kept.data, at + s * lanes, lanes),
                )
            else:
                with e.loop(kept.steps) as s:
                    weights = e.let(e.load(kept.data, base + s * lanes, lanes))
                    for vector, start in zip(part, starts, strict=True):
                        a = e.let(e.splat(x.data[start + s], lanes))
                        old = e.load(vector, 0, lanes)
                        new = e.dot_bf16(old, weights, a) if x.dot else old + a * weights
                        e.store(vector, 0, new, lanes)
            to = e.let(q * nb + v * lanes)
            scale = e.let(e.load(kept.scales, to, lanes))
            shift = None if kept.shifts is None else e.let(e.load(kept.shifts, to, lanes))
            for r, row in enumerate(rows):
                product = e.load(part[r], 0, lanes) * scale
                if x.scales is not None:
                    product = product * e.splat(x.scale(row, kept.first + q, self.pieces), lanes)
                value = e.load(total[r], 0, lanes) + product
                if shift is not None:
                    number = row * self.pieces + kept.first + q
                    value = value + shift * e.splat(x.sums[number], lanes)
                e.store(total[r], 0, value, lanes)
        for r, vector in enumerate(total):
            e.store(totals, at + r * nb, e.load(vector, 0, lanes), lanes)

    def _unpack(self, x: Activations, to: Any, place: Any, s: Any, at: Any, part: int) -> None:
        """A step of a piece, as _tile reads it; the piece begins at `at`, vectors are `part` elements apart."""
        lanes, codes = self.lanes, self.codes
        step = codes.step(place, s, 0, self.vectors)
        for i in codes.turns:
            for h, values in enumerate(self._values(x, step, i)):
                line = (s * codes.each + i) * (1 if x.dot else 2) + h
                for v, value in enumerate(values):
                    e.store(to, v * part + at + line * lanes, value, lanes)

    def _write_rows(self, micro: MicroKernel, totals: Any, count: Any, row_of: RowOf, write: Write) -> None:
        nb, lanes = self.layout.n_block, self.lanes
        with e.loop(count) as r:
            acc = micro.new_accumulators(1)
            for v in range(self.vectors):
                e.store(acc[0][v], 0, e.load(totals, r * nb + v * lanes, lanes), lanes)
            write(micro, acc, [e.let(row_of(r))])
