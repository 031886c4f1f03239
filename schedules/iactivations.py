"""Rows of activations as int8 with one scale per row: what the integer matmul kernels multiply with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.qlayout import OUTLIER_BYTES, QuantLayout
from llmc.schedules.tile_product import Rows

_APART = 64  # bytes between rows: those of a tile would fall into the same few sets of a cache
_SERIAL_ROWS = 2  # a parallel launch costs more than preparing this many rows
# a float32 this large has no fraction: adding it rounds to the nearest integer, ties to even, into the lowest bits
_ROUND = 1.5 * 2**23
SMALLEST = (
    1e-30  # rows whose largest magnitude is below count as zeros: the inverse of their scale might overflow
)


@dataclass(frozen=True)
class IntActivations:
    """x[row, column] is about data * scales[row].

    Attributes:
        data: flat int32 view of int8 [rows, padded_k]: four columns in each.
        stride: elements of it per row.
        scales: float32 [rows]; NaN or infinite where the row has such values.
        starts: int32 [rows, groups]: -offset times the sum of a group's int8 values.
        kept: float32 [rows, outliers]: the columns that are not rounded, which are 0 in data; None without outliers.
    """

    data: Any
    stride: int
    scales: Any
    starts: Any
    kept: Any = None


class Outliers:
    """The columns of a packed weight that are multiplied in floating point.

    Args:
        w: the packed weight as declared; `copies` of them behind one another (experts), which list the same columns.
    """

    def __init__(self, layout: QuantLayout, w: Any, copies: int = 1) -> None:
        self._layout, size = layout, copies * layout.size
        self._numbers = e.flat(w, size // 4, "int32")
        self._weights = e.flat(w, size // OUTLIER_BYTES, "bfloat16")

    def column(self, j: Any) -> Any:
        """Which column of x outlier j is."""
        return e.i64(self._numbers[self._layout.list_at // 4 + j])

    def weights(self, base: Any, j: Any, row: Any, lanes: int) -> Any:
        """float32 weights of outlier j, `lanes` rows from `row` on of the block at byte `base`."""
        first = (base + self._layout.outliers_at) // OUTLIER_BYTES
        at = first + j * self._layout.n_block + row
        data = self._weights[at] if lanes == 1 else e.load(self._weights, at, lanes)
        return e.widen(data, "bfloat16", lanes)


def quantize_rows(
    caps: Capabilities,
    layout: QuantLayout,
    in_dtype: str,
    x: Any,
    rows: Any,
    offset: int,
    outliers: Outliers | None = None,
    tiled: Rows | None = None,
) -> IntActivations:
    """Round rows of x to int8, symmetric: scale = largest magnitude / 127, value = round(x * (127 / magnitude)).

    Args:
        x: flat view in in_dtype, [rows, k]; columns up to padded_k become zeros.
        offset: of the weights' codes; see IntDot.
        outliers: columns that are kept as they are, and count as zeros otherwise.
        tiled: how data is to be laid out instead, then as int8; columns up to whole steps that are past padded_k are left as
            they were.

    A row of zeros (or of magnitudes below 1e-30) becomes zeros. A few rows are done serially, more over the threads.
    """
    k, padded, groups = layout.k, layout.padded_k, layout.groups
    stride = padded + _APART
    data = e.workspace(rows * stride if tiled is None else tiled.size(rows), "int8")
    scales = e.workspace(rows)
    starts = e.workspace(rows * groups, "int32")
    kept = None if outliers is None else e.workspace(rows * layout.outliers)

    def row(r: Any) -> None:
        source, begin = x, e.let(r * k)
        if k != padded or outliers is not None:
            source = e.workspace(padded, str(x.dtype))
            with e.loop(k) as j:
                e.store(source, j, x[begin + j], 1)
            with e.loop(k, padded) as j:
                e.store(source, j, tirx.const(0, str(x.dtype)), 1)
            begin = e.i64(0)
        if outliers is not None:
            with e.loop(layout.outliers) as j:
                column = e.let(outliers.column(j))
                e.store(kept, r * layout.outliers + j, e.widen(source[column], in_dtype, 1), 1)
                e.store(source, column, tirx.const(0, str(x.dtype)), 1)
        inverse = scale_of(caps, in_dtype, source, begin, padded, scales, r)
        with e.loop(groups) as g:
            at = e.let(g * layout.group)
            first = e.let(r * stride + at)

            def place(column: Any, first: Any = first, at: Any = at) -> Any:
                return first + column if tiled is None else tiled.place(r, at + column)

            total = _round_group(caps, in_dtype, source, begin + at, layout.group, inverse, data, place)
            e.store(starts, r * groups + g, tirx.Cast("int32", total) * e.const("int32", -offset, 1), 1)

    with T.If(rows <= _SERIAL_ROWS):
        with T.Then(), e.loop(rows) as r:
            row(r)
        with T.Else(), e.parallel(rows, caps) as r:
            row(r)
    flat = data if tiled is not None else e.flat(data, rows * (stride // 4), "int32")
    return IntActivations(flat, stride // 4, scales, starts, kept)


def scale_of(
    caps: Capabilities,
    in_dtype: str,
    source: Any,
    begin: Any,
    size: int,
    scales: Any,
    r: Any,
    top: float = 127.0,
) -> Any:
    """Store the scale of `size` elements to scales[r], largest magnitude / top; returns top / magnitude, or 0.

    Magnitudes are compared as bits: those of NaN are above those of infinity, and no NaN gets lost.
    """
    lanes = caps.lanes_f32
    largest = e.scratch(lanes, "int32")
    e.store(largest, 0, e.const("int32", 0, lanes), lanes)
    with e.loop(size // lanes) as j:
        value = e.widen(e.load(source, begin + j * lanes, lanes), in_dtype, lanes)
        bits = T.reinterpret(e.vec("int32", lanes), value)
        magnitude = T.bitwise_and(bits, e.const("int32", 0x7FFFFFFF, lanes))
        e.store(largest, 0, T.max(e.load(largest, 0, lanes), magnitude), lanes)
    most = e.let(T.reinterpret("float32", e.let(e.fold(e.load(largest, 0, lanes), lanes, T.max, "int32"))))
    e.store(scales, r, most / e.f32(top), 1)
    return e.let(tirx.Select(most > e.f32(SMALLEST), e.f32(top) / most, e.f32(0.0)))


def _round_group(
    caps: Capabilities,
    in_dtype: str,
    source: Any,
    begin: Any,
    size: int,
    inverse: Any,
    data: Any,
    place: Callable[[Any], Any],
) -> Any:
    """Round `size` elements, to data[place(number of the element)]; their sum as float32, which is exact."""
    lanes = caps.lanes_f32
    total = e.scratch(lanes)
    e.store(total, 0, e.splat(0.0, lanes), lanes)
    factor, begin = e.let(e.splat(inverse, lanes)), e.let(begin)
    fma = T.llvm_lookup_intrinsic_id("llvm.fma")
    with e.loop(size // lanes) as j:
        value = e.widen(e.load(source, begin + j * lanes, lanes), in_dtype, lanes)
        magic = e.splat(_ROUND, lanes)
        moved = e.let(T.call_llvm_pure_intrin(e.vec("float32", lanes), fma, value, factor, magic))
        # the low byte of the sum's bits is the integer; infinities and NaN leave some byte, and the scale tells
        low = tirx.Cast(e.vec("int8", lanes), T.reinterpret(e.vec("int32", lanes), moved))
        e.store(data, place(j * lanes), low, lanes)
        e.store(total, 0, e.load(total, 0, lanes) + (moved - magic), lanes)
    return e.let(e.fold(e.load(total, 0, lanes), lanes, lambda a, b: a + b))
