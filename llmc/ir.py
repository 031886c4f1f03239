"""What llmc uses of tvm's Relax, typed. Passes and the frontend build and match opaque ops here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst, Op, StringImm

# tvm has no type information; these names say what is meant
Expr: TypeAlias = Any
Var: TypeAlias = Any
IRModule: TypeAlias = Any
Function: TypeAlias = Any


def tensor_type(shape: Sequence[Any], dtype: str) -> Any:
    """Relax tensor type with the given (symbolic or int) shape."""
    return relax.TensorType([tirx.IntImm("int64", s) if isinstance(s, int) else s for s in shape], dtype)


def opaque_call(name: str, tensors: Sequence[Any], attrs_json: str, out_type: Any) -> Any:
    """A pure call to the opaque operator `name` (llmc/ops.py)."""
    return relax.call_pure_packed(name, *tensors, StringImm(attrs_json), ty_args=out_type)


def match_opaque(expr: Any, name: str) -> tuple[list[Any], str] | None:
    """(tensor operands, attributes as JSON) if `expr` is a call to the opaque operator `name`, else None."""
    if (
        not isinstance(expr, relax.Call)
        or not isinstance(expr.op, Op)
        or expr.op.name != "relax.call_pure_packed"
    ):
        return None
    callee = expr.args[0]
    if not isinstance(callee, relax.ExternFunc) or callee.global_symbol != name:
        return None
    operands = list(expr.args[1:])
    attrs = operands.pop()
    assert isinstance(attrs, StringImm)
    return operands, attrs.value


def is_op(expr: Any, name: str) -> bool:
    """True if `expr` is a call to the Relax operator `name`, e.g. ``relax.matmul``."""
    return op_name(expr) == name


def shallow_copy(module: IRModule) -> IRModule:
    """A module with the same functions, to add to or replace in without touching the original."""
    return tvm.IRModule(dict(module.functions.items()), attrs=module.attrs)


def is_one(dim: Any) -> bool:
    """True if a dimension is the constant 1."""
    return isinstance(dim, tirx.IntImm) and int(dim) == 1


def is_rows(var: Any) -> bool:
    """[1, ..., 1, rows, K] with a constant K."""
    shape = dims(var)
    return len(shape) >= 2 and all(is_one(d) for d in shape[:-2]) and isinstance(shape[-1], tirx.IntImm)


def dims(var: Any) -> list[Any]:
    """The dimensions of a tensor variable (IntImm or symbolic)."""
    return list(var.ty.shape)


def op_name(expr: Any) -> str:
    """Name of the Relax operator that `expr` calls, e.g. ``relax.add``; "" if it is no operator call."""
    return expr.op.name if isinstance(expr, relax.Call) and isinstance(expr.op, Op) else ""


def is_constant(dim: Any) -> bool:
    """True if a dimension is known."""
    return isinstance(dim, tirx.IntImm)


def slice_of(value: Any) -> tuple[int, int, int, int] | None:
    """(axis, begin, end, step) of a strided_slice of one axis with constant bounds, else None."""
    parts = []
    for arg in value.args[1:5]:
        fields = getattr(arg, "fields", None)
        if fields is None or len(fields) != 1:
            return None
        field = getattr(fields[0], "value", fields[0])
        if not isinstance(field, (int, tirx.IntImm)):
            return None
        parts.append(int(field))
    if len(parts) == 3:
        parts.append(1)
    if len(parts) != 4:
        return None
    axis, begin, end, step = parts
    shape = dims(value.args[0])
    axis = axis % len(shape)
    if begin < 0 or end < 0 or not is_constant(shape[axis]):
        return None
    return axis, begin, min(end, int(shape[axis])), step


def is_tensor_constant(value: Any) -> bool:
    """True if `value` is a constant tensor."""
    return isinstance(value, GenericConst)


def scalar_of(value: Any) -> float | None:
    """The number that a constant tensor of one element holds, else None."""
    if not isinstance(value, GenericConst) or not isinstance(value.ty, relax.TensorType):
        return None
    array = value.value.numpy()
    return float(array.reshape(())) if array.size == 1 else None


def uniform_value(value: Any) -> float | None:
    """The number that every element of a constant tensor is, else None."""
    if not isinstance(value, GenericConst) or not isinstance(value.ty, relax.TensorType):
        return None
    array = value.value.numpy()
    if array.size == 0 or str(value.ty.dtype) not in ("float32", "float16", "float64"):
        return None
    first = array.reshape(-1)[0]
    return float(first) if bool((array == first).all()) else None
