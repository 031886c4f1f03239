"""Matrix times quantized weight with int8 activations: a launch that rounds the rows of x, then integer products.

The rounding is that of llmc.schedules.iactivations, so that the integers are the same on every machine. Products go through
the matrix units 32 columns at a time (mma.m16n8k32): thread q of the four that share a row takes columns 8q to 8q + 7, which
are 8 bytes of x and one word of 4-bit codes (two of 8-bit codes).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.qcodes import ThreadCodes
from llmc.schedules.gpu.qgemm import TILES, Tiles, launch
from llmc.schedules.gpu.qoperands import Operands
from llmc.schedules.iactivations import SMALLEST
from llmc.schedules.qlayout import QuantLayout

_THREADS = 128
_ROUND = """
__device__ __forceinline__ signed char llmc_round_byte(float x, float factor) {
  return (signed char)(__float_as_int(__fmaf_rn(x, factor, 12582912.0f)) & 255);
}
"""


def quantize_rows(ops: Operands) -> None:
    """Launch over rows: ops.rounded int8 [T, padded_k] and ops.row_scales float32 [T] of ops.x."""
    cfg, layout = ops.cfg, ops.cfg.layout
    k, padded = layout.k, layout.padded_k
    rounded, scales = e.workspace(ops.t * padded, "int8"), e.workspace(ops.t)
    with g.launch(ops.t, _THREADS) as (row, thread):
        scratch = g.shared(_THREADS // g.WARP, "int32", "scratch")
        largest = g.local(1, "int32")
        e.store(largest, 0, g.i32(0), 1)

        def value_of(j: Any) -> Any:
            return e.let(e.widen(ops.x[row * k + j], cfg.in_dtype, 1))

        left_out = _outliers(ops, thread)

        def compare(j: Any) -> None:
            # as bits: those of NaN are above those of infinity, and no NaN gets lost
            bits = T.bitwise_and(T.reinterpret("int32", value_of(j)), g.i32(0x7FFFFFFF))
            if left_out is not None:
                bits = tirx.Select(left_out[j] != 0, g.i32(0), bits)
            e.store(largest, 0, T.max(largest[0], bits), 1)

        g.strided(thread, k, _THREADS, compare)
        g.block_reduce(largest, scratch, thread, _THREADS, T.max)
        most = e.let(T.reinterpret("float32", largest[0]))
        factor = e.let(tirx.Select(most > e.f32(SMALLEST), e.f32(127.0) / most, e.f32(0.0)))
        with g.when(thread == 0):
            e.store(scales, row, most / e.f32(127.0), 1)

        def write(j: Any) -> None:
            inside = T.min(j, e.i64(k - 1))
            byte = g.device_call("llmc_round_byte", _ROUND, value_of(inside), factor, result="int8")
            there = j < k if left_out is None else T.And(j < k, left_out[inside] == 0)
            e.store(rounded, row * padded + j, tirx.Select(there, byte, tirx.IntImm("int8", 0)), 1)

        g.strided(thread, padded, _THREADS, write)
    ops.rounded, ops.row_scales, ops.rounded_to = rounded, scales, "int8"


def _outliers(ops: Operands, thread: Any) -> Any | None:
    """Marks of the columns that are multiplied in floating point, in shared memory; None if there are none."""
    layout = ops.cfg.layout
    if not layout.outliers:
        return None
    marks = g.shared(layout.k, "int8", "left_out")
    g.strided(thread, layout.k, _THREADS, lambda j: e.store(marks, j, tirx.IntImm("int8", 0), 1))
    g.barrier()

    def mark(j: Any) -> None:
        e.store(marks, e.i64(ops.listed[ops.list_at + j]), tirx.IntImm("int8", 1), 1)

    g.strided(thread, layout.outliers, _THREADS, mark)
    g.barrier()
    return marks


def gemm(ops: Operands, caps: Capabilities, tiles: int, warps: int) -> None:
    """One launch over all of y, after quantize_rows; arguments as of qgemm.launch."""
    launch(ops, caps, Block, tiles, warps)


class Block(Tiles):
    """Bytes of activations and weights."""

    sums = "int32"

    def __init__(
        self, ops: Operands, caps: Capabilities, codes: ThreadCodes, tiles: int, warps: int, thread: Any
    ) -> None:
        words = codes.padded_k // 4
        x = e.flat(ops.rounded, ops.t * words, "uint32")
        super().__init__(ops, caps, codes, tiles, warps, thread, x, words, 4)
        self.layout = ops.cfg.layout

    def product(self, part: Any, scale: Any) -> Any:
        return tirx.Cast("float32", part) * scale

    def multiply(self, part: list[Any], words: list[Any], x: list[Any], zeros: list[Any]) -> None:
        for j in range(TILES):
            low, high = (signed_bytes(words[2 * j + half][0], self.layout) for half in range(2))
            for i in range(self.tiles):
                unit.mma_bytes(part[i][j], [low[0], high[0], low[1], high[1]], [x[i][0], x[i][1]])


def signed_bytes(words: list[Any], layout: QuantLayout) -> list[Any]:
    """Columns 0 to 3 and 4 to 7 as signed bytes, of the words that ThreadCodes.words gives for eight."""
    high = g.u32(0x80808080)
    if layout.of.bits == 8:
        return [e.let(T.bitwise_xor(w, high)) for w in words]
    low = g.u32(0x0F0F0F0F)
    nibbles = [T.bitwise_and(words[0], low), T.bitwise_and(T.shift_right(words[0], g.u32(4)), low)]
    # each byte less 8, with no borrow from the next one
    return [e.let(T.bitwise_xor(T.bitwise_or(n, high) - g.u32(0x08080808), high)) for n in nibbles]
