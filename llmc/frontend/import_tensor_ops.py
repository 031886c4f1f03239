"""Converters for creating, reshaping, slicing and indexing tensors, and for complex numbers as pairs of real tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tvm import relax

from llmc.frontend.import_base import (
    Args,
    Complex,
    Converter,
    cast,
    dtype_of,
    emit_matmul,
    is_tensor,
    operand,
    permute,
    reshape,
    same_dim,
    same_shape,
)

op = relax.op
_MAX = 2**62


# layout


def _same(im: Any, a: Args, out: Any) -> Any:
    return a["input"] if "input" in a else a["self"]


def _reshape(im: Any, a: Args, out: Any) -> Any:
    return reshape(im, a["self"], im.shape(out))


def _expand(im: Any, a: Args, out: Any) -> Any:
    x, shape = a["self"], im.shape(out)
    if same_shape(x.ty.shape, shape):
        return x
    return im.emit(op.broadcast_to(x, shape))


def _transpose(im: Any, a: Args, out: Any) -> Any:
    x = a["self"]
    axes = list(range(len(x.ty.shape)))
    if len(axes) < 2:
        return x
    i, j = a.get("dim0", 0) % len(axes), a.get("dim1", 1) % len(axes)
    axes[i], axes[j] = axes[j], axes[i]
    return permute(im, x, axes)


def _swap_last(im: Any, a: Args, out: Any) -> Any:
    rank = len(a["self"].ty.shape)
    return _transpose(im, {**a, "dim0": rank - 2, "dim1": rank - 1}, out)


def _permute(im: Any, a: Args, out: Any) -> Any:
    rank = len(a["self"].ty.shape)
    return permute(im, a["self"], [d % rank for d in a["dims"]])


def _movedim(im: Any, a: Args, out: Any) -> Any:
    rank = len(a["self"].ty.shape)
    source, target = (
        [d % rank for d in ([v] if isinstance(v, int) else v)] for v in (a["source"], a["destination"])
    )
    rest = [d for d in range(rank) if d not in source]
    axes: list[int] = []
    for position in range(rank):
        axes.append(source[target.index(position)] if position in target else rest.pop(0))
    return permute(im, a["self"], axes)


def _cat(im: Any, a: Args, out: Any) -> Any:
    parts = [cast(im, x, im.dtype(out.dtype)) for x in a["tensors"]]
    parts = [x for x in parts if not (len(x.ty.shape) == 1 and same_dim(x.ty.shape[0], 0))]
    if len(parts) == 1:
        return parts[0]
    return im.emit(op.concat(parts, axis=a.get("dim", 0) % out.dim()))


def _stack(im: Any, a: Args, out: Any) -> Any:
    axis = a.get("dim", 0) % out.dim()
    shape = im.shape(out)
    shape[axis] = 1
    parts = [reshape(im, cast(im, x, im.dtype(out.dtype)), shape) for x in a["tensors"]]
    return parts[0] if len(parts) == 1 else im.emit(op.concat(parts, axis=axis))


def _split(im: Any, a: Args, out: Any) -> Any:
    """split, split_with_sizes, chunk, tensor_split: torch's own result says how large the parts are."""
    x = a["self"]
    axis = a.get("dim", 0) % len(x.ty.shape)
    sizes = [im.prim(part.shape[axis]) for part in out]
    if len(sizes) == 1:
        return [x]
    bounds, total = [], 0
    for size in sizes[:-1]:
        total = total + size
        bounds.append(total)
    both = im.emit(op.split(x, bounds, axis))
    return [im.emit(relax.TupleGetItem(both, i)) for i in range(len(sizes))]


def _unbind(im: Any, a: Args, out: Any) -> Any:
    x = a["self"]
    axis, count = a.get("dim", 0) % len(x.ty.shape), len(out)
    if count == 1:
        return [reshape(im, x, im.shape(out[0]))]
    both = im.emit(op.split(x, count, axis))
    return [reshape(im, im.emit(relax.TupleGetItem(both, i)), im.shape(part)) for i, part in enumerate(out)]


def _slice(im: Any, a: Args, out: Any) -> Any:
    x = a["self"]
    axis, step = a.get("dim", 0) % len(x.ty.shape), a.get("step", 1)
    size = x.ty.shape[axis]
    start = a.get("start", 0) if a.get("start") is not None else 0
    if isinstance(start, int) and start == 0 and step == 1 and same_dim(size, im.shape(out)[axis]):
        return x
    start, end = _bound(start, size), _bound(a.get("end"), size)
    if isinstance(end, int) and is_static(size):
        end = min(end, int(size))
    wanted = im.shape(out)[axis]
    if is_static(size) and not is_static(wanted) and step == 1:
        # Relax cannot prove that min(T, size) is T; as an index it is what `use_positions` looks for, too
        index = im.emit(op.arange(start, start + wanted, 1, "int32"))
        return im.emit(op.take(x, reshape(im, index, [wanted]), axis=axis))
    return im.emit(op.strided_slice(x, [axis], [start], [end], [step]))


def is_static(size: Any) -> bool:
    return isinstance(size, int) or hasattr(size, "value")


def _bound(value: Any, size: Any) -> Any:
    if value is None or (isinstance(value, int) and value >= _MAX):
        return int(size) if is_static(size) else size
    if isinstance(value, int) and value < 0:
        return (int(size) if is_static(size) else size) + value
    return value


def _select(im: Any, a: Args, out: Any) -> Any:
    x = a["self"]
    axis = a.get("dim", 0) % len(x.ty.shape)
    index = _bound(a["index"], x.ty.shape[axis])
    return reshape(im, im.emit(op.strided_slice(x, [axis], [index], [index + 1], [1])), im.shape(out))


def _narrow(im: Any, a: Args, out: Any) -> Any:
    return _slice(im, {**a, "end": a["start"] + a["length"], "step": 1}, out)


def _repeat(im: Any, a: Args, out: Any) -> Any:
    x, repeats = a["self"], a.get("repeats", a.get("dims"))
    if all(isinstance(r, int) and r == 1 for r in repeats):
        return reshape(im, x, im.shape(out))
    if not all(isinstance(r, int) for r in repeats):
        shape = [1] * (len(repeats) - len(x.ty.shape)) + list(x.ty.shape)
        if all(same_dim(s, 1) or same_dim(r, 1) for s, r in zip(shape, repeats, strict=True)):
            return im.emit(op.broadcast_to(reshape(im, x, shape), im.shape(out)))
        raise im.error("a repetition that depends on the sequence length", "token-mixing-not-captured")
    return im.emit(op.tile(x, list(repeats)))


def _repeat_interleave(im: Any, a: Args, out: Any) -> Any:
    x = a["self"]
    if a.get("dim") is None:
        x = reshape(im, x, [-1]) if len(x.ty.shape) != 1 else x
        return im.emit(op.repeat(x, a["repeats"], 0))
    if a["repeats"] == 1:
        return x
    return im.emit(op.repeat(x, a["repeats"], a["dim"] % len(x.ty.shape)))


def _flip(im: Any, a: Args, out: Any) -> Any:
    x = a["self"]
    for axis in a["dims"]:
        x = im.emit(op.flip(x, axis % len(x.ty.shape)))
    return x


def _tri(fn: Callable[..., Any]) -> Converter:
    return lambda im, a, out: im.emit(fn(a["self"], a.get("diagonal", 0)))


def _pad(im: Any, a: Args, out: Any) -> Any:
    """Constant padding as concatenation with filled tensors."""
    x, pad, dtype = a["self"], a["pad"], im.dtype(out.dtype)
    fill = im.constant(a.get("value") or 0, dtype)
    for i in range(len(pad) // 2):
        axis = len(x.ty.shape) - 1 - i
        for side, amount in enumerate(pad[2 * i : 2 * i + 2]):
            if isinstance(amount, int) and amount == 0:
                continue
            if isinstance(amount, int) and amount < 0:
                raise im.error("negative padding")
            shape = list(x.ty.shape)
            shape[axis] = amount
            block = im.emit(op.full(shape, fill, dtype))
            x = im.emit(op.concat([x, block] if side else [block, x], axis=axis))
    return x


# creation


def _arange(im: Any, a: Args, out: Any) -> Any:
    dtype = im.dtype(out.dtype)
    return im.emit(op.arange(a.get("start", 0), a["end"], a.get("step", 1), dtype))


def _full(value: Any) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        fill = a.get("fill_value", a.get("value")) if value is None else value
        dtype = im.dtype(out.dtype)
        if out.dim() == 0:
            return operand(im, fill, dtype)
        return im.emit(op.full(im.shape(out), operand(im, fill, dtype), dtype))

    return run


def _scalar(im: Any, a: Args, out: Any) -> Any:
    return operand(im, a["s"], im.dtype(out.dtype))


def _cast(im: Any, a: Args, out: Any) -> Any:
    return cast(im, a["self"], im.dtype(out.dtype))


def _one_hot(im: Any, a: Args, out: Any) -> Any:
    if not isinstance(a["num_classes"], int) or a["num_classes"] < 0:
        raise im.error("one_hot without the number of classes")
    one, zero = im.constant(1, "int64"), im.constant(0, "int64")
    return im.emit(op.one_hot(a["self"], one, zero, a["num_classes"], -1))


def _copy(im: Any, a: Args, out: Any) -> Any:
    x = cast(im, a["src"], im.dtype(out.dtype))
    return x if same_shape(x.ty.shape, im.shape(out)) else im.emit(op.broadcast_to(x, im.shape(out)))


# indexing


def _embedding(im: Any, a: Args, out: Any) -> Any:
    return im.emit(op.take(a["weight"], a["indices"], axis=0))


def _index_select(im: Any, a: Args, out: Any) -> Any:
    return im.emit(op.take(a["self"], a["index"], axis=a["dim"] % len(a["self"].ty.shape)))


def _index(im: Any, a: Args, out: Any) -> Any:
    x, indices = a["self"], a["indices"]
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if any(dtype_of(index) == "bool" for _, index in used):
        raise im.error("a result whose shape depends on values")
    if len(used) == 1:
        axis, index = used[0]
        return im.emit(op.take(x, index, axis=axis))
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
            updates = im.emit(op.full(list(a["index"].ty.shape), im.constant(updates, dtype), dtype))
        axis = a["dim"] % len(a["self"].ty.shape)
        return im.emit(op.scatter_elements(a["self"], a["index"], cast(im, updates, dtype), axis, reduction))

    return run


def _slice_scatter(im: Any, a: Args, out: Any) -> Any:
    """x with x[start:end] along one axis replaced (torch's functional form of an assignment to a slice)."""
    x, src, axis = a["self"], a["src"], a.get("dim", 0) % out.dim()
    size = x.ty.shape[axis]
    start, end, step = _bound(a.get("start") or 0, size), _bound(a.get("end"), size), a.get("step", 1)
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
    index = _bound(a["index"], x.ty.shape[axis])
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


def _einsum(im: Any, a: Args, out: Any) -> Any:
    """Two operands at a time as one batched matmul; the result keeps the labels that are still needed."""
    terms, _, result = a["equation"].replace(" ", "").partition("->")
    labels = terms.split(",")
    if "." in terms or any(len(set(t)) != len(t) for t in labels):
        raise im.error(f"the einsum {a['equation']!r}")
    x, left = a["tensors"][0], labels[0]
    for i, (y, right) in enumerate(zip(a["tensors"][1:], labels[1:], strict=True)):
        later = set(result).union(*labels[i + 2 :])
        x, left = _contract(im, x, left, y, right, later)
    drop = [left.index(c) for c in left if c not in result]
    if drop:
        x = im.emit(op.sum(x, drop, False))
        left = "".join(c for c in left if c in result)
    return permute(im, x, [left.index(c) for c in result])


def _contract(im: Any, x: Any, left: str, y: Any, right: str, later: set[str]) -> tuple[Any, str]:
    both = [c for c in left if c in right]
    batch = [c for c in both if c in later]
    summed = [c for c in both if c not in later]
    own_x, own_y = [c for c in left if c not in both], [c for c in right if c not in both]
    size = {**dict(zip(left, x.ty.shape, strict=True)), **dict(zip(right, y.ty.shape, strict=True))}

    def product(names: list[str]) -> Any:
        total: Any = 1
        for name in names:
            dim = size[name]
            total = total * (int(dim) if is_static(dim) else dim)
        return total

    a = permute(im, x, [left.index(c) for c in batch + own_x + summed])
    b = permute(im, y, [right.index(c) for c in batch + summed + own_y])
    lead = [size[c] for c in batch]
    a = reshape(im, a, [*lead, product(own_x), product(summed)])
    b = reshape(im, b, [*lead, product(summed), product(own_y)])
    z = emit_matmul(im, a, b)
    z = reshape(im, z, [*lead, *(size[c] for c in own_x), *(size[c] for c in own_y)])
    return z, "".join(batch + own_x + own_y)


# complex numbers


def _complex_multiply(im: Any, a: Args) -> Complex:
    x, y = a["self"], a["other"]
    if not isinstance(x, Complex):
        x, y = y, x
    if not isinstance(y, Complex):
        y = operand(im, y, dtype_of(x.real))
        return Complex(im.emit(op.multiply(x.real, y)), im.emit(op.multiply(x.imag, y)))
    parts = [im.emit(op.multiply(p, q)) for p in (x.real, x.imag) for q in (y.real, y.imag)]
    return Complex(im.emit(op.subtract(parts[0], parts[3])), im.emit(op.add(parts[1], parts[2])))


def _polar(im: Any, a: Args) -> Complex:
    size, angle = a["abs"], a["angle"]
    return Complex(
        im.emit(op.multiply(size, im.emit(op.cos(angle)))), im.emit(op.multiply(size, im.emit(op.sin(angle))))
    )


def _view_as_complex(im: Any, a: Args) -> Complex:
    x = a["self"]
    axis, shape = len(x.ty.shape) - 1, list(x.ty.shape)[:-1]
    parts = [reshape(im, im.emit(op.strided_slice(x, [axis], [i], [i + 1], [1])), shape) for i in range(2)]
    return Complex(*parts)


def _view_as_real(im: Any, a: Args) -> Any:
    x = a["self"]
    shape = [*x.real.ty.shape, 1]
    parts = [reshape(im, part, shape) for part in (x.real, x.imag)]
    return im.emit(op.concat(parts, axis=len(shape) - 1))


def _conjugate(im: Any, a: Args) -> Complex:
    return Complex(a["self"].real, im.emit(op.negative(a["self"].imag)))


COMPLEX_OPS: dict[str, Callable[[Any, Args], Any]] = {
    "mul.Tensor": _complex_multiply,
    "polar.default": _polar,
    "view_as_complex.default": _view_as_complex,
    "view_as_real.default": _view_as_real,
    "complex.default": lambda im, a: Complex(a["real"], a["imag"]),
    "conj.default": _conjugate,
    "_conj.default": _conjugate,
    "real.default": lambda im, a: a["self"].real,
    "imag.default": lambda im, a: a["self"].imag,
}
_COMPLEX_LAYOUT = frozenset(
    "view reshape unsqueeze squeeze expand transpose permute slice select index flatten alias contiguous "
    "clone detach index_select to _to_copy".split()
)


def convert_complex(im: Any, name: str, args: Args, out: Any) -> Any:
    """An operator with a complex operand or result."""
    if name in COMPLEX_OPS:
        return COMPLEX_OPS[name](im, args)
    if name.split(".")[0] in _COMPLEX_LAYOUT and out.is_complex():
        plain = torch.empty_like(out, dtype=out.real.dtype)
        x = args["self"]
        real, imag = (CONVERTERS[name](im, {**args, "self": part}, plain) for part in (x.real, x.imag))
        return Complex(real, imag)
    raise im.error("an operation on complex numbers that llmc cannot import")


def _entries(names: str, converter: Converter) -> dict[str, Converter]:
    return dict.fromkeys(names.split(), converter)


CONVERTERS: dict[str, Converter] = {
    **_entries(
        "view.default reshape.default _unsafe_view.default flatten.using_ints unsqueeze.default squeeze.default "
        "squeeze.dim squeeze.dims unflatten.int view_as.default reshape_as.default _reshape_alias.default",
        _reshape,
    ),
    **_entries(
        "alias.default clone.default contiguous.default detach.default detach_.default lift_fresh.default "
        "lift_fresh_copy.default dropout.default dropout_.default _assert_tensor_metadata.default positive.default "
        "native_dropout.default",
        _same,
    ),
    **_entries("expand.default expand_as.default broadcast_to.default", _expand),
    **_entries("transpose.int swapaxes.default swapdims.default t.default", _transpose),
    **_entries("mT.default adjoint.default numpy_T.default", _swap_last),
    **_entries("permute.default", _permute),
    **_entries("movedim.int movedim.intlist moveaxis.int", _movedim),
    **_entries("cat.default concat.default concatenate.default", _cat),
    **_entries("stack.default", _stack),
    **_entries(
        "split.Tensor split.sizes split_with_sizes.default chunk.default tensor_split.sections tensor_split.indices",
        _split,
    ),
    **_entries("unbind.int", _unbind),
    **_entries("slice.Tensor", _slice),
    **_entries("select.int", _select),
    **_entries("narrow.default", _narrow),
    **_entries("repeat.default tile.default", _repeat),
    **_entries("repeat_interleave.self_int", _repeat_interleave),
    **_entries("flip.default", _flip),
    **_entries("tril.default", _tri(op.tril)),
    **_entries("triu.default", _tri(op.triu)),
    **_entries("pad.default constant_pad_nd.default", _pad),
    **_entries("arange.default arange.start arange.start_step", _arange),
    **_entries("full.default full_like.default new_full.default fill.Scalar", _full(None)),
    **_entries("ones.default ones_like.default new_ones.default", _full(1)),
    **_entries(
        "zeros.default zeros_like.default new_zeros.default empty.memory_format empty_like.default new_empty.default "
        "zero.default",
        _full(0),
    ),
    **_entries("scalar_tensor.default", _scalar),
    **_entries(
        "to.dtype to.device to.dtype_layout to.other _to_copy.default type_as.default float.default", _cast
    ),
    **_entries("one_hot.default", _one_hot),
    **_entries("copy.default", _copy),
    **_entries("embedding.default", _embedding),
    **_entries("index_select.default", _index_select),
    **_entries("index.Tensor", _index),
    **_entries("gather.default", _gather),
    **_entries("scatter.src scatter.value", _scatter("update")),
    **_entries("scatter_add.default", _scatter("add")),
    **_entries("slice_scatter.default", _slice_scatter),
    **_entries("select_scatter.default", _select_scatter),
    **_entries("einsum.default", _einsum),
}
