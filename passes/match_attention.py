"""Finds attention that a model spells out: matmul, scale, bias or mask, softcap, softmax, matmul."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.ir import GenericConst

from llmc.ir import op_name
from llmc.passes.relax_eval import NotEvaluable
from llmc.passes.resolve_mask import MASKED, MaskResolver, Term
from llmc.passes.rewrite import Builder, Graph

Fix = Callable[[Builder, Any], Any]


def _unchanged(builder: Builder, x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Match:
    """One attention before its mask is resolved.

    Attributes:
        q, k, v: operands; fix_q, fix_k, fix_v bring them to [1,h,T,dk], [1,hk,T,dk], [1,hk,T,dv].
        heads: h.
        terms: what is added to the scores.
        sinks: extra logit per head, or None.
        causal, window: what was said besides the mask.
        result: variable that the attention's output replaces; None = the matched binding itself.
        layout: brings [1,T,h,dv] into the type of `result`; None = it has that type.
    """

    q: Any
    k: Any
    v: Any
    heads: int
    scale: float
    softcap: float
    terms: tuple[Term, ...]
    sinks: Any = None
    causal: bool = False
    window: int = 0
    path: str = ""
    result: Any = None
    fix_q: Fix = _unchanged
    fix_k: Fix = _unchanged
    fix_v: Fix = _unchanged
    layout: Fix | None = None


@dataclass
class _Scores:
    """What the walk from the softmax to the first matmul has collected; scores = factor * (current variable) + terms."""

    factor: float = 1.0
    softcap: float = 0.0
    terms: list[Term] = field(default_factory=list)


def match_softmax(graph: Graph, resolver: MaskResolver, binding: Any) -> Match | None:
    """The attention around a softmax over keys, or None.

    scores [.., T, T] = matmul(q [.., T, d], kT [.., d, T]); leading axes are heads (the batch is 1).
    """
    softmax = binding.value
    if op_name(softmax) != "relax.nn.softmax":
        return None
    dims = list(binding.var.ty.shape)
    if len(dims) < 3 or int(softmax.attrs.axis) % len(dims) != len(dims) - 1:
        return None
    if isinstance(dims[-1], tirx.IntImm) or not dims[-1].same_as(dims[-2]):
        return None
    scores = _Scores()
    product = _walk_back(graph, resolver, softmax.args[0], scores)
    output = _walk_forward(graph, binding.var)
    if product is None or output is None:
        return None
    return _assemble(graph, product, output, scores)


def _walk_back(graph: Graph, resolver: MaskResolver, var: Any, scores: _Scores) -> Any:
    """The matmul q @ kT behind scale, bias, mask and softcap; None if something else is in between."""
    while True:
        value = graph.definition(var)
        if isinstance(value, relax.Var):
            var = value
            continue
        name = op_name(value).removeprefix("relax.")
        if name == "matmul":
            return value
        if name == "astype" or (name == "reshape" and _keeps_pairs(value, var)):
            var = value.args[0]
            continue
        if name == "nn.softmax" or not name:
            return None
        step = _STEPS.get(name)
        following = step(resolver, value, scores) if step else None
        if following is None:
            return None
        var = following


def _keeps_pairs(value: Any, var: Any) -> bool:
    """A reshape that only changes the axes before the last two."""
    before, after = list(value.args[0].ty.shape)[-2:], list(var.ty.shape)[-2:]
    return len(before) == 2 and _same_dims(before, after)


def _same_dims(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Equality of two shapes of ints and TIR expressions."""

    def same(a: Any, b: Any) -> bool:
        a, b = (int(x) if isinstance(x, int | tirx.IntImm) else x for x in (a, b))
        if isinstance(a, int) or isinstance(b, int):
            return isinstance(a, int) and isinstance(b, int) and a == b
        return bool(a.same_as(b)) or str(a) == str(b)

    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))


def _split_data(resolver: MaskResolver, value: Any, swap: bool = True) -> tuple[Any, Any] | None:
    """(the scores, the data-independent operand) of a binary operation."""
    left, right = value.args[0], value.args[1]
    if not resolver.flow.is_data(right):
        return left, right
    if swap and not resolver.flow.is_data(left):
        return right, left
    return None


def _add(resolver: MaskResolver, value: Any, scores: _Scores) -> Any:
    parts = _split_data(resolver, value)
    if parts is None or scores.softcap:
        return None
    scores.terms.append(Term(parts[1], scores.factor))
    return parts[0]


def _subtract(resolver: MaskResolver, value: Any, scores: _Scores) -> Any:
    parts = _split_data(resolver, value, swap=False)
    if parts is None or scores.softcap:
        return None
    scores.terms.append(Term(parts[1], -scores.factor))
    return parts[0]


def _scale(resolver: MaskResolver, value: Any, scores: _Scores) -> Any:
    multiply = op_name(value) == "relax.multiply"
    parts = _split_data(resolver, value, swap=multiply)
    number = None if parts is None else _number(resolver, parts[1])
    if parts is not None and number is None and multiply and _is_pattern(resolver, parts[1]):
        scores.terms.append(Term(parts[1], fill=0.0))  # w * mask + -1e4 * (1 - mask)
        return parts[0]
    if parts is None or number is None or number <= 0:
        return None
    scores.factor = scores.factor * number if multiply else scores.factor / number
    return parts[0]


def _tanh(resolver: MaskResolver, value: Any, scores: _Scores) -> Any:
    if scores.softcap:
        return None
    scores.softcap = scores.factor
    return value.args[0]


def _select(resolver: MaskResolver, value: Any, scores: _Scores) -> Any:
    condition, kept, other = value.args
    keep_where = True
    if resolver.flow.is_data(other):
        kept, other, keep_where = other, kept, False
    fill = _number(resolver, other)
    if resolver.flow.is_data(condition) or resolver.flow.is_data(other) or fill is None or scores.softcap:
        return None
    scores.terms.append(Term(condition, fill=fill * scores.factor, keep_where=keep_where))
    return kept


def _clamp(resolver: MaskResolver, value: Any, scores: _Scores) -> Any:
    """A lower bound that only keeps masked scores finite."""
    parts = _split_data(resolver, value)
    bound = None if parts is None else _number(resolver, parts[1])
    return parts[0] if parts is not None and bound is not None and bound * scores.factor <= MASKED else None


_STEPS: dict[str, Callable[[MaskResolver, Any, _Scores], Any]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _scale,
    "divide": _scale,
    "tanh": _tanh,
    "where": _select,
    "maximum": _clamp,
}


def _number(resolver: MaskResolver, expr: Any) -> float | None:
    """The one number that a data-independent expression consists of."""
    if isinstance(expr, GenericConst) and expr.value.numpy().size == 1:
        return float(expr.value.numpy().astype("float64").reshape(()))
    try:
        values = [np.unique(np.asarray(resolver.look(expr, n), "float64")) for n in (3, 5)]
    except NotEvaluable:
        return None
    same = values[0].size == 1 and np.array_equal(values[0], values[1])
    return float(values[0][0]) if same else None


def _is_pattern(resolver: MaskResolver, expr: Any) -> bool:
    """Whether a data-independent expression consists of zeros and ones."""
    try:
        return all(bool(np.isin(np.asarray(resolver.look(expr, n), "float64"), (0, 1)).all()) for n in (3, 5))
    except NotEvaluable:
        return False


def _walk_forward(graph: Graph, var: Any) -> Any:
    """The binding of probabilities @ v; None if the probabilities have another use."""
    while True:
        users = graph.users(var)
        if len(users) != 1 or graph.uses.get(var, 0) != 1:
            return None
        value = users[0].value
        name = op_name(value)
        if name == "relax.matmul":
            return users[0] if value.args[0].same_as(var) else None
        is_cast = name == "relax.astype" or isinstance(value, relax.Var)
        if not is_cast and not (name == "relax.reshape" and _keeps_pairs(value, users[0].var)):
            return None
        var = users[0].var


def _assemble(graph: Graph, product: Any, output: Any, scores: _Scores) -> Match | None:
    q, kt, v = product.args[0], product.args[1], output.value.args[1]
    lead_q, lead_k, lead_v = (list(x.ty.shape)[:-2] for x in (q, kt, v))
    if not all(isinstance(d, tirx.IntImm) for lead in (lead_q, lead_k, lead_v) for d in lead):
        return None
    heads, kv_heads = _groups(lead_q, lead_k), _groups(lead_q, lead_v)
    if heads is None or kv_heads is None or heads != kv_heads:
        return None
    total = int(np.prod([int(d) for d in lead_q]))
    length = q.ty.shape[-2]
    rank = len(kt.ty.shape)
    swapped, straight = [*range(rank - 2), rank - 1, rank - 2], list(range(len(v.ty.shape)))
    key, repeat_k = _kv_source(graph, kt, swapped, heads)
    value, repeat_v = _kv_source(graph, v, straight, heads)
    if repeat_k != repeat_v:
        key, value = (kt, swapped), (v, straight)
        repeat_k = 1
    dtype = _common_dtype(graph, q, key[0], value[0])
    kv = heads // repeat_k

    def bring(count: int, axes: list[int] | None) -> Fix:
        def fix(builder: Builder, x: Any) -> Any:
            x = _uncast(graph, x, dtype)
            if str(x.ty.dtype) != dtype:
                x = builder.emit(relax.op.astype(x, dtype), "operand")
            if axes is not None and axes != list(range(len(axes))):
                x = builder.emit(relax.op.permute_dims(x, axes), "operand")
            shape = [1, count, length, x.ty.shape[-1]]
            if not _same_dims(list(x.ty.shape), shape):
                x = builder.emit(relax.op.reshape(x, shape), "operand")
            return x

        return fix

    def layout(builder: Builder, y: Any) -> Any:
        wanted = output.var.ty
        if str(y.ty.dtype) != str(wanted.dtype):
            y = builder.emit(relax.op.astype(y, str(wanted.dtype)), "heads")
        y = builder.emit(relax.op.permute_dims(y, [0, 2, 1, 3]), "heads")
        return relax.op.reshape(y, list(wanted.shape))

    return Match(
        q=q,
        k=key[0],
        v=value[0],
        heads=total,
        scale=scores.factor,
        softcap=scores.softcap,
        terms=tuple(scores.terms),
        result=output.var,
        fix_q=bring(total, None),
        fix_k=bring(kv, key[1]),
        fix_v=bring(kv, value[1]),
        layout=layout,
    )


def _groups(lead_q: list[Any], lead_kv: list[Any]) -> int | None:
    """Number of key/value heads when their leading axes broadcast as a prefix of the query's."""
    a, b = [int(d) for d in lead_q], [int(d) for d in lead_kv]
    width = max(len(a), len(b))
    a, b = [1] * (width - len(a)) + a, [1] * (width - len(b)) + b
    n = next((i for i in range(len(a), 0, -1) if b[i - 1] != 1), 0)
    return int(np.prod(b)) if a[:n] == b[:n] else None


def _kv_source(graph: Graph, var: Any, axes: list[int], heads: int) -> tuple[tuple[Any, list[int]], int]:
    """((variable, permutation to [.., T, d]), how often each of its heads is repeated), seen through transposes."""
    value = graph.resolve(var)
    while op_name(value) == "relax.permute_dims":
        inner = [int(a) for a in value.attrs.axes]
        axes = [inner[a] for a in axes]
        var = graph.source(value.args[0])
        value = graph.resolve(var)
    if axes == list(range(len(axes))):
        base, times = _unrepeated(graph, var)
        if times > 1 and heads % times == 0:
            return (base, list(range(len(base.ty.shape)))), times
    return (var, axes), 1


def _unrepeated(graph: Graph, var: Any) -> tuple[Any, int]:
    """Behind [1, hk, T, d] -> [1, hk, g, T, d] -> [1, hk*g, T, d], or repeat along the head axis."""
    value = graph.resolve(var)
    if op_name(value) == "relax.repeat" and int(value.attrs.axis) == 1 and len(var.ty.shape) == 4:
        return value.args[0], int(value.attrs.repeats)
    if op_name(value) != "relax.reshape" or len(var.ty.shape) != 4:
        return var, 1
    wide = graph.resolve(value.args[0])
    if op_name(wide) != "relax.broadcast_to":
        return var, 1
    narrow = graph.resolve(wide.args[0])
    shape = list(wide.args[0].ty.shape)
    if op_name(narrow) not in ("relax.reshape", "relax.expand_dims") or len(shape) != 5:
        return var, 1
    base = narrow.args[0]
    if not _same_dims(list(base.ty.shape), shape[:2] + shape[3:]) or not _same_dims(shape[2:3], [1]):
        return var, 1
    return base, int(list(value.args[0].ty.shape)[2])


def _uncast(graph: Graph, var: Any, dtype: str) -> Any:
    value = graph.resolve(var)
    if (
        str(var.ty.dtype) != dtype
        and op_name(value) == "relax.astype"
        and str(value.args[0].ty.dtype) == dtype
    ):
        return value.args[0]
    return var


def _common_dtype(graph: Graph, q: Any, k: Any, v: Any) -> str:
    """v's dtype if q and k were only widened for the scores, else the widest of the three."""
    dtype = str(v.ty.dtype)
    if all(str(_uncast(graph, x, dtype).ty.dtype) == dtype for x in (q, k)):
        return dtype
    return "float32" if "float32" in (str(q.ty.dtype), str(k.ty.dtype), dtype) else dtype
