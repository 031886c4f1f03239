"""Vector elementary functions in float32 as polynomials: LLVM has none, and a scalar libm call per lane is slow.

Every function takes an expression of `lanes` float32 and gives one back. They serve hand-written kernels, where shared
values become statements, and TVM's intrinsic lowering, where they become Let expressions. NaN gives NaN.
Coefficients were fitted for this file (iteratively reweighted least squares on Chebyshev nodes, relative error); highest
power first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules import emit as e

# 2**f on [-0.5, 0.5]: relative error 2e-9 before rounding
_EXP2 = (
    0.00015345794343624494,
    0.001339993107675963,
    0.009618489022794977,
    0.05550328777409833,
    0.24022646890026908,
    0.6931472057369913,
    1.0,
)
# the same, 3e-6
_EXP2_COARSE = (
    0.009582852014712954,
    0.055906424775598595,
    0.24024098636140126,
    0.6931241933950228,
    1.0,
)
# (tanh(x) / x - 1) / x**2 in x**2 for |x| <= 0.625: 4e-9
_TANH = (
    -0.0057050002431347285,
    0.020639100549098233,
    -0.053739719764239774,
    0.1333144226461023,
    -0.3333328194506811,
)
# erf(x) / x in x**2 for |x| <= 1: 1e-9
_ERF = (
    7.854218914648979e-05,
    -0.0008010310574083634,
    0.005188342411258163,
    -0.026853820844146208,
    0.11283585410835531,
    -0.37612625857298637,
    1.1283791657385427,
)
# erfc(x) * e**(x**2) in 1 / (1 + x / 2) for 1 <= x <= 4: absolute error of erfc 2e-11
_ERFC = (
    0.006652270822655644,
    -0.2540861813456952,
    0.670545740597795,
    -0.09065573630942679,
    0.4081660521315338,
    0.25707926080785976,
    0.002073643076014691,
)
_LOG2E = math.log2(math.e)
# ln 2 in two pieces: the first has few bits, so that its product with a small integer is exact
_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2) - _LN2_HIGH


def exp_nonpositive(x: Any, lanes: int) -> Any:
    """e**x for x <= 0, as softmax needs it: 0 far below; relative error 1e-7 * max(1, |x|)."""
    return _share(x * e.splat(_LOG2E, lanes), lambda t: exp2_nonpositive(t, lanes))


def exp2_nonpositive(x: Any, lanes: int, *, coarse: bool = False) -> Any:
    """2**x for x <= 0: 0 below -127; relative error 1e-7, or 3e-6 for results that are rounded to bf16 (`coarse`)."""

    def reduced(t: Any) -> Any:
        def split(n: Any) -> Any:
            coefficients = _EXP2_COARSE if coarse else _EXP2
            return _share(t - n, lambda f: _scale(_polynomial(coefficients, f, lanes), n, lanes))

        return _share(round_even(t, lanes), split)

    # the constant comes first: a NaN in the second operand survives the comparison
    return _share(T.max(e.splat(-127.0, lanes), x), reduced)


def exp(x: Any, lanes: int) -> Any:
    """e**x; relative error 1e-7, inf above 88.7, 0 below -103."""

    def bounded(x: Any) -> Any:
        def split(n: Any) -> Any:
            rest = x - n * e.splat(_LN2_HIGH, lanes) - n * e.splat(_LN2_LOW, lanes)
            f = rest * e.splat(_LOG2E, lanes)

            def assemble(f: Any) -> Any:
                # in two factors, as 2**128 and 2**-149 do not fit into one exponent
                half = round_even(n * e.splat(0.5, lanes), lanes)
                p = _polynomial(_EXP2, f, lanes)
                return _share(half, lambda h: p * _power2(h, lanes) * _power2(n - h, lanes))

            return _share(f, assemble)

        return _share(round_even(x * e.splat(_LOG2E, lanes), lanes), split)

    return _share(T.max(e.splat(-104.0, lanes), T.min(e.splat(89.0, lanes), x)), bounded)


def tanh(x: Any, lanes: int) -> Any:
    """tanh(x); relative error 2e-7."""
    one = e.splat(1.0, lanes)

    def large(a: Any) -> Any:
        return _share(exp_nonpositive(a * e.splat(-2.0, lanes), lanes), lambda z: (one - z) / (one + z))

    def both(x: Any) -> Any:
        small = _share(x * x, lambda z: x + x * (z * _polynomial(_TANH, z, lanes)))
        return _share(
            _absolute(x, lanes),
            lambda a: tirx.Select(a > e.splat(0.625, lanes), _with_sign(large(a), x, lanes), small),
        )

    return _share(x, both)


def sigmoid(x: Any, lanes: int) -> Any:
    """1 / (1 + e**-x)."""
    one = e.splat(1.0, lanes)
    return one / (one + exp(e.splat(0.0, lanes) - x, lanes))


def erf(x: Any, lanes: int) -> Any:
    """The error function; relative error 2e-7."""
    one = e.splat(1.0, lanes)

    def large(a: Any) -> Any:
        a = T.min(e.splat(4.0, lanes), a)
        u = one / (one + a * e.splat(0.5, lanes))
        tail = exp_nonpositive(e.splat(0.0, lanes) - a * a, lanes)
        return one - tail * _share(u, lambda u: _polynomial(_ERFC, u, lanes))

    def both(x: Any) -> Any:
        small = _share(x * x, lambda z: x * _polynomial(_ERF, z, lanes))
        return _share(
            _absolute(x, lanes),
            lambda a: tirx.Select(a > one, _with_sign(large(a), x, lanes), small),
        )

    return _share(x, both)


@functools.cache  # TVM refuses a second registration
def use_vector_math() -> None:
    """Make TVM's LLVM lowering of exp, tanh, sigmoid and erf use these polynomials, in this process."""
    for name, function in {"exp": exp, "tanh": tanh, "sigmoid": sigmoid, "erf": erf}.items():
        tirx.op.register_intrin_lowering(f"tirx.{name}", target="llvm", f=_lowering(function), level=99)


def _lowering(function: Callable[[Any, int], Any]) -> Callable[[Any], Any]:
    def lower(call: Any) -> Any:
        dtype = str(call.ty.dtype)
        element, _, lanes = dtype.partition("x")
        count = int(lanes or 1)
        if element == "float32":
            return function(call.args[0], count)
        if element == "float16":
            wide = tirx.Cast(e.vec("float32", count), call.args[0])
            return tirx.Cast(dtype, function(wide, count))
        return call

    return lower


def _share(value: Any, body: Callable[[Any], Any]) -> Any:
    """body(value), with the value computed once."""
    if IRBuilder.is_in_scope():
        return body(e.let(value))
    var = tirx.Var("s", str(value.ty.dtype))
    return tirx.Let(var, value, body(var))


def _polynomial(coefficients: Sequence[float], x: Any, lanes: int) -> Any:
    p = e.splat(coefficients[0], lanes)
    for c in coefficients[1:]:
        p = p * x + e.splat(c, lanes)
    return p


def _scale(p: Any, n: Any, lanes: int) -> Any:
    """p * 2**n for p in [0.5, 2] and integral n >= -127; n = -127 and p = 1 give 0."""
    bits = T.reinterpret(e.vec("int32", lanes), p)
    shift = T.shift_left(tirx.Cast(e.vec("int32", lanes), n), e.const("int32", 23, lanes))
    return T.reinterpret(e.vec("float32", lanes), bits + shift)


def _power2(n: Any, lanes: int) -> Any:
    """2**n for integral n in [-126, 127]."""
    bits = tirx.Cast(e.vec("int32", lanes), n) + e.const("int32", 127, lanes)
    return T.reinterpret(e.vec("float32", lanes), T.shift_left(bits, e.const("int32", 23, lanes)))


def round_even(x: Any, lanes: int) -> Any:
    name = T.llvm_lookup_intrinsic_id("llvm.roundeven")
    return T.call_llvm_pure_intrin(e.vec("float32", lanes), name, x)


def _absolute(x: Any, lanes: int) -> Any:
    bits = T.bitwise_and(T.reinterpret(e.vec("int32", lanes), x), e.const("int32", 0x7FFFFFFF, lanes))
    return T.reinterpret(e.vec("float32", lanes), bits)


def _with_sign(magnitude: Any, x: Any, lanes: int) -> Any:
    sign = T.bitwise_and(T.reinterpret(e.vec("int32", lanes), x), e.const("int32", -(2**31), lanes))
    bits = T.bitwise_or(T.reinterpret(e.vec("int32", lanes), magnitude), sign)
    return T.reinterpret(e.vec("float32", lanes), bits)
