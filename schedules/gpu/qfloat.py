"""Matrix times e4m3 weight with e4m3 activations: a launch that rounds the rows of x, then products on fp8 matrix units.

Units add products of e4m3 with fewer bits than float32 has: about 14 on Hopper (DeepSeek-V3, arXiv 2412.19437, section
3.3.2), 13 of mantissa on Ada and Hopper by another measurement (SageAttention2, arXiv 2411.10958). So sums of 128 columns
are added up in float32 registers, as DeepSeek's kernels do. Where the assembler makes float16 products of the instruction,
they are exact.

Machines without the instruction get e4m3 numbers as bfloat16, which holds them exactly, and the matmuls of qgemm and qgemv.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities, Fp8Mma
from llmc.quant.schemes import Code
from llmc.schedules import e4m3
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.qcodes import ThreadCodes
from llmc.schedules.gpu.qgemm import TILES, Tiles, launch
from llmc.schedules.gpu.qoperands import Operands
from llmc.schedules.iactivations import SMALLEST
from llmc.schedules.qlayout import QuantLayout

PROMOTED = 128  # columns whose products the matrix units add up by themselves
_THREADS = 128
_MOST_TILES = 4
_TO_E4M3 = """
__device__ __forceinline__ unsigned char llmc_to_e4m3(float x, float factor) {
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(__fmul_rn(x, factor)));
  return (unsigned char)(pair & 255);
}
"""
# not to be contracted, nor to be simplified
_MULTIPLY = """
__device__ __forceinline__ float llmc_multiply(float a, float b) { return __fmul_rn(a, b); }
"""
_ADD = """
__device__ __forceinline__ float llmc_add(float a, float b) { return __fadd_rn(a, b); }
"""


def quantize_rows(ops: Operands, caps: Capabilities) -> None:
    """Launch over rows: ops.rounded [T, padded_k] and ops.row_scales float32 [T, groups] of ops.x."""
    layout = ops.cfg.layout
    k, padded, group, groups = layout.k, layout.padded_k, layout.group, layout.groups
    has_codes = caps.fp8_mma is not Fp8Mma.NONE
    rounded = e.workspace(ops.t * padded, "uint8" if has_codes else "uint16")
    scales = e.workspace(ops.t * groups)
    # a warp for each group, or the whole block for a row
    workers = _THREADS // g.WARP if groups > 1 else 1
    threads = _THREADS // workers
    with g.launch(ops.t, _THREADS) as (row, thread):
        scratch = g.shared(_THREADS // g.WARP, "int32", "scratch") if workers == 1 else None
        largest = g.local(1, "int32")

        def value_of(j: Any) -> Any:
            return e.let(e.widen(ops.x[row * k + j], ops.cfg.in_dtype, 1))

        def one(number: Any) -> None:
            first, mine = e.let(number * group), e.let(thread % threads)
            e.store(largest, 0, g.i32(0), 1)

            def compare(j: Any) -> None:
                # as bits: those of NaN are above those of infinity, and no NaN gets lost
                bits = T.bitwise_and(T.reinterpret("int32", value_of(first + j)), g.i32(0x7FFFFFFF))
                e.store(largest, 0, T.max(largest[0], bits), 1)

            g.strided(mine, T.min(e.i64(group), k - first), threads, compare)
            if scratch is None:
                g.warp_reduce(largest, T.max)
            else:
                g.block_reduce(largest, scratch, thread, _THREADS, T.max)
            most = e.let(T.reinterpret("float32", largest[0]))
            top = e.f32(e4m3.LARGEST)
            factor = e.let(tirx.Select(most > e.f32(SMALLEST), top / most, e.f32(0.0)))
            with g.when(mine == 0):
                e.store(scales, row * groups + number, most / top, 1)

            def write(j: Any) -> None:
                column = e.let(first + j)
                value = value_of(T.min(column, e.i64(k - 1)))
                made = _code(value, factor) if has_codes else _number(value, factor)
                zero = tirx.IntImm(str(rounded.dtype), 0)
                e.store(rounded, row * padded + column, tirx.Select(column < k, made, zero), 1)

            g.strided(mine, group, threads, write)

        if workers == 1:
            one(e.i64(0))
        else:
            g.strided(thread // threads, groups, workers, one)
    ops.rounded, ops.row_scales, ops.groups = rounded, scales, groups
    ops.rounded_to = "e4m3" if has_codes else "bfloat16"
    if not has_codes:
        ops.x_pairs = e.flat(rounded, ops.t * padded // 2, "uint32")


def _code(value: Any, factor: Any) -> Any:
    """uint8: value * factor as e4m3."""
    return g.device_call("llmc_to_e4m3", _TO_E4M3, value, factor, result="uint8")


def _number(value: Any, factor: Any) -> Any:
    """The same as bits of bfloat16, uint16."""
    scaled = g.device_call("llmc_multiply", _MULTIPLY, value, factor, result="float32")
    add = lambda a, b, lanes: g.device_call("llmc_add", _ADD, a, b, result="float32")  # noqa: E731
    bits = T.reinterpret("uint32", e4m3.nearest(scaled, 1, add))
    return tirx.Cast("uint16", T.shift_right(bits, g.u32(16)))


def most_tiles(layout: QuantLayout, caps: Capabilities) -> int:
    """Tiles of 16 rows of x per block, untuned, of any matmul of qgemm, qint and this module.

    Fewer where registers also hold the float16 operands that e4m3 products are made of.
    """
    expanded = layout.of.activations is Code.E4M3 and caps.fp8_mma is Fp8Mma.EXPANDED
    return _MOST_TILES // 2 if expanded else _MOST_TILES


def gemm(ops: Operands, caps: Capabilities, tiles: int, warps: int) -> None:
    """One launch over all of y, after quantize_rows; arguments as of qgemm.launch."""
    launch(ops, caps, Block, tiles, warps, as_stored=True)


class Block(Tiles):
    """e4m3 numbers of activations and weights, both as they lie in memory; thread q of four takes columns as in qint."""

    def __init__(
        self, ops: Operands, caps: Capabilities, codes: ThreadCodes, tiles: int, warps: int, thread: Any
    ) -> None:
        words = codes.padded_k // 4
        x = e.flat(ops.rounded, ops.t * words, "uint32")
        super().__init__(ops, caps, codes, tiles, warps, thread, x, words, 4)
        assert self._shared * self.depth <= PROMOTED  # what the matrix units add up by themselves

    def multiply(self, part: list[Any], words: list[Any], x: list[Any], zeros: list[Any]) -> None:
        for j in range(TILES):
            low, high = (words[2 * j + half][0] for half in range(2))
            for i in range(self.tiles):
                unit.mma_e4m3(part[i][j], [low[0], high[0], low[1], high[1]], [x[i][0], x[i][1]])
