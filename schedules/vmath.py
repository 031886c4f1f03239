"""Vector elementary functions in float32 as polynomials: LLVM has none, and a scalar libm call per lane is slow.

Coefficients were fitted by tools/fit_polynomials.py (least squares on Chebyshev nodes, relative weights).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules import emit as e

# 2**f on [-0.5, 0.5], highest power first; relative error 2e-8 before rounding
_EXP2 = (
    0.00015403530393381609,
    0.0013333558146428443,
    0.009618129107628477,
    0.05550410866482158,
    0.24022650695910072,
    0.6931471805599453,
    1.0,
)
_LOG2E = 1.4426950408889634
# ln 2 in two pieces: the first has few bits, so that its product with a small integer is exact
_LN2_HI, _LN2_LO = 0.693359375, -2.12194440e-4


def exp2_parts(n: Any, f: Any, lanes: int) -> Any:
    """2**n * 2**f for integral n >= -127 (n = -127 gives 0 for f = 0) and |f| <= 0.5."""
    p = e.splat(_EXP2[0], lanes)
    for c in _EXP2[1:]:
        p = p * f + e.splat(c, lanes)
    bits = T.reinterpret(e.vec("int32", lanes), p)
    shift = T.shift_left(tirx.Cast(e.vec("int32", lanes), n), e.const("int32", 23, lanes))
    return T.reinterpret(e.vec("float32", lanes), bits + shift)


def exp_nonpositive(x: Any, lanes: int) -> Any:
    """e**x for x <= 0, as softmax needs it: exactly 0 far below, relative error about 1e-7 * |x| at most."""
    t = e.let(T.max(x * e.splat(_LOG2E, lanes), e.splat(-127.0, lanes)))
    n = e.let(round_even(t, lanes))
    return exp2_parts(n, e.let(t - n), lanes)


def round_even(x: Any, lanes: int) -> Any:
    return T.call_llvm_pure_intrin(e.vec("float32", lanes), T.llvm_lookup_intrinsic_id("llvm.roundeven"), x)


def tanh_bounded(x: Any, lanes: int) -> Any:
    """tanh(x); absolute error about 1e-7: 1 - 2 / (e**2x + 1), by symmetry on -|x|."""
    a = e.let(T.max(x, e.splat(0.0, lanes) - x))
    z = e.let(exp_nonpositive(a * e.splat(-2.0, lanes), lanes))
    one = e.splat(1.0, lanes)
    y = e.let((one - z) / (one + z))
    return tirx.Select(x < e.splat(0.0, lanes), e.splat(0.0, lanes) - y, y)
