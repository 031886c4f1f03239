"""Activations as the kernels on quantized weights want them: converted, padded, in the order of the weight's inputs, summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules import emit as e
from llmc.schedules.qcodes import QuantCodes

SERIAL_ROWS = 4  # a parallel launch costs more than preparing this many rows
APART = 64  # bytes between rows: those of a tile would fall into the same few sets of a cache


@dataclass(frozen=True)
class Activations:
    """x as the multiply wants it.

    Attributes:
        data: flat; int32 pairs if `dot`, else float32; [rows, stride].
        stride: elements of it per row.
        dot: bf16 pairs for a two-way dot product.
        sums: sum over each piece of columns, float32 [rows, pieces]; for weights with zero points or offsets.
        scales: what data has to be multiplied with, float32 [rows, groups]; None = nothing, they are not rounded.
        groups: of a row.
    """

    data: Any
    stride: int
    dot: bool
    sums: Any | None
    scales: Any | None = None
    groups: int = 1

    def scale(self, row: Any, p: Any, pieces: int) -> Any:
        """Of piece p of a row, which has `pieces` of them."""
        return self.scales[row * self.groups + p // (pieces // self.groups)]


def prepare(
    codes: QuantCodes,
    x: Any,
    rows: Any,
    in_dtype: str,
    dot: bool,
    order_of: Callable[[Any], Any],
) -> Activations:
    """x, converted, padded and reordered if need be.

    Args:
        codes: of the weight.
        x: flat view of the activations in in_dtype, [rows, k].
        dot: as bf16 pairs, else float32.
        order_of: row -> index into codes.order where the order of its inputs begins.
    """
    return _Prepare(codes, x, rows, in_dtype, order_of).run(dot)


class _Prepare:
    def __init__(
        self,
        codes: QuantCodes,
        x: Any,
        rows: Any,
        in_dtype: str,
        order_of: Callable[[Any], Any],
    ) -> None:
        self.codes, self.layout, self.lanes = codes, codes.layout, codes.lanes
        self.x, self.rows, self.in_dtype, self.order_of = x, rows, in_dtype, order_of
        self.pieces = self.layout.padded_k // self.layout.piece

    def run(self, dot: bool) -> Activations:
        padded, rows = self.layout.padded_k, self.rows
        item = 2 if dot else 4
        stride = padded + APART // item
        sums = e.workspace(rows * self.pieces) if self.codes.has_shift else None
        data = e.workspace(rows * stride, "uint16" if dot else "float32")
        with T.If(rows <= SERIAL_ROWS):
            with T.Then(), e.loop(rows) as r:
                self._prepare_row(r, data, stride, sums)
            with T.Else(), e.parallel(rows, self.codes.caps) as r:
                self._prepare_row(r, data, stride, sums)
        if dot:
            stride //= 2
            data = e.flat(data, rows * stride, "int32")
        return Activations(data, stride, dot, sums)

    def _prepare_row(self, r: Any, data: Any, stride: int, sums: Any | None) -> None:
        k, padded, lanes = self.layout.k, self.layout.padded_k, self.lanes
        source, to = e.let(r * k), e.let(r * stride)
        order = self.codes.order
        first = None if order is None else self.order_of(r)
        widened = str(data.dtype) == "float32"

        def element(j: Any) -> Any:
            return self.x[source + (j if order is None else e.i64(order[first + j]))]

        def converted(value: Any, width: int) -> Any:
            return e.widen(value, self.in_dtype, width) if widened else value

        done = 0
        if order is None:
            width = lanes if widened else 2 * lanes
            with e.loop(k // width) as j:
                value = e.load(self.x, source + j * width, width)
                e.store(data, to + j * width, converted(value, width), width)
            done = k // width * width
        with e.loop(done, k) as j:
            e.store(data, to + j, converted(element(j), 1), 1)
        with e.loop(k, padded) as j:
            e.store(data, to + j, tirx.const(0, str(data.dtype)), 1)
        if sums is not None:
            self._sum_pieces(r, element, source, sums)

    def _sum_pieces(self, r: Any, element: Callable[[Any], Any], source: Any, sums: Any) -> None:
        """sums[r, p] of each piece of the row of x that begins at `source`."""
        piece, lanes = self.layout.piece, self.lanes
        total, vector = e.scratch(1), e.scratch(lanes)
        with e.loop(self.pieces) as p:
            e.store(total, 0, e.f32(0.0), 1)
            begin = e.let(p * piece)
            end = e.let(T.max(begin, T.min(begin + piece, e.i64(self.layout.k))))
            done = begin
            if self.codes.order is None and piece % lanes == 0:
                e.store(vector, 0, e.splat(0.0, lanes), lanes)
                whole = e.let((end - begin) // lanes)
                with e.loop(whole) as j:
                    value = e.load(self.x, source + begin + j * lanes, lanes)
                    value = e.load(vector, 0, lanes) + e.widen(value, self.in_dtype, lanes)
                    e.store(vector, 0, value, lanes)
                e.store(total, 0, e.fold(e.load(vector, 0, lanes), lanes, lambda a, b: a + b), 1)
                done = e.let(begin + whole * lanes)
            with e.loop(done, end) as j:
                e.store(total, 0, total[0] + e.widen(element(j), self.in_dtype, 1), 1)
            e.store(sums, r * self.pieces + p, total[0], 1)
