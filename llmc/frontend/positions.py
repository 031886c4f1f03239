"""Positions as a real input: what a model computes from arange over the sequence reads `positions` instead.

A decode step sees one token, and would otherwise take it for the first of its sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax, tirx

from llmc.errors import LlmcError
from llmc.ir import IRModule, op_name
from llmc.passes.relax_eval import Evaluator, NotEvaluable
from llmc.passes.resolve_mask import DataFlow
from llmc.passes.rewrite import Builder, Graph, update_function

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "relax.greater": operator.gt,
    "relax.greater_equal": operator.ge,
    "relax.less": operator.lt,
    "relax.less_equal": operator.le,
}


def use_positions(module: IRModule, limit: int) -> IRModule:
    """Replace arange over the sequence and running counts by ``positions``, and decide tests of the sequence's length.

    before: take(table, arange(T));  cumsum(ones(T)) - 1;  max(positions) + 1 > 4096
    after:  take(table, positions);  positions;            False                       if limit <= 4096

    Raises LlmcError("length-dependent") if such a test turns out differently for lengths up to `limit`.
    """
    func = module["main"]
    graph = Graph(func)
    length, positions = func.params[0].ty.shape[0], func.params[1]
    flow = DataFlow(graph, {positions})
    builder = Builder()
    changed = False
    for binding in graph.bindings:
        new = _position_form(graph, flow, builder, binding, length, positions, limit)
        if new is None:
            builder.keep(binding)
        else:
            builder.bind(binding.var, new)
            changed = True
    if not changed:
        return module
    return update_function(module, "main", builder.function(func.params, func.body.body, func.attrs))


def _position_form(
    graph: Graph, flow: Any, builder: Builder, binding: Any, length: Any, positions: Any, limit: int
) -> Any:
    value = binding.value
    name = op_name(value)
    if name == "relax.arange":
        start, end, step = value.args
        if not is_int(start) or not is_int(step, 1) or not _is_offset(end, length, int(start.value)):
            return None
        return _shifted(builder, positions, int(start.value), str(binding.var.ty.dtype), binding.var)
    if name in _COMPARISONS and not any(not isinstance(d, tirx.IntImm) for d in binding.var.ty.shape):
        return None if flow.is_data(value) else _decide(graph, binding, positions, limit)
    if name == "relax.cumsum" and not flow.is_data(value):
        axis = int(value.attrs.axis) % len(binding.var.ty.shape)
        offset = _running_count(graph, binding.var, axis, positions)
        if offset is None:
            return None
        shape = [length if i == axis else 1 for i in range(len(binding.var.ty.shape))]
        count = builder.emit(_shifted(builder, positions, offset, str(binding.var.ty.dtype), None), "count")
        count = builder.emit(relax.op.reshape(count, shape), "count")
        return relax.op.broadcast_to(count, list(binding.var.ty.shape))
    return None


def _decide(graph: Graph, binding: Any, positions: Any, limit: int) -> Any:
    """A comparison of ``length + c`` with a number, as the constant that it is for every length up to the limit."""
    sides = [side for x in binding.value.args if (side := _by_length(graph, x, positions)) is not None]
    if len(sides) != 2 or sorted(slope for slope, _ in sides) != [0, 1]:
        return None
    compare = _COMPARISONS[op_name(binding.value)]
    first, last = (compare(*[slope * n + offset for slope, offset in sides]) for n in (1, limit))
    if first != last:
        bound = next(offset for slope, offset in sides if not slope)
        raise LlmcError(
            "length-dependent",
            f"The model computes differently for sequences of more than {bound:.0f} tokens, and is made for up to {limit}.",
            hint=f"Compile it for at most {bound:.0f} tokens (--max-seq-len {bound:.0f}).",
        )
    return relax.const(np.full([int(d) for d in binding.var.ty.shape], first), "bool")


def _by_length(graph: Graph, expr: Any, positions: Any) -> tuple[int, float] | None:
    """(1, c) if every entry is the length plus c, (0, c) if it is the number c, else None."""
    found = []
    for n in (3, 8):
        try:
            value = np.unique(Evaluator(graph, n, {positions: np.arange(n)}).value(expr))
        except NotEvaluable:
            return None
        if value.size != 1:
            return None
        found.append(float(value[0]))
    slope = (found[1] - found[0]) / 5
    return (int(slope), found[0] - 3 * slope) if slope in (0, 1) else None


def _running_count(graph: Graph, var: Any, axis: int, positions: Any) -> int | None:
    """c if the variable's entry t along `axis` is t + c, at two lengths; else None."""
    offsets = set()
    for n in (5, 9):
        try:
            value = Evaluator(graph, n, {positions: np.arange(n)}).value(var)
        except NotEvaluable:
            return None
        rows = np.moveaxis(value, axis, -1).reshape(-1, n) - np.arange(n)
        offsets |= set(np.unique(rows).tolist())
    return int(offsets.pop()) if len(offsets) == 1 else None


def _shifted(builder: Builder, positions: Any, offset: int, dtype: str, var: Any) -> Any:
    x = positions
    if str(positions.ty.dtype) != dtype:
        x = relax.op.astype(x, dtype)
        if offset:
            x = builder.emit(x, "position")
    return relax.op.add(x, relax.const(offset, dtype)) if offset else x


def is_int(x: Any, value: int | None = None) -> bool:
    return isinstance(x, tirx.IntImm) and (value is None or int(x.value) == value)


def _is_offset(end: Any, length: Any, start: int) -> bool:
    """end == length + start"""
    if start == 0:
        return bool(end.same_as(length))
    if type(end).__name__ != "Add":
        return False
    a, b = (end.a, end.b) if end.a.same_as(length) else (end.b, end.a)
    return bool(a.same_as(length)) and is_int(b, start)
