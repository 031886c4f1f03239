"""TIR expressions as closures over numpy: compiled once per kernel, evaluated for all threads at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import tvm
from tvm import tirx

from llmc.simulate import bulk, warpgroup  # noqa: F401  (they register models)
from llmc.simulate.errors import failure
from llmc.simulate.intrinsics import FUNCTIONS
from llmc.simulate.machine import Machine, Pointer

Evaluator = Callable[[Machine], Any]

# binary nodes by the name of their class; And, Or, Div and Mod have methods of their own
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "FloorDiv": lambda a, b: np.floor_divide(a, _nonzero(b)),
    "FloorMod": lambda a, b: np.mod(a, _nonzero(b)),
    "Min": np.minimum,
    "Max": np.maximum,
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "LShift": np.left_shift,
    "RShift": np.right_shift,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
}

_erf = np.vectorize(math.erf, otypes=[np.float32])

# operators of values alone
_PURE: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype),
    "tanh": np.tanh,
    "sigmoid": lambda x: (1 / (1 + np.exp(-x))).astype(x.dtype),
    "erf": lambda x: _erf(x).astype(x.dtype),
    "sin": np.sin,
    "cos": np.cos,
    "pow": np.power,
    "fabs": np.abs,
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "round": np.rint,
    "nearbyint": np.rint,
    "isnan": np.isnan,
    "isinf": np.isinf,
    "fma": lambda a, b, c: a * b + c,
    "likely": lambda x: x,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "bitwise_not": np.invert,
    "shift_left": np.left_shift,
    "shift_right": np.right_shift,
}
_SHUFFLES = {
    "tvm_warp_shuffle": "idx",
    "tvm_warp_shuffle_up": "up",
    "tvm_warp_shuffle_down": "down",
    "tvm_warp_shuffle_xor": "xor",
}


def dtype_of(text: str) -> tuple[Any, int]:
    """numpy's type of an element, and the number of elements, of a TIR type such as float32x4."""
    base, _, lanes = text.partition("x")
    if base == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16), int(lanes or 1)
    return np.dtype(base), int(lanes or 1)


def type_text(expr: Any) -> str:
    """TIR's name of an expression's type; "handle" for pointers."""
    return str(getattr(expr.ty, "dtype", "handle"))


class ExpressionCompiler:
    """Compiles expressions of one kernel.

    Attributes:
        slots: variable -> its number in Machine.values; pointer variables hold memories.
    """

    def __init__(self) -> None:
        self.slots: dict[Any, int] = {}

    def slot(self, var: Any) -> int:
        """The variable's number, new if it has none."""
        return self.slots.setdefault(var, len(self.slots))

    def expr(self, e: Any) -> Evaluator:
        """A function from the machine's state to the expression's value."""
        kind = type(e).__name__
        if kind in _BINARY:
            op, left, right = _BINARY[kind], self.expr(e.a), self.expr(e.b)
            return lambda m: op(left(m), right(m))
        method = getattr(self, f"_{kind.lower()}", None)
        if method is None:
            raise failure("unsupported", f"The simulator does not know expressions of kind {kind}", e)
        found: Evaluator = method(e)
        return found

    # the right side may be valid only where the left one leaves the matter open
    def _and(self, e: Any) -> Evaluator:
        left, right = self.expr(e.a), self.expr(e.b)
        return lambda m: _guarded(m, left(m), right, False)

    def _or(self, e: Any) -> Evaluator:
        left, right = self.expr(e.a), self.expr(e.b)
        return lambda m: _guarded(m, left(m), right, True)

    def _bitwisenot(self, e: Any) -> Evaluator:
        inner = self.expr(e.a)
        return lambda m: np.invert(inner(m))

    def _div(self, e: Any) -> Evaluator:
        left, right = self.expr(e.a), self.expr(e.b)
        if dtype_of(type_text(e))[0].kind in "iu":
            return lambda m: _truncated(left(m), right(m))
        return lambda m: np.divide(left(m), right(m))

    def _mod(self, e: Any) -> Evaluator:
        left, right = self.expr(e.a), self.expr(e.b)
        return lambda m: np.fmod(left(m), _nonzero(right(m)))

    def _not(self, e: Any) -> Evaluator:
        inner = self.expr(e.a)
        return lambda m: np.logical_not(inner(m))

    def _intimm(self, e: Any) -> Evaluator:
        dtype, _ = dtype_of(type_text(e))
        value = np.asarray(int(e.value)).astype(dtype)[()]
        return lambda m: value

    def _floatimm(self, e: Any) -> Evaluator:
        value = dtype_of(type_text(e))[0].type(float(e.value))
        return lambda m: value

    def _stringimm(self, e: Any) -> Evaluator:
        return lambda m: e.value

    def _var(self, e: Any) -> Evaluator:
        slot = self.slots.get(e)
        if slot is None:
            raise failure("unsupported", f"The variable {e.name} is used before it is defined")
        return lambda m: m.values[slot]

    def _cast(self, e: Any) -> Evaluator:
        inner, (dtype, _) = self.expr(e.value), dtype_of(type_text(e))
        return lambda m: np.asarray(inner(m)).astype(dtype)[()]

    def _select(self, e: Any) -> Evaluator:
        cond, yes, no = self.expr(e.condition), self.expr(e.true_value), self.expr(e.false_value)
        return lambda m: _choose(cond(m), yes(m), no(m))

    def _let(self, e: Any) -> Evaluator:
        value, slot = self.expr(e.value), self.slot(e.var)
        body = self.expr(e.body)

        def run(m: Machine) -> Any:
            m.values[slot] = value(m)
            return body(m)

        return run

    def _ramp(self, e: Any) -> Evaluator:
        base, stride = self.expr(e.base), self.expr(e.stride)
        steps = np.arange(int(e.lanes))
        return lambda m: _column(base(m)) + _column(stride(m)) * steps.astype(np.asarray(base(m)).dtype)

    def _broadcast(self, e: Any) -> Evaluator:
        value, lanes = self.expr(e.value), int(e.lanes)

        def run(m: Machine) -> Any:
            column = _column(value(m))
            return np.broadcast_to(column, (column.shape[0], lanes))

        return run

    def _shuffle(self, e: Any) -> Evaluator:
        vectors = [self.expr(v) for v in e.vectors]
        picks = [int(i) for i in e.indices]

        def run(m: Machine) -> Any:
            parts = [np.asarray(v(m)) for v in vectors]
            parts = [p if p.ndim == 2 else _column(p) for p in parts]
            rows = max(p.shape[0] for p in parts)
            joined = np.concatenate([np.broadcast_to(p, (rows, p.shape[1])) for p in parts], axis=1)
            return joined[:, picks[0]] if len(picks) == 1 else joined[:, picks]

        return run

    def _tensorload(self, e: Any) -> Evaluator:
        memory, dtype = self.buffer(e.source)
        if len(e.indices) != 1:
            raise failure("unsupported", "Buffers must be flat here", e)
        index = self.expr(e.indices[0])
        contiguous = _contiguous(e.indices[0])
        return lambda m: m.load(m.values[memory], dtype, index(m), contiguous)

    def buffer(self, buffer: Any) -> tuple[int, Any]:
        """(number of the variable that holds the memory, numpy type of its elements)."""
        if buffer not in self.slots:
            raise failure("unsupported", f"The buffer {buffer.name} is used before it is declared")
        return self.slots[buffer], dtype_of(str(buffer.ty.dtype))[0]

    # -- calls -------------------------------------------------------------------------------------------------------

    def _call(self, e: Any) -> Evaluator:
        name = str(getattr(e.op, "name", "")).partition(".")[2]
        pure = _PURE.get(name)
        if pure is not None:
            args = [self.expr(a) for a in e.args]
            dtype, _ = dtype_of(type_text(e))
            return lambda m: _typed(pure(*(np.asarray(a(m)) for a in args)), dtype)
        if name in _SHUFFLES:
            kind, width = _SHUFFLES[name], int(e.args[3])
            value, operand = self.expr(e.args[1]), self.expr(e.args[2])
            return lambda m: m.shuffle(kind, value(m), operand(m), width)
        method = getattr(self, f"_call_{name.replace('.', '_')}", None)
        if method is None:
            raise failure("unsupported", f"The simulator does not know the operator {name or e.op}", e)
        found: Evaluator = method(e)
        return found

    def _call_if_then_else(self, e: Any) -> Evaluator:
        cond, yes, no = (self.expr(a) for a in e.args)

        def run(m: Machine) -> Any:
            c = np.asarray(cond(m))
            if c.ndim == 0:
                return yes(m) if c else no(m)
            outer = m.mask
            chosen: list[Any] = []
            for mask, branch in ((m.narrowed(c), yes), (m.narrowed(~c), no)):
                if mask is not None:
                    m.mask = mask
                    chosen.append(branch(m))
                    m.mask = outer
                else:
                    chosen.append(None)
            if chosen[0] is None or chosen[1] is None:
                return chosen[0] if chosen[1] is None else chosen[1]
            return _choose(c, *chosen)

        return run

    def _call_reinterpret(self, e: Any) -> Evaluator:
        inner, (dtype, lanes) = self.expr(e.args[0]), dtype_of(type_text(e))

        def run(m: Machine) -> Any:
            value = np.asarray(inner(m))
            if value.dtype.itemsize == dtype.itemsize:
                return np.ascontiguousarray(value).view(dtype).reshape(value.shape)[()]
            rows = np.ascontiguousarray(value if value.ndim == 2 else _column(value)).view(dtype)
            return rows if lanes > 1 else rows.reshape(value.shape[:1])[()]

        return run

    def _call_tvm_storage_sync(self, e: Any) -> Evaluator:
        scope = str(e.args[0].value)
        if scope == "warp":
            raise failure(
                "unsupported", 'A storage sync of scope "warp" becomes no instruction of the GPU', e
            )
        return lambda m: m.barrier()

    def _call_address_of(self, e: Any) -> Evaluator:
        load = e.args[0]
        memory, dtype = self.buffer(load.source)
        index = self.expr(load.indices[0])
        return lambda m: Pointer(m.values[memory], dtype, index(m))

    def _call_cuda_func_call(self, e: Any) -> Evaluator:
        name = str(e.args[0].value)
        function = FUNCTIONS.get(name)
        if function is None:
            raise failure("unsupported", f"The simulator has no model of the device function {name}", e)
        args = [self.expr(a) for a in e.args[1:-1]]
        return lambda m: function(m, *(a(m) for a in args))


def _column(value: Any) -> Any:
    """() -> [1, 1], [n] -> [n, 1]."""
    return np.asarray(value).reshape(-1, 1)


def _nonzero(value: Any) -> Any:
    """Threads that are masked out may hold any divisor; the others never hold 0 in a valid kernel."""
    return np.where(np.asarray(value) == 0, np.asarray(1, np.asarray(value).dtype), value)


def _truncated(a: Any, b: Any) -> Any:
    b = _nonzero(b)
    quotient = np.floor_divide(a, b)
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(np.asarray(quotient).dtype)


def _typed(value: Any, dtype: Any) -> Any:
    value = np.asarray(value)
    return value[()] if value.dtype == dtype else value.astype(dtype)[()]


def _choose(cond: Any, yes: Any, no: Any) -> Any:
    cond = np.asarray(cond)
    if cond.ndim == 0:
        return yes if cond else no
    if cond.ndim == 1 and max(np.ndim(yes), np.ndim(no)) == 2:
        cond = cond[:, None]
    return np.where(cond, yes, no)


def _guarded(m: Machine, left: Any, right: Evaluator, stop: bool) -> Any:
    """and (stop = False), or (stop = True): the right side only in threads where it decides."""
    left = np.asarray(left)
    if left.ndim == 0:
        return left if bool(left) == stop else right(m)
    outer = m.mask
    mask = m.narrowed(left != stop)
    if mask is None:
        return left
    m.mask = mask
    other = right(m)
    m.mask = outer
    return np.logical_or(left, other) if stop else np.logical_and(left, other)


def _contiguous(index: Any) -> bool:
    return isinstance(index, tirx.Ramp) and isinstance(index.stride, tirx.IntImm) and int(index.stride) == 1


_CHILDREN = (
    "a",
    "b",
    "value",
    "condition",
    "true_value",
    "false_value",
    "base",
    "stride",
    "min",
    "extent",
    "body",
    "then_case",
    "else_case",
)


def visit(node: Any, f: Callable[[Any], None]) -> None:
    """f on every statement and expression below a node, outer ones first."""
    f(node)
    children = [getattr(node, name, None) for name in _CHILDREN]
    for name in ("args", "indices", "seq", "vectors"):
        children.extend(getattr(node, name, None) or ())
    for child in children:
        if isinstance(child, (tvm.ir.Expr, tirx.Stmt)):
            visit(child, f)


def root_of(data: Any) -> Any:
    """The buffer variable that a data expression (of a view, or of a buffer itself) points into."""
    while isinstance(data, tvm.ir.Call) and str(getattr(data.op, "name", "")) == "tirx.buffer_data":
        data = data.args[0]
    return data
