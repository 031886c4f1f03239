"""Sums of integer products on their way: between passes in memory, in a tile in registers, in the end scaled and written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.iactivations import IntActivations, Outliers, quantize_rows
from llmc.schedules.idot import IntDot
from llmc.schedules.qcodes import QuantCodes
from llmc.schedules.qlayout import UNIT, QuantLayout

Vectors = list[list[Any]]
RowOf = Callable[[Any], Any]
Write = Callable[[Vectors, list[Any]], None]


class IntSums:
    """Sums of rows of int8 activations times blocks of a weight in quads.

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

    def _bytes_to(self, column: Any) -> Any:
        """Where a column that begins a group (without groups: a unit) lies in a block."""
        each, size = (
            (self.layout.group, self.layout.group_bytes) if self.grouped else (UNIT, self.layout.unit_bytes)
        )
        return column // each * size

    def _pass_columns(self, columns: int) -> Any:
        """At least a group."""
        return max(columns, self.layout.group) if self.grouped else columns
