"""Positions as a real input: what a model computes from arange over the sequence reads `positions` instead.

A decode step sees one token, and would otherwise take it for the first of its sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, tirx

from llmc.ir import IRModule, op_name
from llmc.passes.relax_eval import Evaluator, NotEvaluable
from llmc.passes.resolve_mask import DataFlow
from llmc.passes.rewrite import Builder, Graph, update_function


def use_positions(module: IRModule) -> IRModule:
    """Replace arange over the sequence, slices of a table by its length, and running counts by ``positions``.

    before: table[0:T];  arange(T);  cumsum(ones(T)) - 1          after: take(table, positions);  positions;  positions
    """
    func = module["main"]
    graph = Graph(func)
    length, positions = func.params[0].ty.shape[0], func.params[1]
    flow = DataFlow(graph, {positions})
    builder = Builder()
    changed = False
    for binding in graph.bindings:
        new = _position_form(graph, flow, builder, binding, length, positions)
        if new is None:
            builder.keep(binding)
        else:
            builder.bind(binding.var, new)
            changed = True
    if not changed:
        return module
    return update_function(module, "main", builder.function(func.params, func.body.body, func.attrs))


def _position_form(
    graph: Graph, flow: Any, builder: Builder, binding: Any, length: Any, positions: Any
) -> Any:
    value = binding.value
    name = op_name(value)
    if name == "relax.arange":
        start, end, step = value.args
        if not is_int(start) or not is_int(step, 1) or not _is_offset(end, length, int(start.value)):
            return None
        return _shifted(builder, positions, int(start.value), str(binding.var.ty.dtype), binding.var)
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
