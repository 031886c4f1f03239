"""Evaluates Relax expressions with numpy, at a chosen sequence length.

The frontend decides with it what a mask, an ALiBi bias or an index tensor means: those sub-graphs read no weights and no
tokens, so their values at a few lengths can be looked at. Tests evaluate whole graphs. It follows Relax's own definition of
each operator and knows only what decoders use; anything else raises NotEvaluable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from tvm import relax, tirx
from tvm.ir import GenericConst, StringImm

from llmc.ir import is_op
from llmc.passes.rewrite import Graph

Array = Any
Opaque = Callable[[list[Array], str, Any], Array]


class NotEvaluable(Exception):
    """The expression reads something unknown (a weight, the tokens) or uses an operator without an entry here."""

    def __init__(self, what: str, var: Any = None) -> None:
        super().__init__(what)
        self.what = what
        self.var = var


def evaluate_dim(expr: Any, length: int) -> int:
    """A size with the symbolic length replaced."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, tirx.IntImm):
        return int(expr.value)
    kind = type(expr).__name__
    if kind in _DIM_OPS:
        return _DIM_OPS[kind](evaluate_dim(expr.a, length), evaluate_dim(expr.b, length))
    if kind == "Var":
        return length
    raise NotEvaluable(f"size {expr}")


_DIM_OPS: dict[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "FloorDiv": lambda a, b: a // b,
    "FloorMod": lambda a, b: a % b,
    "Max": max,
    "Min": min,
}
_HALF = ("bfloat16", "float16")


def numpy_dtype(name: str) -> Any:
    return np.dtype(getattr(ml_dtypes, name)) if name in ("bfloat16", "float8_e4m3fn") else np.dtype(name)


class Evaluator:
    """Evaluates variables of one function.

    Args:
        graph: definitions.
        length: value of the symbolic length.
        known: values of parameters (and of variables that are to be taken as given).
        opaque: implementations of opaque operators: (operands, attributes as JSON, variable) -> value.
        exact: keep float32 where the graph rounds to a half precision dtype.
    """

    def __init__(
        self,
        graph: Graph,
        length: int,
        known: Mapping[Any, Array],
        opaque: Mapping[str, Opaque] | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self.graph = graph
        self.length = length
        self.values: dict[Any, Array] = dict(known)
        self.opaque = dict(opaque or {})
        self.exact = exact

    def value(self, expr: Any) -> Array:
        """The value of a variable, constant, size, shape or tuple."""
        if isinstance(expr, GenericConst):
            return self._const(expr)
        if isinstance(expr, relax.Tuple):
            return [self.value(f) for f in expr.fields]
        if isinstance(expr, relax.ShapeExpr):
            return [evaluate_dim(d, self.length) for d in expr.values]
        if isinstance(expr, relax.Var) and isinstance(
            getattr(expr, "ty", None), relax.TensorType | relax.TupleType
        ):
            if expr not in self.values:
                self._evaluate(expr)
            return self.values[expr]
        return evaluate_dim(expr, self.length)

    def _const(self, expr: Any) -> Array:
        data = expr.value.numpy()
        if str(expr.ty.dtype) == "bfloat16" and data.dtype == np.uint16:
            data = data.view(ml_dtypes.bfloat16)
        return data.astype("float32") if self.exact and str(expr.ty.dtype) in _HALF else data

    def _evaluate(self, var: Any) -> None:
        stack = [var]
        while stack:
            top = stack[-1]
            if top in self.values:
                stack.pop()
                continue
            definition = self.graph.definition(top)
            if definition is None:
                raise NotEvaluable(f"the input {top.name}", top)
            missing = [v for v in tensor_operands(definition) if v not in self.values]
            if missing:
                stack.extend(missing)
            else:
                self.values[top] = self.compute(definition, top)
                stack.pop()

    def compute(self, expr: Any, var: Any) -> Array:
        """The value of a binding whose operands are known."""
        if isinstance(expr, relax.TupleGetItem):
            return self.value(expr.tuple_value)[expr.index]
        if not isinstance(expr, relax.Call):
            return self.value(expr)
        opaque = match_any_opaque(expr)
        if opaque is not None:
            name, operands, attrs = opaque
            if name not in self.opaque:
                raise NotEvaluable(name, var)
            return self._finish(self.opaque[name]([self.value(x) for x in operands], attrs, var), var)
        name = expr.op.name.removeprefix("relax.")
        fn = OPERATORS.get(name)
        if fn is None:
            raise NotEvaluable(expr.op.name, var)
        args = [self.value(a) for a in expr.args]
        with np.errstate(all="ignore"):
            return self._finish(fn(self, expr, *[self._widen(a) for a in args]), var)

    def _widen(self, x: Array) -> Array:
        if isinstance(x, np.ndarray) and x.dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype("float16")):
            return x.astype("float32")
        if isinstance(x, list):
            return [self._widen(y) for y in x]
        return x

    def _finish(self, x: Array, var: Any) -> Array:
        if isinstance(x, tuple | list):
            return [self._round(y, t) for y, t in zip(x, var.ty.fields, strict=True)]
        return self._round(x, var.ty)

    def _round(self, x: Array, ty: Any) -> Array:
        dtype = str(ty.dtype)
        if self.exact and dtype in _HALF:
            dtype = "float32"
        return np.asarray(x).astype(numpy_dtype(dtype), copy=False)


def match_any_opaque(expr: Any) -> tuple[str, list[Any], str] | None:
    """(name, tensor operands, attributes as JSON) if `expr` is a call to an opaque operator, else None."""
    if not is_op(expr, "relax.call_pure_packed") or not isinstance(expr.args[0], relax.ExternFunc):
        return None
    if len(expr.args) < 2 or not isinstance(expr.args[-1], StringImm):
        return None
    return str(expr.args[0].global_symbol), list(expr.args[1:-1]), str(expr.args[-1].value)


def tensor_operands(expr: Any) -> list[Any]:
    """Tensor variables that a binding reads (not the sizes in it)."""
    found: list[Any] = []

    def visit(x: Any) -> None:
        if isinstance(x, relax.Var):
            if isinstance(getattr(x, "ty", None), relax.TensorType | relax.TupleType):
                found.append(x)
        elif isinstance(x, relax.Call):
            for arg in x.args:
                visit(arg)
        elif isinstance(x, relax.Tuple):
            for field in x.fields:
                visit(field)
        elif isinstance(x, relax.TupleGetItem):
            visit(x.tuple_value)

    visit(expr)
    return found


def _axes(call: Any, x: Array) -> tuple[int, ...] | None:
    axis = call.attrs.axis
    return None if axis is None else tuple(int(a) % x.ndim for a in axis)


def _axis(call: Any) -> int:
    return int(call.attrs.axis)


def _softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _erf(x: Array) -> Array:
    import math

    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _layer_norm(ev: Any, call: Any, x: Array, gamma: Array, beta: Array) -> Array:
    axes = tuple(int(a) % x.ndim for a in call.attrs.axes)
    mean = x.mean(axes, keepdims=True)
    var = ((x - mean) ** 2).mean(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + call.attrs.epsilon) * gamma + beta


def _strided_slice(
    ev: Any, call: Any, x: Array, axes: Any, begin: Any, end: Any, strides: Any = None
) -> Array:
    index: list[Any] = [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        index[axis] = slice(begin[i], end[i], strides[i] if strides else 1)
    return x[tuple(index)]


def _split(ev: Any, call: Any, x: Array) -> Array:
    how = call.attrs.indices_or_sections
    if isinstance(how, int | tirx.IntImm):
        return np.split(x, int(how), _axis(call))
    return np.split(x, [evaluate_dim(i, ev.length) for i in how], _axis(call))


def _squeeze(ev: Any, call: Any, x: Array) -> Array:
    axis = call.attrs.axis
    return x.squeeze() if axis is None else x.squeeze(tuple(int(a) for a in axis))


def _scatter_elements(ev: Any, call: Any, x: Array, index: Array, updates: Array) -> Array:
    out = x.copy()
    axis = _axis(call) % x.ndim
    grid = list(np.indices(index.shape))
    grid[axis] = index
    if str(call.attrs.reduction) == "add":
        np.add.at(out, tuple(grid), updates)
    else:
        out[tuple(grid)] = updates
    return out


def _topk(ev: Any, call: Any, x: Array) -> Array:
    axis, k = _axis(call), int(call.attrs.k)
    order = np.argsort(-x if call.attrs.largest else x, axis=axis, kind="stable").take(range(k), axis)
    return [np.take_along_axis(x, order, axis), order]


def _argsort(ev: Any, call: Any, x: Array) -> Array:
    key = -x.astype("float64") if call.attrs.descending else x
    return np.argsort(key, axis=_axis(call), kind="stable")


def _one_hot(ev: Any, call: Any, indices: Array, on: Array, off: Array) -> Array:
    hit = indices[..., None] == np.arange(int(call.attrs.depth))
    return np.where(hit, on, off)


def _reduce(fn: Callable[..., Array]) -> Callable[..., Array]:
    return lambda ev, call, x: fn(x, axis=_axes(call, x), keepdims=bool(call.attrs.keepdims))


def _arg(fn: Callable[..., Array]) -> Callable[..., Array]:
    return lambda ev, call, x: fn(x, axis=_axis(call), keepdims=bool(call.attrs.keepdims))


def _elementwise(fn: Any) -> Callable[..., Array]:
    return lambda ev, call, *args: fn(*args)


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _softplus(ev: Any, call: Any, x: Array) -> Array:
    beta = float(call.attrs.beta)
    return np.where(x * beta > float(call.attrs.threshold), x, np.log1p(np.exp(x * beta)) / beta)


def _cumulative(fn: Callable[..., Array]) -> Callable[..., Array]:
    return lambda ev, call, x: fn(x, axis=None if call.attrs.axis is None else int(call.attrs.axis))


OPERATORS: dict[str, Callable[..., Array]] = {
    **{
        name: _elementwise(fn)
        for name, fn in {
            "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide,
            "floor_divide": np.floor_divide, "floor_mod": np.mod, "power": np.power, "maximum": np.maximum,
            "minimum": np.minimum, "equal": np.equal, "not_equal": np.not_equal, "less": np.less,
            "less_equal": np.less_equal, "greater": np.greater, "greater_equal": np.greater_equal,
            "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_not": np.logical_not,
            "logical_xor": np.logical_xor, "bitwise_and": np.bitwise_and, "bitwise_or": np.bitwise_or,
            "bitwise_xor": np.bitwise_xor, "bitwise_not": np.bitwise_not, "where": np.where, "abs": np.abs,
            "negative": np.negative, "exp": np.exp, "log": np.log, "sqrt": np.sqrt,
            "rsqrt": lambda x: 1 / np.sqrt(x), "cos": np.cos, "sin": np.sin, "tan": np.tan, "tanh": np.tanh,
            "sigmoid": _sigmoid, "floor": np.floor, "ceil": np.ceil, "round": np.round, "trunc": np.trunc,
            "sign": np.sign, "square": np.square, "erf": _erf, "isnan": np.isnan, "isinf": np.isinf,
            "isfinite": np.isfinite, "atan": np.arctan, "matmul": np.matmul,
            "nn.relu": lambda x: np.maximum(x, 0), "nn.relu6": lambda x: np.clip(x, 0, 6),
            "nn.silu": lambda x: x * _sigmoid(x),
            "nn.gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))), "nn.gelu_tanh": _gelu_tanh,
        }.items()
    },
    "nn.leakyrelu": lambda ev, call, x: np.where(x > 0, x, x * float(call.attrs.alpha)),
    "nn.softplus": _softplus,
    "nn.softmax": lambda ev, call, x: _softmax(x, _axis(call)),
    "nn.log_softmax": lambda ev, call, x: np.log(_softmax(x, _axis(call))),
    "nn.layer_norm": _layer_norm,
    "sum": _reduce(np.sum), "mean": _reduce(np.mean), "max": _reduce(np.max), "min": _reduce(np.min),
    "prod": _reduce(np.prod), "variance": _reduce(np.var), "argmax": _arg(np.argmax), "argmin": _arg(np.argmin),
    "cumsum": _cumulative(np.cumsum), "cumprod": _cumulative(np.cumprod),
    "astype": lambda ev, call, x: x,
    "reshape": lambda ev, call, x, shape: x.reshape(shape),
    "broadcast_to": lambda ev, call, x, shape: np.broadcast_to(x, shape),
    "permute_dims": lambda ev, call, x: x.transpose(None if call.attrs.axes is None else [int(a) for a in call.attrs.axes]),
    "expand_dims": lambda ev, call, x: np.expand_dims(x, tuple(int(a) for a in call.attrs.axis)),
    "squeeze": _squeeze,
    "concat": lambda ev, call, parts: np.concatenate(parts, axis=_axis(call)),
    "split": _split,
    "strided_slice": _strided_slice,
    "tile": lambda ev, call, x: np.tile(x, [int(r) for r in call.attrs.repeats]),
    "repeat": lambda ev, call, x: np.repeat(x, int(call.attrs.repeats), int(call.attrs.axis)),
    "flip": lambda ev, call, x: np.flip(x, _axis(call)),
    "tril": lambda ev, call, x, k=0: np.tril(x, k), "triu": lambda ev, call, x, k=0: np.triu(x, k),
    "full": lambda ev, call, shape, fill: np.full(shape, fill),
    "zeros": lambda ev, call, shape: np.zeros(shape), "ones": lambda ev, call, shape: np.ones(shape),
    "zeros_like": lambda ev, call, x: np.zeros_like(x), "ones_like": lambda ev, call, x: np.ones_like(x),
    "full_like": lambda ev, call, x, fill: np.full_like(x, fill),
    "arange": lambda ev, call, start, end, step: np.arange(start, end, step),
    "take": lambda ev, call, x, index: np.take(x, index, axis=_axis(call)),
    "index_tensor": lambda ev, call, x, indices: x[tuple(indices)],
    "gather_elements": lambda ev, call, x, index: np.take_along_axis(x, index, _axis(call)),
    "scatter_elements": _scatter_elements,
    "topk": _topk, "argsort": _argsort, "one_hot": _one_hot,
}  # fmt: skip
