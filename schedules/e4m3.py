"""Numbers of float8_e4m3fn in plain arithmetic: 4 exponent and 3 mantissa bits, no infinities (OCP FP8, arXiv 2209.05433)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules import emit as e

LARGEST = 448.0
_LOWEST = 121 << 23  # exponent bits of 2**-6: below, neighbours are as far apart as there
_MAGIC = (20 << 23) + (
    1 << 22
)  # 1.5 * 2**20 times a power of two: its neighbours are those of e4m3 near that power


def _sum(a: Any, b: Any, lanes: int) -> Any:
    """a + b; as a product with 1, which LLVM takes out, because TVM takes a sum's own summand out of it again."""
    fma = T.llvm_lookup_intrinsic_id("llvm.fma")
    return T.call_llvm_pure_intrin(e.vec("float32", lanes), fma, a, e.splat(1.0, lanes), b)


def nearest(value: Any, lanes: int, add: Callable[[Any, Any, int], Any] = _sum) -> Any:
    """float32 values of magnitudes up to 448, rounded to the nearest e4m3 numbers, ties to even; NaN stays NaN.

    Adding a float of which the last bit is worth as much as that of e4m3 does the rounding.

    Args:
        add: (a, b, lanes) -> their sum in float32, opaque to TVM's simplifier.
    """
    value = e.let(value)
    bits = T.reinterpret(e.vec("int32", lanes), value)
    power = T.max(T.bitwise_and(bits, e.const("int32", 0x7F800000, lanes)), e.const("int32", _LOWEST, lanes))
    magic = e.let(T.reinterpret(e.vec("float32", lanes), power + e.const("int32", _MAGIC, lanes)))
    return e.let(add(value, magic, lanes)) - magic
