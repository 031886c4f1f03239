"""Rows of activations as e4m3 numbers with scales: what weights are multiplied with whose scheme rounds both to fp8.

These machines have no products of fp8, but bfloat16 and float32 hold such numbers and their products exactly.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import e4m3
from llmc.schedules import emit as e
from llmc.schedules.iactivations import scale_of
from llmc.schedules.qactivations import APART, SERIAL_ROWS, Activations
from llmc.schedules.qlayout import QuantLayout


def round_rows(
    caps: Capabilities, layout: QuantLayout, in_dtype: str, x: Any, rows: Any, dot: bool
) -> Activations:
    """Rows of x rounded to e4m3: scale = largest magnitude / 448 of a row or group, value = nearest(x * (448 / magnitude)).

    Args:
        x: flat view in in_dtype, [rows, k]; columns up to padded_k become zeros.
        dot: as bf16 pairs, else float32.

    A row or group of zeros (or of magnitudes below 1e-30) becomes zeros. A few rows are done serially, more over the threads.
    """
    k, padded, groups, lanes = layout.k, layout.padded_k, layout.groups, caps.lanes_f32
    stride = padded + APART // (2 if dot else 4)
    data = e.workspace(rows * stride, "uint16" if dot else "float32")
    scales = e.workspace(rows * groups)

    def row(r: Any) -> None:
        source, begin = x, e.let(r * k)
        if k != padded:
            source = e.workspace(padded, str(x.dtype))
            with e.loop(k) as j:
                e.store(source, j, x[begin + j], 1)
            with e.loop(k, padded) as j:
                e.store(source, j, tirx.const(0, str(x.dtype)), 1)
            begin = e.i64(0)
        with e.loop(groups) as g:
            first, to = e.let(begin + g * layout.group), e.let(r * stride + g * layout.group)
            inverse = scale_of(
                caps, in_dtype, source, first, layout.group, scales, r * groups + g, e4m3.LARGEST
            )
            factor = e.let(e.splat(inverse, lanes))
            with e.loop(layout.group // lanes) as j:
                value = e.widen(e.load(source, first + j * lanes, lanes), in_dtype, lanes)
                rounded = e4m3.nearest(value * factor, lanes)
                if dot:
                    bits = T.reinterpret(e.vec("uint32", lanes), rounded)
                    high = T.shift_right(bits, e.const("uint32", 16, lanes))
                    rounded = tirx.Cast(e.vec("uint16", lanes), high)
                e.store(data, to + j * lanes, rounded, lanes)

    with T.If(rows <= SERIAL_ROWS):
        with T.Then(), e.loop(rows) as r:
            row(r)
        with T.Else(), e.parallel(rows, caps) as r:
            row(r)
    if dot:
        stride //= 2
        data = e.flat(data, rows * stride, "int32")
    return Activations(data, stride, dot, None, scales, groups)
