"""Converters that create, reshape, slice and cast tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

from llmc.frontend.import_base import (
    Args,
    Converter,
    bound,
    cast,
    entries,
    filled,
    is_static,
    operand,
    permute,
    reshape,
    same_dim,
    same_shape,
)

op = relax.op


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
    start, end = bound(start, size), bound(a.get("end"), size)
    if isinstance(end, int) and is_static(size):
        end = min(end, int(size))
    wanted = im.shape(out)[axis]
    if is_static(size) and not is_static(wanted) and step == 1:
        # Relax cannot prove that min(T, size) is T; as an index it is what `use_positions` looks for, too
        index = im.emit(op.arange(start, start + wanted, 1, "int32"))
        return im.emit(op.take(x, reshape(im, index, [wanted]), axis=axis))
    return im.emit(op.strided_slice(x, [axis], [start], [end], [step]))


def _select(im: Any, a: Args, out: Any) -> Any:
    x = a["self"]
    axis = a.get("dim", 0) % len(x.ty.shape)
    index = bound(a["index"], x.ty.shape[axis])
    return reshape(im, im.emit(op.strided_slice(x, [axis], [index], [index + 1], [1])), im.shape(out))


def _narrow(im: Any, a: Args, out: Any) -> Any:
    return _slice(im, {**a, "end": a["start"] + a["length"], "step": 1}, out)


def _repeat(im: Any, a: Args, out: Any) -> Any:
    x, repeats = a["self"], a["repeats" if "repeats" in a else "dims"]
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
    fill = a.get("value") or 0
    for i in range(len(pad) // 2):
        axis = len(x.ty.shape) - 1 - i
        for side, amount in enumerate(pad[2 * i : 2 * i + 2]):
            if isinstance(amount, int) and amount == 0:
                continue
            if isinstance(amount, int) and amount < 0:
                raise im.error("negative padding")
            shape = list(x.ty.shape)
            shape[axis] = amount
            block = filled(im, shape, fill, dtype)
            x = im.emit(op.concat([x, block] if side else [block, x], axis=axis))
    return x


def _arange(im: Any, a: Args, out: Any) -> Any:
    dtype = im.dtype(out.dtype)
    return im.emit(op.arange(a.get("start", 0), a["end"], a.get("step", 1), dtype))


def _full(value: Any) -> Converter:
    def run(im: Any, a: Args, out: Any) -> Any:
        fill = a.get("fill_value", a.get("value")) if value is None else value
        return filled(im, im.shape(out), fill, im.dtype(out.dtype))

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


CONVERTERS: dict[str, Converter] = {
    **entries(
        "view.default reshape.default _unsafe_view.default flatten.using_ints unsqueeze.default squeeze.default "
        "squeeze.dim squeeze.dims unflatten.int view_as.default reshape_as.default _reshape_alias.default",
        _reshape,
    ),
    **entries(
        "alias.default clone.default contiguous.default detach.default detach_.default lift_fresh.default "
        "lift_fresh_copy.default dropout.default dropout_.default _assert_tensor_metadata.default positive.default "
        "native_dropout.default",
        _same,
    ),
    **entries("expand.default expand_as.default broadcast_to.default", _expand),
    **entries("transpose.int swapaxes.default swapdims.default t.default", _transpose),
    **entries("mT.default adjoint.default numpy_T.default", _swap_last),
    **entries("permute.default", _permute),
    **entries("movedim.int movedim.intlist moveaxis.int", _movedim),
    **entries("cat.default concat.default concatenate.default", _cat),
    **entries("stack.default", _stack),
    **entries(
        "split.Tensor split.sizes split_with_sizes.default chunk.default tensor_split.sections tensor_split.indices",
        _split,
    ),
    **entries("unbind.int", _unbind),
    **entries("slice.Tensor", _slice),
    **entries("select.int", _select),
    **entries("narrow.default", _narrow),
    **entries("repeat.default tile.default", _repeat),
    **entries("repeat_interleave.self_int", _repeat_interleave),
    **entries("flip.default", _flip),
    **entries("tril.default", _tri(op.tril)),
    **entries("triu.default", _tri(op.triu)),
    **entries("pad.default constant_pad_nd.default", _pad),
    **entries("arange.default arange.start arange.start_step", _arange),
    **entries("full.default full_like.default new_full.default fill.Scalar", _full(None)),
    **entries("ones.default ones_like.default new_ones.default", _full(1)),
    **entries(
        "zeros.default zeros_like.default new_zeros.default empty.memory_format empty_like.default new_empty.default "
        "zero.default",
        _full(0),
    ),
    **entries("scalar_tensor.default", _scalar),
    **entries(
        "to.dtype to.device to.dtype_layout to.other _to_copy.default type_as.default float.default", _cast
    ),
    **entries("one_hot.default", _one_hot),
    **entries("copy.default", _copy),
}
