"""Converters of elementwise operators, with the promotion of dtypes that torch has done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tvm import relax

from llmc.frontend.import_base import (
    Args,
    Converter,
    cast,
    dtype_of,
    entries,
    is_tensor,
    operand,
)

op = relax.op


def _unary(fn: Callable[[Any], Any]) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        x = cast(im, a["self"], im.dtype(out.dtype)) if out.dtype.is_floating_point else a["self"]
        return im.emit(fn(x))

    return run


def _arithmetic(fn: Callable[[Any, Any], Any], neutral: float | None = None) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        dtype = im.dtype(out.dtype)
        if not is_tensor(a["other"]) and a["other"] == neutral and dtype_of(a["self"]) == dtype:
            return a["self"]
        left, right = operand(im, a["self"], dtype), operand(im, a["other"], dtype)
        alpha = a.get("alpha", 1)
        if alpha != 1:
            right = im.emit(op.multiply(right, im.constant(alpha, dtype)))
        return im.emit(fn(left, right))

    return run


def _reverse_subtract(im: Any, a: Args, out: Any) -> Any:
    return CONVERTERS["sub.Tensor"](im, {**a, "self": a["other"], "other": a["self"]}, out)


def _compare(fn: Callable[[Any, Any], Any]) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        dtype = _common_dtype(im, a["self"], a["other"])
        return im.emit(fn(operand(im, a["self"], dtype), operand(im, a["other"], dtype)))

    return run


def _common_dtype(im: Any, left: Any, right: Any) -> str:
    """torch's promotion for a comparison; a plain number takes the tensor's dtype unless it would lose its fraction."""
    types = [dtype_of(x) for x in (left, right) if is_tensor(x)]
    torch_types = [getattr(torch, t) for t in types]
    common = torch_types[0]
    for t in torch_types[1:]:
        common = torch.promote_types(common, t)
    if any(isinstance(x, float) for x in (left, right)) and not common.is_floating_point:
        common = torch.float32
    if any(isinstance(x, int) and not isinstance(x, bool) for x in (left, right)) and common == torch.bool:
        common = torch.int64
    return im.dtype(common)


def _logical(fn: Callable[..., Any], bitwise: Callable[..., Any] | None = None) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        dtype = im.dtype(out.dtype)
        chosen = fn if dtype == "bool" or bitwise is None else bitwise
        values = [operand(im, a[n], dtype) for n in ("self", "other") if n in a]
        return im.emit(chosen(*values))

    return run


def _pow(im: Any, a: Args, out: Any) -> Any:
    dtype = im.dtype(out.dtype)
    base, exponent = a["self"], a["exponent"]
    if is_tensor(base) and isinstance(exponent, int | float):
        x = cast(im, base, dtype)
        if exponent == 2:
            return im.emit(op.multiply(x, x))
        if exponent == 1:
            return x
        if exponent == 0.5:
            return im.emit(op.sqrt(x))
        if exponent == -0.5:
            return im.emit(op.rsqrt(x))
        if exponent == 3:
            return im.emit(op.multiply(im.emit(op.multiply(x, x)), x))
    return im.emit(op.power(operand(im, base, dtype), operand(im, exponent, dtype)))


def _div_mode(im: Any, a: Args, out: Any) -> Any:
    dtype = im.dtype(out.dtype)
    left, right = operand(im, a["self"], dtype), operand(im, a["other"], dtype)
    mode = a.get("rounding_mode")
    if mode == "floor":
        return im.emit(op.floor_divide(left, right))
    quotient = im.emit(op.divide(left, right))
    return quotient if mode is None else im.emit(op.trunc(quotient))


def _reciprocal(im: Any, a: Args, out: Any) -> Any:
    dtype = im.dtype(out.dtype)
    return im.emit(op.divide(im.constant(1, dtype), cast(im, a["self"], dtype)))


def _clamp(im: Any, a: Args, out: Any) -> Any:
    dtype = im.dtype(out.dtype)
    x = cast(im, a["self"], dtype)
    if a.get("min") is not None:
        x = im.emit(op.maximum(x, operand(im, a["min"], dtype)))
    if a.get("max") is not None:
        x = im.emit(op.minimum(x, operand(im, a["max"], dtype)))
    return x


def _gelu(im: Any, a: Args, out: Any) -> Any:
    return im.emit((op.nn.gelu_tanh if a.get("approximate") == "tanh" else op.nn.gelu)(a["self"]))


def _where(im: Any, a: Args, out: Any) -> Any:
    dtype = im.dtype(out.dtype)
    return im.emit(
        op.where(
            cast(im, a["condition"], "bool"), operand(im, a["self"], dtype), operand(im, a["other"], dtype)
        )
    )


def _masked_fill(im: Any, a: Args, out: Any) -> Any:
    dtype = im.dtype(out.dtype)
    result = im.emit(op.where(a["mask"], operand(im, a["value"], dtype), a["self"]))
    return result


def _softplus(im: Any, a: Args, out: Any) -> Any:
    return im.emit(
        op.nn.softplus(a["self"], beta=float(a.get("beta", 1)), threshold=float(a.get("threshold", 20)))
    )


def _leaky_relu(im: Any, a: Args, out: Any) -> Any:
    return im.emit(op.nn.leakyrelu(a["self"], float(a.get("negative_slope", 0.01))))


def _elu(im: Any, a: Args, out: Any) -> Any:
    x, dtype = a["self"], im.dtype(out.dtype)
    alpha, scale, inner = (float(a.get(n, 1)) for n in ("alpha", "scale", "input_scale"))
    zero = im.constant(0, dtype)
    grown = im.emit(op.exp(im.emit(op.multiply(im.emit(op.minimum(x, zero)), im.constant(inner, dtype)))))
    low = im.emit(op.multiply(im.emit(op.subtract(grown, im.constant(1, dtype))), im.constant(alpha, dtype)))
    both = im.emit(op.add(im.emit(op.maximum(x, zero)), low))
    return both if scale == 1 else im.emit(op.multiply(both, im.constant(scale, dtype)))


def _log_sigmoid(im: Any, a: Args, out: Any) -> Any:
    return im.emit(op.negative(im.emit(op.nn.softplus(im.emit(op.negative(a["self"]))))))


def _log1p(im: Any, a: Args, out: Any) -> Any:
    return im.emit(op.log(im.emit(op.add(a["self"], im.constant(1, im.dtype(out.dtype))))))


def _expm1(im: Any, a: Args, out: Any) -> Any:
    return im.emit(op.subtract(im.emit(op.exp(a["self"])), im.constant(1, im.dtype(out.dtype))))


_UNARY = {
    "abs": op.abs, "cos": op.cos, "sin": op.sin, "tan": op.tan, "tanh": op.tanh, "exp": op.exp, "log": op.log,
    "sqrt": op.sqrt, "rsqrt": op.rsqrt, "neg": op.negative, "sigmoid": op.sigmoid, "silu": op.nn.silu,
    "relu": op.nn.relu, "relu6": op.nn.relu6, "erf": op.erf, "floor": op.floor, "ceil": op.ceil, "round": op.round,
    "trunc": op.trunc, "sign": op.sign, "square": op.square, "isnan": op.isnan, "isinf": op.isinf,
    "isfinite": op.isfinite, "atan": op.atan, "selu": op.nn.selu,
}  # fmt: skip
_BINARY = {
    "add": op.add, "sub": op.subtract, "mul": op.multiply, "div": op.divide, "floor_divide": op.floor_divide,
    "remainder": op.floor_mod, "maximum": op.maximum, "minimum": op.minimum,
}  # fmt: skip
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}
_COMPARE = {
    "eq": op.equal, "ne": op.not_equal, "lt": op.less, "le": op.less_equal, "gt": op.greater, "ge": op.greater_equal,
}  # fmt: skip
_LOGICAL = {
    "logical_and": (op.logical_and, None), "logical_or": (op.logical_or, None), "logical_not": (op.logical_not, None),
    "logical_xor": (op.logical_xor, None), "bitwise_and": (op.logical_and, op.bitwise_and),
    "bitwise_or": (op.logical_or, op.bitwise_or), "bitwise_xor": (op.logical_xor, op.bitwise_xor),
    "__and__": (op.logical_and, op.bitwise_and), "__or__": (op.logical_or, op.bitwise_or),
    "bitwise_not": (op.logical_not, op.bitwise_not),
}  # fmt: skip


def _table() -> dict[str, Converter]:
    table: dict[str, Converter] = {f"{name}.default": _unary(fn) for name, fn in _UNARY.items()}
    for name, fn in _BINARY.items():
        for overload in ("Tensor", "Scalar", "default"):
            table[f"{name}.{overload}"] = _arithmetic(fn, _NEUTRAL.get(name))
    for name, fn in _COMPARE.items():
        for overload in ("Tensor", "Scalar"):
            table[f"{name}.{overload}"] = _compare(fn)
    for name, (logical, bitwise) in _LOGICAL.items():
        for overload in ("Tensor", "Scalar", "default"):
            table[f"{name}.{overload}"] = _logical(logical, bitwise)
    return table


CONVERTERS: dict[str, Converter] = {
    **_table(),
    **entries("rsub.Scalar rsub.Tensor", _reverse_subtract),
    "max.other": _arithmetic(op.maximum),
    "min.other": _arithmetic(op.minimum),
    **entries("div.Tensor_mode div.Scalar_mode", _div_mode),
    "reciprocal.default": _reciprocal,
    **entries("pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar float_power.Tensor_Scalar", _pow),
    **entries("clamp.default clamp.Tensor clamp_min.default clamp_max.default clip.default", _clamp),
    "gelu.default": _gelu,
    **entries("where.self where.ScalarSelf where.ScalarOther where.Scalar", _where),
    **entries("masked_fill.Scalar masked_fill.Tensor", _masked_fill),
    "softplus.default": _softplus,
    "leaky_relu.default": _leaky_relu,
    "elu.default": _elu,
    "log_sigmoid.default": _log_sigmoid,
    "log1p.default": _log1p,
    "expm1.default": _expm1,
}
