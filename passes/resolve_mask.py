"""What the data-independent part of attention scores means: causality, window, chunk, ALiBi slopes.

The terms that are added to the scores (or select between score and a large negative number) are evaluated with numpy at a
few lengths. A mask that comes from transformers is the operator llmc.mask: for the evaluation it is a random pattern, which
must come out unchanged, so that nothing can be lost on the way and its window need not fit into the evaluated length.
Everything else has to equal a causal, windowed or ALiBi form exactly; whatever does not is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

from llmc.passes.relax_eval import Evaluator, NotEvaluable, match_any_opaque, tensor_operands
from llmc.passes.rewrite import Graph

MASK = "llmc.mask"
# a score this low never survives the softmax: exp(-9000) is 0 in every dtype
MASKED = -9000.0
_SHORT, _LONG, _LIMIT = 5, 24, 4096


@dataclass(frozen=True)
class MaskAttrs:
    """The mask that transformers asked for: see AttentionAttrs for window and chunk."""

    causal: bool
    window: int = 0
    chunk: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> MaskAttrs:
        return MaskAttrs(**json.loads(text))


@dataclass(frozen=True)
class Term:
    """One data-independent part of the scores.

    Attributes:
        value: variable or constant that broadcasts to the scores [.., T, T].
        factor: for an added bias: what it is multiplied with before it is added.
        fill: for a selection ``where(value, score, fill)``: the number put in, before what is added later; None for an
            added bias.
        keep_where: for a selection: the scores stay where `value` is this.
    """

    value: Any
    factor: float = 1.0
    fill: float | None = None
    keep_where: bool = True


@dataclass(frozen=True)
class ResolvedMask:
    """Meaning of all terms together; slopes per head if there is an ALiBi bias."""

    causal: bool
    window: int = 0
    chunk: int = 0
    slopes: tuple[float, ...] | None = None


class MaskError(Exception):
    """The terms mean nothing that attention kernels can do; the text says what was found."""


class DataFlow:
    """Which expressions depend on weights or tokens.

    Args:
        graph: the function.
        given: parameters that do not count, e.g. positions.
    """

    def __init__(self, graph: Graph, given: Collection[Any]) -> None:
        self.graph = graph
        self.given = given
        self._data: dict[Any, bool] = {}

    def is_data(self, expr: Any) -> bool:
        """Whether an expression depends on anything but constants, sizes and the given parameters."""
        wanted = tensor_operands(expr)
        stack = list(wanted)
        while stack:
            var = stack[-1]
            if var in self._data:
                stack.pop()
                continue
            definition = self.graph.definition(var)
            if definition is None:
                self._data[var] = var not in self.given
                stack.pop()
                continue
            operands = tensor_operands(definition)
            missing = [v for v in operands if v not in self._data]
            if missing:
                stack.extend(missing)
                continue
            opaque = match_any_opaque(definition)
            hidden = opaque is not None and opaque[0] != MASK
            self._data[var] = hidden or any(self._data[v] for v in operands)
            stack.pop()
        return any(self._data[v] for v in wanted)


class MaskResolver:
    """Resolves the terms of every attention of one function; equal terms are resolved once.

    Args:
        graph: the function.
        given: parameters whose values are known at a length, e.g. positions -> arange(length).
        limit: largest length that the model is made for.
    """

    def __init__(self, graph: Graph, given: Mapping[Any, Any], limit: int = 2**31 - 1) -> None:
        self.graph = graph
        self.given = given
        self.limit = limit
        self.flow = DataFlow(graph, set(given))
        self._known: dict[Any, ResolvedMask] = {}

    def look(self, expr: Any, length: int) -> Any:
        """Value of a data-independent expression at one length; raises NotEvaluable."""
        given = {var: make(length) for var, make in self.given.items()}
        return Evaluator(self.graph, length, given, exact=True).value(expr)

    def resolve(self, terms: tuple[Term, ...], heads: int) -> ResolvedMask:
        """Meaning of the terms for scores [heads, T, T]; raises MaskError."""
        key = (terms, heads)
        if key not in self._known:
            self._known[key] = self._resolve(terms, heads)
        return self._known[key]

    def _resolve(self, terms: tuple[Term, ...], heads: int) -> ResolvedMask:
        markers, lengths = self._survey(terms)
        patterns: list[tuple[int, Any, Any]] = []
        for length in lengths:
            free = {m: np.ones((length, length), bool) for m in markers}
            patterns.append((length, *self._evaluate(terms, length, free)))
        window, causal = _window(patterns)
        slopes = _slopes(patterns[-1][1:], heads)
        if markers:
            self._check_markers(terms, markers, patterns[0])
        chunk = 0
        for attrs in markers.values():
            causal = causal or attrs.causal
            window = min(w for w in (window, attrs.window) if w) if window or attrs.window else 0
            if chunk and attrs.chunk and chunk != attrs.chunk:
                raise MaskError(f"two chunk sizes, {chunk} and {attrs.chunk}")
            chunk = chunk or attrs.chunk
        return ResolvedMask(causal, window, chunk, slopes)

    def _survey(self, terms: tuple[Term, ...]) -> tuple[dict[Any, MaskAttrs], list[int]]:
        """The mask markers that the terms read, and the lengths at which to evaluate.

        A number in the sub-graph may be a window: the length has to exceed it to be seen. A buffer [n, n] bounds it.
        """
        markers: dict[Any, MaskAttrs] = {}
        needed, bound = _LONG, min(self.limit, _LIMIT)
        for expr in self._cone(terms):
            opaque = match_any_opaque(expr) if isinstance(expr, relax.Call) else None
            if opaque is not None:
                continue
            for const in _constants(expr):
                if isinstance(const, int):
                    needed = max(needed, const + 9) if 8 < const < 2**30 else needed
                elif const.ndim >= 2 and const.shape[-1] == const.shape[-2] > 1:
                    bound = min(bound, const.shape[-1])
                    needed = max(needed, bound)
                elif const.size == 1:
                    number = float(const.reshape(()))
                    is_fill = number <= MASKED and const.dtype.kind == "f"
                    if 8 < abs(number) < 2**20 and not is_fill:
                        needed = max(needed, int(abs(number)) + 9)
        for var in self._cone_vars(terms):
            opaque = match_any_opaque(self.graph.definition(var))
            if opaque is not None and opaque[0] == MASK:
                markers[var] = MaskAttrs.from_json(opaque[2])
        if needed > bound == _LIMIT < self.limit:
            raise MaskError(f"a mask built with the number {needed - 9}, too large to be checked")
        return markers, [_SHORT, min(needed, bound)]

    def _cone_vars(self, terms: tuple[Term, ...]) -> list[Any]:
        seen: dict[Any, None] = {}
        stack = [v for t in terms for v in tensor_operands(t.value)]
        while stack:
            var = stack.pop()
            if var in seen:
                continue
            seen[var] = None
            definition = self.graph.definition(var)
            if definition is not None:
                stack.extend(tensor_operands(definition))
        return list(seen)

    def _cone(self, terms: tuple[Term, ...]) -> list[Any]:
        exprs = [self.graph.definition(v) for v in self._cone_vars(terms)]
        return [t.value for t in terms] + [e for e in exprs if e is not None]

    def _evaluate(self, terms: tuple[Term, ...], length: int, markers: Mapping[Any, Any]) -> tuple[Any, Any]:
        """(allowed, bias), each [heads or 1, T, T], at one length; `markers` says what each llmc.mask allows."""

        def mask(operands: list[Any], attrs: str, var: Any) -> Any:
            lowest = float(
                np.finfo("float32").min if str(var.ty.dtype) != "float16" else np.finfo("float16").min
            )
            return np.where(markers[var], 0.0, lowest)[None, None]

        given = {var: make(length) for var, make in self.given.items()}
        evaluator = Evaluator(self.graph, length, given, {MASK: mask}, exact=True)
        total: Any = np.zeros((1, 1, 1), "float32")
        gone: Any = np.zeros((1, 1, 1), bool)
        for term in terms:
            try:
                value = evaluator.value(term.value)
            except NotEvaluable as error:
                if error.what.startswith("the input"):
                    what = f"computed from weights or tokens ({error.what}), not from positions alone"
                    raise MaskError(f"a mask or bias that is {what}") from None
                raise MaskError(f"a mask or bias that depends on {error.what}") from None
            if term.fill is None:
                value = value.astype("float64" if value.size < 2**16 else "float32") * term.factor
            else:
                kept = value.astype(bool) == term.keep_where
                value = np.where(kept, 0.0, term.fill)
                gone = gone | ~kept.reshape(-1, *([1, 1, *value.shape][-2:]))
            if np.isnan(value).any():
                raise MaskError("a bias that is not a number")
            total = total + value.reshape(-1, *([1, 1, *value.shape][-2:]))
        total = np.broadcast_to(total, (total.shape[0], length, length))
        allowed = total > MASKED
        if (gone & allowed).any():
            raise MaskError("scores that are replaced by a number without being masked")
        return allowed, np.where(allowed, total, 0)

    def _check_markers(self, terms: tuple[Term, ...], markers: Mapping[Any, Any], free: Any) -> None:
        length, allowed, bias = free
        rng = np.random.default_rng(0)
        random = {m: rng.random((length, length)) < 0.6 for m in markers}
        for pattern in random.values():
            np.fill_diagonal(pattern, True)
        got, got_bias = self._evaluate(terms, length, random)
        want = allowed & np.logical_and.reduce(list(random.values()))
        if not np.array_equal(np.broadcast_to(got, want.shape), want):
            raise MaskError("a mask that is changed before it reaches the scores")
        if not np.array_equal(np.where(want, got_bias, 0), np.where(want, bias, 0)):
            raise MaskError("a bias that depends on the mask")


def _constants(expr: Any) -> list[Any]:
    """Numbers in one expression: integers in its sizes, arrays of its constants."""
    found: list[Any] = []

    def visit(x: Any) -> None:
        if isinstance(x, GenericConst):
            found.append(np.asarray(x.value.numpy()))
        elif isinstance(x, relax.Call):
            for arg in x.args:
                visit(arg)
        elif isinstance(x, relax.Tuple):
            for field in x.fields:
                visit(field)
        elif type(x).__name__ == "IntImm":
            found.append(int(x.value))
        elif type(x).__name__ in ("Add", "Sub", "Mul", "FloorDiv", "FloorMod"):
            visit(x.a)
            visit(x.b)

    visit(expr)
    return found


def _window(patterns: list[tuple[int, Any, Any]]) -> tuple[int, bool]:
    """(window or 0, causal) of what is allowed, the same at every length; raises MaskError if it is something else."""
    length, allowed, _ = patterns[-1]
    if allowed.all():
        causal, window = False, 0
    else:
        i, j = np.arange(length)[:, None], np.arange(length)[None]
        causal = True
        window = int(allowed[0, length - 1].sum())
        window = 0 if window == length else window
    for size, found, _ in patterns:
        i, j = np.arange(size)[:, None], np.arange(size)[None]
        want = (j <= i) & (i - j < (window or size)) if causal else np.ones((size, size), bool)
        if not (found == want).all():
            raise MaskError("a mask that is none of causal, sliding window and chunked")
    return window, causal


def _slopes(pattern: tuple[Any, Any], heads: int) -> tuple[float, ...] | None:
    """ALiBi slopes if the bias is slope[h] * (j - i) up to a constant per row; None if there is no bias."""
    allowed, bias = pattern
    length = bias.shape[-1]
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    diagonal = np.diagonal(bias, axis1=1, axis2=2)
    relative = np.where(allowed & (j <= i), bias - diagonal[:, :, None], 0)
    if not relative.any():
        return None
    slopes = relative[:, length - 1, length - 2] / -1.0
    want = np.where(allowed & (j <= i), slopes[:, None, None] * (j - i), 0)
    if np.abs(relative - want).max() > 1e-5 * max(1.0, float(np.abs(relative).max())):
        raise MaskError("a position bias that is not linear in the distance (ALiBi)")
    return tuple(float(s) for s in np.broadcast_to(slopes, (heads,)))
