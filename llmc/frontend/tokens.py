"""The guarantee behind paged decoding: outside of attention, row t of every tensor depends on token t alone.

`use_positions` replaces what a model computes from arange over the sequence by the real input `positions`, because a decode
step sees one token and would otherwise take it for the first. `check_tokens` then follows the token axis through every
operation, and refuses whatever contracts, reorders, shifts or reduces it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from llmc.errors import LlmcError
from llmc.frontend.positions import is_int
from llmc.ir import IRModule, op_name
from llmc.ops import ATTENTION, EXPERT_LINEAR
from llmc.passes.relax_eval import match_any_opaque
from llmc.passes.resolve_mask import MASK
from llmc.passes.rewrite import Graph


@dataclass(frozen=True)
class Along:
    """Where the token index is: the axis has outer * T * inner entries, and entry (o * T + t) * inner + i belongs to t."""

    axis: int
    outer: int = 1
    inner: int = 1


State = Any  # Along, None for "the same for every token", or a list of them for a tuple


class _Mixed(Exception):
    """The operation mixes tokens; the text says how."""


class TokenCheck:
    """Follows the token axis through ``main``.

    Args:
        where: (module path, operator in the source) of a variable, for messages.
    """

    def __init__(self, module: IRModule, where: Callable[[Any], tuple[str, str]]) -> None:
        self.func = module["main"]
        self.length = self.func.params[0].ty.shape[0]
        self.where = where
        self.state: dict[Any, State] = {}

    def run(self) -> None:
        """Raises LlmcError("token-mixing-not-captured") at the first operation that mixes tokens."""
        for param in self.func.params:
            self.state[param] = self._along(param.ty.shape)
        for binding in Graph(self.func).bindings:
            try:
                self.state[binding.var] = self._transfer(binding.value, binding.var)
                self._verify(binding.var)
            except _Mixed as error:
                path, op = self.where(binding.var)
                raise LlmcError(
                    "token-mixing-not-captured",
                    f"{path or 'The model'} mixes tokens outside of attention: {op or op_name(binding.value)} {error}.",
                    hint="Recurrent, convolutional and pooled sequence layers are not supported.",
                    context={"module": path, "op": op},
                ) from None

    def _of(self, x: Any) -> State:
        if isinstance(x, relax.Var):
            return self.state.get(x)
        if isinstance(x, relax.Tuple):
            return [self._of(f) for f in x.fields]
        return None

    def _coefficient(self, dim: Any) -> int:
        """c of a size c * T; 0 for a constant."""
        if isinstance(dim, int | tirx.IntImm):
            return 0
        if dim.same_as(self.length):
            return 1
        if type(dim).__name__ == "Mul":
            a, b = (dim.a, dim.b) if isinstance(dim.b, tirx.IntImm) else (dim.b, dim.a)
            if isinstance(b, tirx.IntImm):
                return self._coefficient(a) * int(b.value)
        raise _Mixed(f"makes a tensor with an axis of {dim} entries")

    def _along(self, shape: Any) -> Along | None:
        """The token axis by the shape alone, for a tensor whose entries say nothing about other tokens."""
        found = [(axis, c) for axis, d in enumerate(shape) if (c := self._coefficient(d))]
        if not found:
            return None
        if len(found) > 1:
            raise _Mixed("makes a tensor of tokens by tokens")
        axis, c = found[0]
        if c != 1:
            raise _Mixed(f"makes a tensor with an axis of {shape[axis]} entries")
        return Along(axis)

    def _verify(self, var: Any) -> None:
        """The state has to agree with the shape."""
        for state, ty in (
            zip(self.state[var], var.ty.fields, strict=True)
            if isinstance(self.state[var], list)
            else [(self.state[var], var.ty)]
        ):
            coefficients = [self._coefficient(d) for d in ty.shape]
            expected = [0] * len(coefficients)
            if state is not None:
                expected[state.axis] = state.outer * state.inner
            if coefficients != expected:
                raise _Mixed("makes a tensor whose token axis cannot be followed")

    def _transfer(self, value: Any, var: Any) -> State:
        if isinstance(value, relax.Var):
            return self._of(value)
        if isinstance(value, relax.TupleGetItem):
            return self._of(value.tuple_value)[value.index]
        if isinstance(value, relax.Tuple):
            return self._of(value)
        if not isinstance(value, relax.Call):
            return None
        opaque = match_any_opaque(value)
        if opaque is not None:
            return self._opaque(opaque[0], [self._of(x) for x in opaque[1]])
        name = op_name(value).removeprefix("relax.")
        args = [self._of(a) for a in value.args]
        if name in _GROWING:
            return self._of_filled(value, var, args)
        if not any(_mentions(a) for a in args):
            if isinstance(var.ty, relax.TensorType) and self._along(var.ty.shape) is not None:
                raise _Mixed("makes a tensor that depends on the length of the sequence")
            if self._reads_length(value):
                raise _Mixed("computes with the length of the sequence")
            return None
        handler = _HANDLERS.get(name)
        if handler is None:
            raise _Mixed("is not known to keep tokens apart")
        return handler(self, value, args, var)

    def _reads_length(self, value: Any) -> bool:
        return any(
            isinstance(a, relax.ShapeExpr) and any(not isinstance(d, tirx.IntImm) for d in a.values)
            for a in value.args
        )

    def _opaque(self, name: str, states: list[State]) -> State:
        if name == ATTENTION and states[:3] == [Along(2)] * 3 and not any(states[3:]):
            return Along(1)
        x = states[0] if states else None
        if name == EXPERT_LINEAR and x is not None and x.axis == 0 and x == states[1] and not any(states[2:]):
            return x
        if name == MASK:
            raise _Mixed("makes a mask for an attention that llmc does not recognise")
        raise _Mixed("has operands whose token axis cannot be followed")

    def _of_filled(self, value: Any, var: Any, args: list[State]) -> State:
        """full, zeros, broadcast_to: a new axis of T equal entries is allowed."""
        moved = _aligned(self, value, args, var) if any(_mentions(a) for a in args) else None
        return moved if moved is not None else self._along(var.ty.shape)


def _mentions(state: State) -> bool:
    return any(_mentions(s) for s in state) if isinstance(state, list) else state is not None


def _rank(x: Any) -> int:
    return len(x.ty.shape)


def _aligned(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    """Elementwise with broadcasting: the token axes have to meet."""
    rank, found = _rank(var), None
    for arg, state in zip(value.args, args, strict=True):
        if state is None:
            continue
        moved = Along(state.axis + rank - _rank(arg), state.outer, state.inner)
        if found is not None and moved != found:
            raise _Mixed("combines different tokens")
        found = moved
    for arg, state in zip(value.args, args, strict=True):
        if state is None and found is not None and isinstance(getattr(arg, "ty", None), relax.TensorType):
            axis = found.axis - (rank - _rank(arg))
            if axis >= 0 and not is_int(arg.ty.shape[axis], 1):
                raise _Mixed("combines tokens with a tensor of fixed length")
    return found


def _reshape(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    """Row-major data stays where it is: the number of entries before and after the token index is the same."""
    state, before, after = args[0], list(value.args[0].ty.shape), list(var.ty.shape)
    outer = _product(before[: state.axis]) * state.outer
    inner = _product(before[state.axis + 1 :]) * state.inner
    for axis, dim in enumerate(after):
        if check._coefficient(dim):
            lead, trail = _product(after[:axis]), _product(after[axis + 1 :])
            if outer % lead or inner % trail:
                raise _Mixed("reshapes across tokens")
            return Along(axis, outer // lead, inner // trail)
    raise _Mixed("reshapes the tokens away")


def _product(dims: Any) -> int:
    total = 1
    for d in dims:
        total *= int(d)
    return total


def _permute(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    rank, state = _rank(var), args[0]
    axes = (
        [int(a) % rank for a in value.attrs.axes] if value.attrs.axes is not None else list(range(rank))[::-1]
    )
    return Along(axes.index(state.axis), state.outer, state.inner)


def _other_axis(*names: str) -> Callable[..., State]:
    """Operations along axes that must not be the token axis, and that keep the number of axes."""

    def run(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
        state = args[0][0] if isinstance(args[0], list) else args[0]
        source = value.args[0]
        rank = len((source.fields[0] if isinstance(source, relax.Tuple) else source).ty.shape)
        if state is None or any(s not in (state, None) for s in _flat(args)):
            raise _Mixed("combines different tokens")
        if state.axis in _attr_axes(value, names, rank):
            raise _Mixed("works along the sequence")
        return [state] * len(var.ty.fields) if isinstance(var.ty, relax.TupleType) else state

    return run


def _flat(states: Any) -> list[Any]:
    return [x for s in states for x in (s if isinstance(s, list) else [s])]


def _attr_axes(value: Any, names: tuple[str, ...], rank: int) -> set[int]:
    axes: set[int] = set()
    for name in names:
        got = getattr(value.attrs, name)
        if got is None:
            return set(range(rank))
        axes |= {int(a) % rank for a in ([got] if isinstance(got, int | tirx.IntImm) else got)}
    return axes


def _concat(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    states = args[0]
    axis = int(value.attrs.axis) % _rank(var)
    if any(s != states[0] for s in states) or states[0].axis == axis:
        raise _Mixed("joins pieces along the sequence")
    return states[0]


def _reduce(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    state, rank = args[0], _rank(value.args[0])
    axes = _attr_axes(value, ("axis",), rank)
    if state.axis in axes:
        raise _Mixed("reduces over the sequence")
    if value.attrs.keepdims:
        return state
    return Along(state.axis - sum(1 for a in axes if a < state.axis), state.outer, state.inner)


def _strided_slice(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    state, rank = args[0], _rank(var)
    if any(int(a.value) % rank == state.axis for a in value.args[1].fields):
        raise _Mixed("takes a part of the sequence")
    return state


def _repeat(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    state = args[0]
    if int(value.attrs.axis) % _rank(var) != state.axis:
        return state
    return Along(state.axis, state.outer, state.inner * int(value.attrs.repeats))


def _tile(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    state, repeats = args[0], [int(r) for r in value.attrs.repeats]
    axis = state.axis + _rank(var) - _rank(value.args[0])
    repeats = [1] * (_rank(var) - len(repeats)) + repeats
    return Along(axis, state.outer * repeats[axis], state.inner)


def _take(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    table, index = args
    axis = int(value.attrs.axis) % _rank(value.args[0])
    if table is None:
        return Along(axis + index.axis, index.outer, index.inner)
    if index is not None or table.axis == axis:
        raise _Mixed("picks tokens by index")
    shift = _rank(value.args[1]) - 1 if table.axis > axis else 0
    return Along(table.axis + shift, table.outer, table.inner)


def _along_axis(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    """gather_elements and scatter_elements: every operand has the token axis in the same place."""
    axis = int(value.attrs.axis) % _rank(var)
    if op_name(value) == "relax.gather_elements" and args[0] is None and args[1] == Along(axis):
        return args[1]  # rows of a table, chosen per token
    if any(s != args[0] for s in args) or args[0].axis == axis:
        raise _Mixed("picks tokens by index")
    return args[0]


def _index_tensor(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    if args[0] is not None:
        raise _Mixed("picks tokens by index")
    fields = value.args[1].fields
    rank = max(_rank(f) for f in fields)
    moved = {
        Along(s.axis + rank - _rank(f), s.outer, s.inner) for f, s in zip(fields, args[1], strict=True) if s
    }
    if len(moved) != 1:
        raise _Mixed("combines different tokens")
    return moved.pop()


def _matmul(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    (a, b), (x, y) = args, value.args
    rank_a, rank_b, rank = _rank(x), _rank(y), _rank(var)
    if min(rank_a, rank_b) < 2:
        raise _Mixed("multiplies vectors")
    if (a is not None and a.axis == rank_a - 1) or (b is not None and b.axis == rank_b - 2):
        raise _Mixed("sums over the sequence")
    moved = [
        Along(s.axis + rank - r, s.outer, s.inner) for s, r in ((a, rank_a), (b, rank_b)) if s is not None
    ]
    if len(moved) == 2 and (moved[0] != moved[1] or moved[0].axis >= rank - 2):
        raise _Mixed("multiplies tokens with each other")
    return moved[0]


def _same(check: TokenCheck, value: Any, args: list[State], var: Any) -> State:
    return args[0]


_GROWING = frozenset({"full", "zeros", "ones", "broadcast_to", "full_like", "zeros_like", "ones_like"})
_ELEMENTWISE = [
    "add", "subtract", "multiply", "divide", "floor_divide", "floor_mod", "power", "maximum", "minimum",
    "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or",
    "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "where", "abs",
    "negative", "exp", "log", "sqrt", "rsqrt", "cos", "sin", "tan", "tanh", "sigmoid", "floor", "ceil",
    "round", "trunc", "sign", "square", "erf", "isnan", "isinf", "isfinite", "atan", "nn.relu", "nn.relu6",
    "nn.silu", "nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.softplus", "nn.selu", "astype",
]  # fmt: skip
_HANDLERS: dict[str, Callable[..., State]] = {
    **dict.fromkeys(_ELEMENTWISE, _aligned),
    **dict.fromkeys(("reshape", "expand_dims", "squeeze"), _reshape),
    **dict.fromkeys(("sum", "mean", "max", "min", "prod", "variance", "argmax", "argmin"), _reduce),
    **dict.fromkeys(
        ("nn.softmax", "nn.log_softmax", "cumsum", "cumprod", "topk", "argsort", "flip", "split"),
        _other_axis("axis"),
    ),
    **dict.fromkeys(("gather_elements", "scatter_elements"), _along_axis),
    "nn.layer_norm": _other_axis("axes"),
    "permute_dims": _permute,
    "concat": _concat,
    "strided_slice": _strided_slice,
    "repeat": _repeat,
    "tile": _tile,
    "take": _take,
    "index_tensor": _index_tensor,
    "one_hot": _same,
    "matmul": _matmul,
}
