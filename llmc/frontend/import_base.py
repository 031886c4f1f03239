"""What the converters share: bound arguments and small emitters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tvm import relax, tirx

Args = dict[str, Any]
Converter = Callable[[Any, Args, Any], Any]
op = relax.op


@dataclass(frozen=True)
class Complex:
    """A complex tensor as two real ones; Relax has no complex dtype, and rotary embeddings need little of it."""

    real: Any
    imag: Any


def bind_args(im: Any, node: Any) -> Args:
    """Arguments by schema name with defaults, nodes replaced by their Relax values and sizes by ints or expressions in T."""

    def value(x: Any) -> Any:
        if isinstance(x, torch.fx.Node):
            return im.env[x]
        if isinstance(x, list | tuple):
            return [value(y) for y in x]
        return im.prim(x)

    schema = node.target._schema.arguments
    args: Args = {}
    for i, arg in enumerate(schema):
        if i < len(node.args):
            args[arg.name] = value(node.args[i])
        elif arg.name in node.kwargs:
            args[arg.name] = value(node.kwargs[arg.name])
        elif arg.has_default_value():
            args[arg.name] = arg.default_value
    return args


def dtype_of(x: Any) -> str:
    return str(x.ty.dtype)


def is_tensor(x: Any) -> bool:
    return isinstance(getattr(x, "ty", None), relax.TensorType)


def same_shape(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Dimension by dimension equality; symbolic dimensions by structure."""
    return len(left) == len(right) and all(same_dim(a, b) for a, b in zip(left, right, strict=True))


def same_dim(a: Any, b: Any) -> bool:
    a, b = (int(x) if isinstance(x, tirx.IntImm) else x for x in (a, b))
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a.same_as(b) or str(a) == str(b)


def cast(im: Any, x: Any, dtype: str) -> Any:
    return x if dtype_of(x) == dtype else im.emit(op.astype(x, dtype))


def operand(im: Any, x: Any, dtype: str) -> Any:
    """A tensor of the given dtype from a tensor or a number. Numbers computed from the sequence length are refused."""
    if isinstance(x, bool | int | float):
        return im.constant(x, dtype)
    if not is_tensor(x):
        raise im.error("a value computed from the sequence length", "token-mixing-not-captured")
    return cast(im, x, dtype)


def filled(im: Any, shape: Sequence[Any], value: Any, dtype: str) -> Any:
    """A tensor of one value. Broadcast, because TVM 0.27's `full` cannot be legalized for infinite values (masked scores)."""
    x = operand(im, value, dtype)
    return im.emit(op.broadcast_to(x, list(shape))) if len(shape) else x


def reshape(im: Any, x: Any, shape: Sequence[Any]) -> Any:
    return x if same_shape(x.ty.shape, shape) else im.emit(op.reshape(x, list(shape)))


def permute(im: Any, x: Any, axes: Sequence[int]) -> Any:
    return x if list(axes) == list(range(len(axes))) else im.emit(op.permute_dims(x, list(axes)))


def emit_matmul(im: Any, a: Any, b: Any) -> Any:
    return im.emit(op.matmul(a, b))


def module_path(node: torch.fx.Node, prefix: str = "") -> str:
    """Name of the innermost module that a node comes from, without the capture wrapper's prefix."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for name, _ in stack.values():
        path = name
    return path[len(prefix) :].lstrip(".") if path.startswith(prefix) else path


_LAST = 2**62  # torch writes "to the end" as the largest integer


def is_static(size: Any) -> bool:
    return isinstance(size, int) or hasattr(size, "value")


def bound(value: Any, size: Any) -> Any:
    """A slice bound as torch means it: None and huge numbers are the end, negative ones count from there."""
    if value is None or (isinstance(value, int) and value >= _LAST):
        return int(size) if is_static(size) else size
    if isinstance(value, int) and value < 0:
        return (int(size) if is_static(size) else size) + value
    return value


def entries(names: str, converter: Converter) -> dict[str, Converter]:
    return dict.fromkeys(names.split(), converter)
