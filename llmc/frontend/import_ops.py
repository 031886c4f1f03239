"""Converters: one ATen operator of a decoder -> Relax, for importer.py.

A converter gets the importer, the bound arguments (Relax values, numbers, lists) by the name that they have in the ATen
schema, and torch's own result (a fake tensor), whose shape and dtype it has to produce. Sources: the ATen schemas of
torch 2.13; https://pytorch.org/docs/stable/torch.html for their meaning.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tvm import relax

from llmc.frontend import import_tensor_ops as tensor_ops
from llmc.frontend.import_base import (
    Args,
    Complex,
    Converter,
    bind_args,
    cast,
    dtype_of,
    emit_matmul,
    is_tensor,
    module_path,
    operand,
    permute,
    reshape,
    same_shape,
)
from llmc.ir import opaque_call, tensor_type
from llmc.ops import EXPERT_LINEAR, ExpertLinearAttrs
from llmc.passes.raise_attention import MASK, MASKED_ATTENTION, MaskAttrs, MaskedAttentionAttrs

op = relax.op


def convert(im: Any, node: Any) -> Any:
    """The Relax value of one call_function node."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt | int | bool):
        return im.prim(value)
    if node.target is operator.getitem:
        source, index = im.env[node.args[0]], node.args[1]
        return (
            source[index] if isinstance(source, list | tuple) else im.emit(relax.TupleGetItem(source, index))
        )
    if isinstance(value, torch.SymFloat | float | torch.SymBool):
        raise im.error("a number computed from the sequence length", "token-mixing-not-captured")
    name = str(node.target).removeprefix("aten.")
    args = bind_args(im, node)
    if any(isinstance(v, Complex) for v in args.values()) or (
        isinstance(value, torch.Tensor) and value.is_complex()
    ):
        return tensor_ops.convert_complex(im, name, args, value)
    converter = CONVERTERS.get(name)
    if converter is None and name.startswith(_SEQUENCE_OPS):
        raise im.error(
            "a recurrent or convolutional layer, which is not supported yet", "token-mixing-not-captured"
        )
    if converter is None:
        raise im.error("an operation that llmc cannot import")
    return converter(im, args, value)


def supported(node: Any) -> bool:
    """Whether `convert` has an entry for the node's operator."""
    name = str(node.target).removeprefix("aten.")
    return (
        node.target is operator.getitem
        or name in CONVERTERS
        or name in tensor_ops.COMPLEX_OPS
        or not isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
    )


# elementwise


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


# linear algebra


def _matmul(left: str, right: str) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        return emit_matmul(im, a[left], a[right])

    return run


def _linear(im: Any, a: Args, out: Any) -> Any:
    y = im.emit(op.matmul(a["input"], permute(im, a["weight"], [1, 0])))
    return y if a.get("bias") is None else im.emit(op.add(y, a["bias"]))


def _addmm(im: Any, a: Args, out: Any) -> Any:
    """beta * self + alpha * (mat1 @ mat2); also for batches (baddbmm)."""
    dtype = im.dtype(out.dtype)
    first, second = ("mat1", "mat2") if "mat1" in a else ("batch1", "batch2")
    y = emit_matmul(im, a[first], a[second])
    if a.get("alpha", 1) != 1:
        y = im.emit(op.multiply(y, im.constant(a["alpha"], dtype)))
    if a.get("beta", 1) == 0:
        return y
    bias = a["self"]
    if a.get("beta", 1) != 1:
        bias = im.emit(op.multiply(bias, im.constant(a["beta"], dtype)))
    return im.emit(op.add(y, bias))


def _mv(im: Any, a: Args, out: Any) -> Any:
    return emit_matmul(im, a["self"], a.get("vec", a.get("tensor")))


def _outer(im: Any, a: Args, out: Any) -> Any:
    left = reshape(im, a["self"], [*im.shape(out)[:1], 1])
    return im.emit(op.multiply(left, reshape(im, a["vec2"], [1, *im.shape(out)[1:]])))


# reductions and norms


def _axes(a: Args, rank: int) -> list[int]:
    dim = a.get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in ([dim] if isinstance(dim, int) else dim)]


def _reduce(fn: Callable[..., Any], boolean: bool = False) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        x = a["self"]
        dtype = im.dtype(out.dtype)
        x = cast(im, cast(im, x, "bool"), "int32") if boolean else cast(im, x, dtype)
        result = im.emit(fn(x, _axes(a, len(x.ty.shape)), bool(a.get("keepdim", False))))
        return cast(im, result, dtype)

    return run


def _max_dim(fn: Callable[..., Any], arg: Callable[..., Any]) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        axis = a["dim"] % len(a["self"].ty.shape)
        keep = bool(a.get("keepdim", False))
        return [im.emit(fn(a["self"], [axis], keep)), cast(im, im.emit(arg(a["self"], axis, keep)), "int64")]

    return run


def _arg(fn: Callable[..., Any]) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        if a.get("dim") is None:
            raise im.error("the argmax of a whole tensor")
        return cast(im, im.emit(fn(a["self"], a["dim"], bool(a.get("keepdim", False)))), "int64")

    return run


def _variance(root: bool) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        x, dtype = a["self"], im.dtype(out.dtype)
        axes = _axes(a, len(x.ty.shape))
        count = int(np.prod([int(x.ty.shape[d]) for d in axes]))
        correction = a.get("correction", 1)
        if correction is None or "unbiased" in a:
            correction = int(a.get("unbiased", True))
        y = im.emit(op.variance(x, axes, bool(a.get("keepdim", False))))
        if correction:
            y = im.emit(op.multiply(y, im.constant(count / (count - correction), dtype)))
        return im.emit(op.sqrt(y)) if root else y

    return run


def _norm(im: Any, a: Args, out: Any) -> Any:
    x = cast(im, a["self"], im.dtype(out.dtype))
    axes, keep = _axes(a, len(x.ty.shape)), bool(a.get("keepdim", False))
    order = a.get("ord", a.get("p", 2))
    if order in (2, None):
        return im.emit(op.sqrt(im.emit(op.sum(im.emit(op.multiply(x, x)), axes, keep))))
    if order == 1:
        return im.emit(op.sum(im.emit(op.abs(x)), axes, keep))
    raise im.error(f"a norm of order {order}")


def _layer_norm(im: Any, a: Args, out: Any) -> Any:
    x, dtype = a["input"], im.dtype(out.dtype)
    sizes = [int(s) for s in a["normalized_shape"]]
    axes = list(range(-len(sizes), 0))
    weight, bias = a.get("weight"), a.get("bias")
    if weight is None:
        weight = relax.const(np.ones(sizes, "float32"), "float32")
        weight = cast(im, weight, dtype)
    if bias is None:
        bias = cast(im, relax.const(np.zeros(sizes, "float32"), "float32"), dtype)
    return im.emit(op.nn.layer_norm(x, weight, bias, axes=axes, epsilon=float(a.get("eps", 1e-5))))


def _rms_norm(im: Any, a: Args, out: Any) -> Any:
    """Spelled out, so that later passes see the same operations as in models that write it by hand."""
    dtype = im.dtype(out.dtype)
    x = cast(im, a["input"], "float32")
    eps = a.get("eps")
    if eps is None:
        eps = torch.finfo(out.dtype).eps
    rank = len(a["normalized_shape"])
    mean = im.emit(op.mean(im.emit(op.multiply(x, x)), list(range(-rank, 0)), True))
    y = im.emit(op.multiply(x, im.emit(op.rsqrt(im.emit(op.add(mean, im.constant(eps, "float32")))))))
    y = cast(im, y, dtype)
    return y if a.get("weight") is None else im.emit(op.multiply(y, a["weight"]))


def _group_norm(im: Any, a: Args, out: Any) -> Any:
    x, groups = a["input"], a["num_groups"]
    if len(x.ty.shape) != 2:
        raise im.error("a group norm over a sequence", "token-mixing-not-captured")
    rows, channels, dtype = x.ty.shape[0], int(x.ty.shape[1]), im.dtype(out.dtype)
    parts = reshape(im, x, [rows, groups, channels // groups])
    ones, zeros = (
        cast(im, relax.const(f(channels // groups, "float32")), dtype) for f in (np.ones, np.zeros)
    )
    y = im.emit(op.nn.layer_norm(parts, ones, zeros, axes=[-1], epsilon=float(a.get("eps", 1e-5))))
    y = reshape(im, y, [rows, channels])
    if a.get("weight") is not None:
        y = im.emit(op.multiply(y, a["weight"]))
    return y if a.get("bias") is None else im.emit(op.add(y, a["bias"]))


def _softmax(fn: Callable[..., Any]) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        return im.emit(fn(cast(im, a["self"], im.dtype(out.dtype)), a["dim"]))

    return run


def _cumulative(fn: Callable[..., Any]) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        dtype = im.dtype(out.dtype)
        return im.emit(fn(cast(im, a["self"], dtype), a["dim"], dtype))

    return run


def _topk(im: Any, a: Args, out: Any) -> Any:
    if not isinstance(a["k"], int):
        raise im.error("a top-k whose k depends on the sequence length", "token-mixing-not-captured")
    both = im.emit(
        op.topk(a["self"], a["k"], a.get("dim", -1), "both", bool(a.get("largest", True)), "int64")
    )
    return [im.emit(relax.TupleGetItem(both, i)) for i in range(2)]


def _sort(im: Any, a: Args, out: Any) -> Any:
    axis, descending = a.get("dim", -1), bool(a.get("descending", False))
    order = im.emit(op.argsort(a["self"], axis, descending, "int64"))
    return [im.emit(op.gather_elements(a["self"], order, axis % len(a["self"].ty.shape))), order]


def _argsort(im: Any, a: Args, out: Any) -> Any:
    return im.emit(op.argsort(a["self"], a.get("dim", -1), bool(a.get("descending", False)), "int64"))


# opaque operators


def _mask(im: Any, a: Args, out: Any) -> Any:
    attrs = MaskAttrs(causal=a["causal"], window=a["window"], chunk=a["chunk"])
    return im.emit(
        opaque_call(
            MASK,
            [a["padding"]] if a["padding"] is not None else [],
            attrs.to_json(),
            tensor_type(im.shape(out), im.dtype(out.dtype)),
        )
    )


def _attention(im: Any, a: Args, out: Any) -> Any:
    attrs = MaskedAttentionAttrs(
        scale=a["scale"],
        softcap=a["softcap"],
        causal=a["causal"],
        window=a["window"],
        has_mask=a["mask"] is not None,
        has_sinks=a["sinks"] is not None,
        path=module_path(im.node, im.prefix),
    )
    operands = [a[n] for n in ("q", "k", "v", "mask", "sinks") if a[n] is not None]
    out_type = tensor_type(im.shape(out), im.dtype(out.dtype))
    return im.emit(opaque_call(MASKED_ATTENTION, operands, attrs.to_json(), out_type))


def _sdpa(im: Any, a: Args, out: Any) -> Any:
    """scaled_dot_product_attention of [b,h,s,d] (or [h,s,d]); a boolean mask becomes an additive one."""
    q, k, v = a["query"], a["key"], a["value"]
    if len(q.ty.shape) == 3:
        q, k, v = (reshape(im, x, [1, *x.ty.shape]) for x in (q, k, v))
    mask = a.get("attn_mask")
    if mask is not None and dtype_of(mask) == "bool":
        zero, low = im.constant(0.0, "float32"), im.constant(float("-inf"), "float32")
        mask = im.emit(op.where(mask, zero, low))
    scale = a.get("scale")
    attrs = MaskedAttentionAttrs(
        scale=float(int(q.ty.shape[-1]) ** -0.5 if scale is None else scale),
        causal=bool(a.get("is_causal", False)),
        has_mask=mask is not None,
        path=module_path(im.node, im.prefix),
    )
    b, h, s, dv = q.ty.shape[0], q.ty.shape[1], q.ty.shape[2], v.ty.shape[3]
    out_type = tensor_type([b, s, h, dv], im.dtype(out.dtype))
    operands = [q, k, v] if mask is None else [q, k, v, mask]
    y = im.emit(opaque_call(MASKED_ATTENTION, operands, attrs.to_json(), out_type))
    y = permute(im, y, [0, 2, 1, 3])
    return y if same_shape(y.ty.shape, im.shape(out)) else reshape(im, y, im.shape(out))


def _expert_linear(im: Any, a: Args, out: Any) -> Any:
    attrs = ExpertLinearAttrs(has_bias=a["bias"] is not None, transposed=a["transposed"])
    operands = [a["x"], a["expert_ids"], a["weight"]] + ([a["bias"]] if a["bias"] is not None else [])
    out_type = tensor_type(im.shape(out), im.dtype(out.dtype))
    return im.emit(opaque_call(EXPERT_LINEAR, operands, attrs.to_json(), out_type))


_SEQUENCE_OPS = (
    "conv",
    "_convolution",
    "lstm",
    "gru",
    "rnn",
    "roll",
    "fft",
    "diff",
    "unfold",
    "avg_pool",
    "max_pool",
)
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
    table: dict[str, Converter] = dict(tensor_ops.CONVERTERS)
    for name, unary in _UNARY.items():
        table[f"{name}.default"] = _unary(unary)
    for name, fn in _BINARY.items():
        for overload in ("Tensor", "Scalar", "default"):
            table[f"{name}.{overload}"] = _arithmetic(fn, _NEUTRAL.get(name))
    for name, fn in _COMPARE.items():
        for overload in ("Tensor", "Scalar"):
            table[f"{name}.{overload}"] = _compare(fn)
    for name, (logical, bitwise) in _LOGICAL.items():
        for overload in ("Tensor", "Scalar", "default"):
            table[f"{name}.{overload}"] = _logical(logical, bitwise)
    table |= {
        "rsub.Scalar": _reverse_subtract, "rsub.Tensor": _reverse_subtract,
        "max.other": _arithmetic(op.maximum), "min.other": _arithmetic(op.minimum),
        "div.Tensor_mode": _div_mode, "div.Scalar_mode": _div_mode, "reciprocal.default": _reciprocal,
        "pow.Tensor_Scalar": _pow, "pow.Tensor_Tensor": _pow, "pow.Scalar": _pow, "float_power.Tensor_Scalar": _pow,
        "clamp.default": _clamp, "clamp.Tensor": _clamp, "clamp_min.default": _clamp, "clamp_max.default": _clamp,
        "clip.default": _clamp, "gelu.default": _gelu, "where.self": _where, "where.ScalarSelf": _where,
        "where.ScalarOther": _where, "where.Scalar": _where, "masked_fill.Scalar": _masked_fill,
        "masked_fill.Tensor": _masked_fill, "softplus.default": _softplus, "leaky_relu.default": _leaky_relu,
        "elu.default": _elu, "log_sigmoid.default": _log_sigmoid, "log1p.default": _log1p, "expm1.default": _expm1,
        "linear.default": _linear, "matmul.default": _matmul("self", "other"), "mm.default": _matmul("self", "mat2"),
        "bmm.default": _matmul("self", "mat2"), "mv.default": _mv, "dot.default": _mv, "addmm.default": _addmm,
        "baddbmm.default": _addmm, "outer.default": _outer,
        "sum.dim_IntList": _reduce(op.sum), "sum.default": _reduce(op.sum), "mean.dim": _reduce(op.mean),
        "mean.default": _reduce(op.mean), "amax.default": _reduce(op.max), "amin.default": _reduce(op.min),
        "max.default": _reduce(op.max), "min.default": _reduce(op.min), "prod.dim_int": _reduce(op.prod),
        "any.dim": _reduce(op.max, True), "any.default": _reduce(op.max, True), "any.dims": _reduce(op.max, True),
        "all.dim": _reduce(op.min, True), "all.default": _reduce(op.min, True),
        "max.dim": _max_dim(op.max, op.argmax), "min.dim": _max_dim(op.min, op.argmin),
        "argmax.default": _arg(op.argmax), "argmin.default": _arg(op.argmin),
        "var.correction": _variance(False), "var.dim": _variance(False), "std.correction": _variance(True),
        "std.dim": _variance(True), "linalg_vector_norm.default": _norm, "norm.ScalarOpt_dim": _norm,
        "layer_norm.default": _layer_norm, "rms_norm.default": _rms_norm, "group_norm.default": _group_norm,
        "softmax.int": _softmax(op.nn.softmax), "_softmax.default": _softmax(op.nn.softmax),
        "log_softmax.int": _softmax(op.nn.log_softmax), "cumsum.default": _cumulative(op.cumsum),
        "cumprod.default": _cumulative(op.cumprod), "topk.default": _topk, "sort.default": _sort, "sort.stable": _sort,
        "argsort.default": _argsort,
        "scaled_dot_product_attention.default": _sdpa,
        "llmc.mask.default": _mask, "llmc.attention.default": _attention, "llmc.expert_linear.default": _expert_linear,
    }  # fmt: skip
    return table


CONVERTERS: dict[str, Converter] = _table()
