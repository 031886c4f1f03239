"""Converters: one ATen operator of a decoder -> Relax, for importer.py.

A converter gets the importer, the bound arguments (Relax values, numbers, lists) by the name that they have in the ATen
schema, and torch's own result (a fake tensor), whose shape and dtype it has to produce. Sources: the ATen schemas of
torch 2.13; https://pytorch.org/docs/stable/torch.html for their meaning.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from tvm import relax

from llmc.frontend import import_elementwise, import_index, import_layout, import_opaque, import_reduce
from llmc.frontend.import_base import (
    Args,
    Complex,
    Converter,
    bind_args,
    emit_matmul,
    entries,
    is_static,
    permute,
    reshape,
)
from llmc.frontend.import_complex import COMPLEX_OPS, convert_complex

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
        return convert_complex(im, name, args, value)
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
        or name in COMPLEX_OPS
        or not isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
    )


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


CONVERTERS: dict[str, Converter] = {
    **import_layout.CONVERTERS,
    **import_index.CONVERTERS,
    **import_elementwise.CONVERTERS,
    **import_reduce.CONVERTERS,
    **import_opaque.CONVERTERS,
    "linear.default": _linear,
    "matmul.default": _matmul("self", "other"),
    **entries("mm.default bmm.default", _matmul("self", "mat2")),
    **entries("mv.default dot.default", _mv),
    **entries("addmm.default baddbmm.default", _addmm),
    "outer.default": _outer,
    **entries("einsum.default", _einsum),
}
