"""Activations as the kernels on quantized weights want them: converted, padded, in the order of the weight's inputs, summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules import emit as e
from llmc.schedules.qcodes import QuantCodes

_SERIAL_ROWS = 2  # a parallel launch costs more than preparing this many rows


@dataclass(frozen=True)
class Activations:
    """x as the multiply wants it.

    Attributes:
        data: flat; int32 pairs if `dot`, else float32; [rows, stride], or [stride, side] if `side`.
        stride: elements of it per row.
        dot: bf16 pairs for a two-way dot product.
        sums: sum over each piece of columns, float32 [rows, pieces]; for weights with zero points or offsets.
        side: rows that lie side by side, those past the last row of x zero; 0 = one after the other.
    """

    data: Any
    stride: int
    dot: bool
    sums: Any | None
    side: int = 0


def prepare(
    codes: QuantCodes,
    x: Any,
    rows: Any,
    in_dtype: str,
    dot: bool,
    side: int,
    order_of: Callable[[Any], Any],
) -> Activations:
    """x, converted, padded and reordered if need be.

    Args:
        codes: of the weight.
        x: flat view of the activations in in_dtype, [rows, k].
        dot: as bf16 pairs, else float32.
        side: see Activations.
        order_of: row -> index into codes.order where the order of its inputs begins.
    """
    return _Prepare(codes, x, rows, in_dtype, side, order_of).run(dot)


class _Prepare:
    def __init__(
        self,
        codes: QuantCodes,
        x: Any,
        rows: Any,
        in_dtype: str,
        side: int,
        order_of: Callable[[Any], Any],
    ) -> None:
        self.codes, self.layout, self.lanes = codes, codes.layout, codes.lanes
        self.x, self.rows, self.in_dtype, self.side, self.order_of = x, rows, in_dtype, side, order_of
        self.pieces = self.layout.padded_k // self.layout.piece

    def run(self, dot: bool) -> Activations:
        layout, side = self.layout, self.side
        k, padded = layout.k, layout.padded_k
        stride = padded // 2 if dot else padded
        rows = side or self.rows
        sums = e.workspace(rows * self.pieces) if self.codes.has_shift else None
        direct = not side and k == padded and not layout.of.order and (dot or self.in_dtype == "float32")
        if direct:
            data = e.flat(self.x, self.rows * stride, "int32") if dot else self.x
        else:
            data = e.workspace(rows * padded, "uint16" if dot else "float32")
        if not direct or sums is not None:
            self._each_row(rows, lambda r: self._prepare_row(r, None if direct else data, sums, side))
        if dot and not direct:
            data = e.flat(data, rows * stride, "int32")
        return Activations(data, stride, dot, sums, side)

    def _each_row(self, rows: Any, body: Callable[[Any], None]) -> None:
        with T.If(self.rows <= _SERIAL_ROWS):
            with T.Then(), e.loop(rows) as r:
                body(r)
            with T.Else(), e.parallel(rows, self.codes.caps) as r:
                body(r)

    def _prepare_row(self, r: Any, data: Any | None, sums: Any | None, side: int) -> None:
        k, padded, lanes = self.layout.k, self.layout.padded_k, self.lanes
        source = e.let(r * k)
        # rows past the last one are zeros
        valid = e.let(tirx.Select(r < self.rows, e.i64(k), e.i64(0))) if side else e.i64(k)
        order = self.codes.order
        first = None if order is None else self.order_of(r)

        def element(j: Any) -> Any:
            return self.x[source + (j if order is None else e.i64(order[first + j]))]

        if data is not None:
            widened = str(data.dtype) == "float32"
            # pairs of two rows lie side by side too
            pair = 1 if widened else 2

            def converted(value: Any, width: int) -> Any:
                return e.widen(value, self.in_dtype, width) if widened else value

            def place(j: Any) -> Any:
                return (j // pair * side + r) * pair + j % pair if side else r * padded + j

            done: Any = e.i64(0)
            if not side and order is None:
                with e.loop(k // lanes) as j:
                    value = e.load(self.x, source + j * lanes, lanes)
                    e.store(data, r * padded + j * lanes, converted(value, lanes), lanes)
                done = k // lanes * lanes
            with e.loop(done, valid) as j:
                e.store(data, place(j), converted(element(j), 1), 1)
            with e.loop(valid, padded) as j:
                e.store(data, place(j), tirx.const(0, str(data.dtype)), 1)
        if sums is not None:
            self._sum_pieces(r, element, source, valid, sums)

    def _sum_pieces(self, r: Any, element: Callable[[Any], Any], source: Any, valid: Any, sums: Any) -> None:
        """sums[r, p] of each piece of a row of x, `valid` elements from `source` on."""
        piece, lanes = self.layout.piece, self.lanes
        total, vector = e.scratch(1), e.scratch(lanes)
        with e.loop(self.pieces) as p:
            e.store(total, 0, e.f32(0.0), 1)
            begin = e.let(p * piece)
            end = e.let(T.max(begin, T.min(begin + piece, valid)))
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
