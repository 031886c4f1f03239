"""Converters of complex numbers as pairs of real tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tvm import relax

from llmc.frontend import import_index, import_layout
from llmc.frontend.import_base import (
    Args,
    Complex,
    dtype_of,
    operand,
    reshape,
)

op = relax.op


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
        layout = {**import_layout.CONVERTERS, **import_index.CONVERTERS}
        plain = torch.empty_like(out, dtype=out.real.dtype)
        x = args["self"]
        real, imag = (layout[name](im, {**args, "self": part}, plain) for part in (x.real, x.imag))
        return Complex(real, imag)
    raise im.error("an operation on complex numbers that llmc cannot import")
