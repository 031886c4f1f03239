"""Converters of reductions, norms, softmax and sorting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tvm import relax

from llmc.frontend.import_base import (
    Args,
    Converter,
    cast,
    entries,
    reshape,
)

op = relax.op


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
    # torch computes in float32 and rounds once at the end
    x, weight, bias = (cast(im, v, "float32") for v in (x, weight, bias))
    y = im.emit(op.nn.layer_norm(x, weight, bias, axes=axes, epsilon=float(a.get("eps", 1e-5))))
    return cast(im, y, dtype)


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
        # torch computes in float32 and rounds once at the end
        y = im.emit(fn(cast(im, a["self"], "float32"), a["dim"]))
        return cast(im, y, im.dtype(out.dtype))

    return run


def _cumulative(fn: Callable[..., Any]) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        dtype = im.dtype(out.dtype)
        return im.emit(fn(cast(im, a["self"], dtype), a["dim"], dtype))

    return run


def _topk(im: Any, a: Args, out: Any) -> Any:
    if not isinstance(a["k"], int):
        raise im.error("a top-k whose k depends on the sequence length", "token-mixing-not-captured")
    values = _sortable(im, a["self"])
    both = im.emit(op.topk(values, a["k"], a.get("dim", -1), "both", bool(a.get("largest", True)), "int64"))
    top, indices = (im.emit(relax.TupleGetItem(both, i)) for i in range(2))
    return [cast(im, top, str(a["self"].ty.dtype)), indices]


def _sortable(im: Any, x: Any) -> Any:
    """bfloat16 as float32, exactly: TVM's sorting routines compare the bits of a bfloat16 as an integer."""
    return cast(im, x, "float32") if str(x.ty.dtype) == "bfloat16" else x


def _sort(im: Any, a: Args, out: Any) -> Any:
    axis, descending = a.get("dim", -1), bool(a.get("descending", False))
    order = im.emit(op.argsort(_sortable(im, a["self"]), axis, descending, "int64"))
    return [im.emit(op.gather_elements(a["self"], order, axis % len(a["self"].ty.shape))), order]


def _argsort(im: Any, a: Args, out: Any) -> Any:
    values = _sortable(im, a["self"])
    return im.emit(op.argsort(values, a.get("dim", -1), bool(a.get("descending", False)), "int64"))


CONVERTERS: dict[str, Converter] = {
    **entries("sum.dim_IntList sum.default", _reduce(op.sum)),
    **entries("mean.dim mean.default", _reduce(op.mean)),
    **entries("amax.default max.default", _reduce(op.max)),
    **entries("amin.default min.default", _reduce(op.min)),
    "prod.dim_int": _reduce(op.prod),
    **entries("any.dim any.dims any.default", _reduce(op.max, True)),
    **entries("all.dim all.dims all.default", _reduce(op.min, True)),
    "max.dim": _max_dim(op.max, op.argmax),
    "min.dim": _max_dim(op.min, op.argmin),
    "argmax.default": _arg(op.argmax),
    "argmin.default": _arg(op.argmin),
    **entries("var.correction var.dim", _variance(False)),
    **entries("std.correction std.dim", _variance(True)),
    **entries("linalg_vector_norm.default norm.ScalarOpt_dim", _norm),
    "layer_norm.default": _layer_norm,
    "rms_norm.default": _rms_norm,
    "group_norm.default": _group_norm,
    **entries("softmax.int _softmax.default", _softmax(op.nn.softmax)),
    "log_softmax.int": _softmax(op.nn.log_softmax),
    "cumsum.default": _cumulative(op.cumsum),
    "cumprod.default": _cumulative(op.cumprod),
    "topk.default": _topk,
    **entries("sort.default sort.stable", _sort),
    "argsort.default": _argsort,
}
