"""Converters of indexing, gathering and assigning."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

from llmc.frontend.import_base import (
    Args,
    Converter,
    bound,
    cast,
    dtype_of,
    entries,
    filled,
    is_static,
    is_tensor,
    permute,
    reshape,
    same_dim,
)

op = relax.op


def _embedding(im: Any, a: Args, out: Any) -> Any:
    return im.emit(op.take(a["weight"], a["indices"], axis=0))


def _index_select(im: Any, a: Args, out: Any) -> Any:
    return im.emit(op.take(a["self"], a["index"], axis=a["dim"] % len(a["self"].ty.shape)))


def _from_the_end(im: Any, index: Any, size: Any) -> Any:
    """torch counts negative indices from the end; take does not."""
    if isinstance(index, GenericConst):
        values = index.value.numpy()
        if (values >= 0).all():
            return index
        if is_static(size):
            return relax.const(np.where(values < 0, values + int(size), values), dtype_of(index))
    if not is_static(size):
        return index
    zero, length = im.constant(0, dtype_of(index)), im.constant(int(size), dtype_of(index))
    return im.emit(op.where(im.emit(op.less(index, zero)), im.emit(op.add(index, length)), index))


def _index(im: Any, a: Args, out: Any) -> Any:
    x, indices = a["self"], a["indices"]
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if any(dtype_of(index) == "bool" for _, index in used):
        raise im.error("a result whose shape depends on values")
    if len(used) == 1:
        axis, index = used[0]
        return im.emit(op.take(x, _from_the_end(im, index, x.ty.shape[axis]), axis=axis))
    axes = [axis for axis, _ in used]
    if axes != list(range(axes[0], axes[0] + len(axes))):
        raise im.error("advanced indexing of axes that are not neighbours")
    lead = list(range(axes[0]))
    rank = len(x.ty.shape)
    rest = [d for d in range(rank) if d not in lead and d not in axes]
    moved = permute(im, x, axes + lead + rest)
    picked = im.emit(op.index_tensor(moved, [index for _, index in used]))
    index_rank = len(picked.ty.shape) - len(lead) - len(rest)
    order = (
        [index_rank + d for d in range(len(lead))]
        + list(range(index_rank))
        + [index_rank + len(lead) + d for d in range(len(rest))]
    )
    return permute(im, picked, order)


def _gather(im: Any, a: Args, out: Any) -> Any:
    return im.emit(op.gather_elements(a["self"], a["index"], a["dim"] % len(a["self"].ty.shape)))


def _scatter(reduction: str) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        dtype = im.dtype(out.dtype)
        updates = a.get("src", a.get("value"))
        if not is_tensor(updates):
            updates = filled(im, a["index"].ty.shape, updates, dtype)
        axis = a["dim"] % len(a["self"].ty.shape)
        return im.emit(op.scatter_elements(a["self"], a["index"], cast(im, updates, dtype), axis, reduction))

    return run


def _slice_scatter(im: Any, a: Args, out: Any) -> Any:
    """x with x[start:end] along one axis replaced (torch's functional form of an assignment to a slice)."""
    x, src, axis = a["self"], a["src"], a.get("dim", 0) % out.dim()
    size = x.ty.shape[axis]
    start, end, step = bound(a.get("start") or 0, size), bound(a.get("end"), size), a.get("step", 1)
    if step != 1:
        if not is_static(size):
            raise im.error("assigns to a part of the sequence", "token-mixing-not-captured")
        index = np.arange(int(size))
        chosen = index[start:end:step]
        index[chosen] = int(size) + np.arange(len(chosen))
        both = im.emit(op.concat([x, cast(im, src, im.dtype(out.dtype))], axis=axis))
        return im.emit(op.take(both, relax.const(index, "int64"), axis=axis))
    return _overwrite(im, x, cast(im, src, im.dtype(out.dtype)), axis, start, end)


def _select_scatter(im: Any, a: Args, out: Any) -> Any:
    x, axis = a["self"], a["dim"] % out.dim()
    index = bound(a["index"], x.ty.shape[axis])
    shape = im.shape(out)
    shape[axis] = 1
    src = reshape(im, cast(im, a["src"], im.dtype(out.dtype)), shape)
    return _overwrite(im, x, src, axis, index, index + 1)


def _overwrite(im: Any, x: Any, src: Any, axis: int, start: Any, end: Any) -> Any:
    size = x.ty.shape[axis]
    if not is_static(size):
        if start == 0 and same_dim(end, size):
            return src
        raise im.error("assigns to a part of the sequence", "token-mixing-not-captured")
    end = min(end, int(size))
    parts = []
    if start > 0:
        parts.append(im.emit(op.strided_slice(x, [axis], [0], [start], [1])))
    parts.append(src)
    if end < int(size):
        parts.append(im.emit(op.strided_slice(x, [axis], [end], [int(size)], [1])))
    return parts[0] if len(parts) == 1 else im.emit(op.concat(parts, axis=axis))


CONVERTERS: dict[str, Converter] = {
    "embedding.default": _embedding,
    "index_select.default": _index_select,
    "index.Tensor": _index,
    "gather.default": _gather,
    **entries("scatter.src scatter.value", _scatter("update")),
    "scatter_add.default": _scatter("add"),
    "slice_scatter.default": _slice_scatter,
    "select_scatter.default": _select_scatter,
}
