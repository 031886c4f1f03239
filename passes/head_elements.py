"""What each element of an attention operand is computed from: a sum of products of inputs and position coefficients."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from llmc import ir
from llmc.ops import Run
from llmc.passes.rewrite import Graph, operands

# sign, input variable, its index along the last axes, coefficient variable or None, its index along the last axis
Term = tuple[int, Any, int, Any, int]
FLOATS = ("float32", "float16", "bfloat16")


def position_only(graph: Graph) -> set[Any]:
    """Variables that depend on nothing but positions and constants."""
    known = {graph.func.params[1]}
    for binding in graph.bindings:
        if all(v in known for v in operands(binding.value)):
            known.add(binding.var)
    return known


class Elements:
    """Traces elements along the last axes of a tensor; leading axes (tokens, heads) pass through untouched.

    Args:
        coefficients: variables of `position_only`.
    """

    def __init__(self, graph: Graph, coefficients: set[Any]) -> None:
        self.graph = graph
        self.coefficients = coefficients
        self._coefficient: dict[Any, Any] = {}

    def of(self, var: Any, trailing: int) -> np.ndarray:
        """The terms of each element along the last `trailing` axes, as an object array of tuples of Term."""
        var = self.graph.source(var)
        found = self._computed(var, trailing)
        if found is None:
            shape = [int(d) for d in ir.dims(var)[-trailing:]]
            found = np.empty(int(np.prod(shape)), object)
            for i in range(found.size):
                found[i] = ((1, var, i, None, 0),)
            found = found.reshape(shape)
        return found

    def _computed(self, var: Any, trailing: int) -> np.ndarray | None:
        value = self.graph.definition(var)
        name = ir.op_name(value)
        if isinstance(value, relax.TupleGetItem):
            cut = split_part(self.graph, value)
            return self._cut(cut[0], trailing, cut[1], cut[2], cut[3], 1) if cut else None
        if name == "relax.strided_slice":
            bounds = ir.slice_of(value)
            return self._cut(value.args[0], trailing, *bounds) if bounds else None
        if name == "relax.permute_dims":
            axes = [int(a) for a in value.attrs.axes or ()]
            keep = axes[-trailing:] == list(range(len(axes) - trailing, len(axes))) and axes
            return self.of(value.args[0], trailing) if keep else None
        if name == "relax.reshape":
            return self._reshaped(var, value.args[0], trailing)
        if name == "relax.astype":
            return self.of(value.args[0], trailing) if str(value.args[0].ty.dtype) in FLOATS else None
        if name == "relax.concat":
            axis = int(value.attrs.axis) % len(ir.dims(var)) - (len(ir.dims(var)) - trailing)
            parts = value.args[0].fields
            return np.concatenate([self.of(p, trailing) for p in parts], axis) if axis >= 0 else None
        if name == "relax.negative":
            return _map(lambda t: tuple((-s, *rest) for s, *rest in t), self.of(value.args[0], trailing))
        if name in ("relax.add", "relax.subtract"):
            a, b = (self.of(v, trailing) if _same_rank(v, var) else None for v in value.args)
            if a is None or b is None or a.shape != b.shape:
                return None
            sign = 1 if name == "relax.add" else -1
            flat = [
                x + tuple((sign * s, *rest) for s, *rest in y) for x, y in zip(a.flat, b.flat, strict=True)
            ]
            return _array(flat, a.shape)
        if name == "relax.multiply":
            return self._product(var, value.args, trailing)
        return None

    def _cut(
        self, source: Any, trailing: int, axis: int, begin: int, end: int, step: int
    ) -> np.ndarray | None:
        axis -= len(ir.dims(source)) - trailing
        if axis < 0:
            return None
        index: list[Any] = [slice(None)] * trailing
        index[axis] = slice(begin, end, step)
        return self.of(source, trailing)[tuple(index)]

    def _reshaped(self, var: Any, source: Any, trailing: int) -> np.ndarray | None:
        """A reshape of the last axes alone."""
        out, inside = ir.dims(var), ir.dims(source)
        lead, tail = out[: len(out) - trailing], out[len(out) - trailing :]
        size = int(np.prod([int(d) for d in tail]))
        product, count = 1, 0
        for d in reversed(inside):
            if product == size or not ir.is_constant(d):
                break
            product, count = product * int(d), count + 1
        if product != size or count == 0 or not _same_dims(lead, inside[: len(inside) - count]):
            return None
        return self.of(source, count).reshape([int(d) for d in tail])

    def _product(self, var: Any, args: Any, trailing: int) -> np.ndarray | None:
        for x, c in ((args[0], args[1]), (args[1], args[0])):
            if not isinstance(c, relax.Var) or c not in self.coefficients or not _same_rank(x, var):
                continue
            if trailing != 1 or x in self.coefficients:
                return None
            factors = self.coefficient(self.graph.source(c))
            terms = self.of(x, 1)
            if factors is None or any(t[3] is not None for e in terms for t in e):
                return None
            if len(factors) != len(terms):
                return None
            flat = [
                tuple((s, v, i, f[0], f[1]) for s, v, i, _, _ in e)
                for e, f in zip(terms, factors, strict=True)
            ]
            return _array(flat, terms.shape)
        return None

    def coefficient(self, var: Any) -> list[tuple[Any, int]] | None:
        """(variable, column) of each element along the last axis of a per-position tensor."""
        if var not in self._coefficient:
            self._coefficient[var] = self._trace_coefficient(var)
        found: list[tuple[Any, int]] | None = self._coefficient[var]
        return found

    def _trace_coefficient(self, var: Any) -> list[tuple[Any, int]] | None:
        graph = self.graph
        dims = ir.dims(var)
        varying = [d for d in dims[:-1] if not ir.is_one(d)]
        if not dims or not ir.is_constant(dims[-1]) or len(varying) != 1 or ir.is_constant(varying[0]):
            return None
        value = graph.definition(var)
        if ir.is_op(value, "relax.reshape") and _same_dims([varying[0], dims[-1]], ir.dims(value.args[0])):
            return self.coefficient(graph.source(value.args[0]))
        if ir.is_op(value, "relax.astype") and str(value.ty.dtype) == "float32":
            narrow = graph.source(value.args[0])
            # widening is exact; the kernel does it
            return self.coefficient(narrow) if str(narrow.ty.dtype) in FLOATS else None
        if ir.is_op(value, "relax.repeat") and int(value.attrs.axis) % len(dims) == len(dims) - 1:
            inner = self.coefficient(graph.source(value.args[0]))
            return [f for f in inner for _ in range(int(value.attrs.repeats))] if inner else None
        cut = None
        if isinstance(value, relax.TupleGetItem):
            part = split_part(graph, value)
            cut = (part[0], *part[1:], 1) if part else None
        elif ir.is_op(value, "relax.strided_slice"):
            bounds = ir.slice_of(value)
            cut = (value.args[0], *bounds) if bounds else None
        if cut and cut[1] == len(dims) - 1:
            inner = self.coefficient(graph.source(cut[0]))
            return inner[cut[2] : cut[3] : cut[4]] if inner else None
        return [(var, i) for i in range(int(dims[-1]))]


def split_part(graph: Graph, value: Any) -> tuple[Any, int, int, int] | None:
    """(tensor, axis, begin, end) of one part of a split."""
    split = graph.resolve(value.tuple_value)
    if not ir.is_op(split, "relax.split"):
        return None
    axis = int(split.attrs.axis) % len(ir.dims(split.args[0]))
    sizes = [f.shape[axis] for f in split.ty.fields]
    if not all(ir.is_constant(s) for s in sizes):
        return None
    begin = sum(int(s) for s in sizes[: int(value.index)])
    return split.args[0], axis, begin, begin + int(sizes[int(value.index)])


def runs_of(elements: np.ndarray) -> tuple[Any, tuple[Any, ...], tuple[Run, ...]] | None:
    """(input, coefficient tensors, runs) of a head's elements, if they are copies and rotations of one input."""
    columns: list[tuple[Any, ...]] = []
    inputs: list[Any] = []
    tensors: list[Any] = []

    def number(tensor: Any) -> int:
        if tensor not in tensors:
            tensors.append(tensor)
        return tensors.index(tensor)

    for d, terms in enumerate(elements):
        inputs.extend(t[1] for t in terms if t[1] not in inputs)
        if len(terms) == 1 and terms[0][0] == 1 and terms[0][3] is None:
            columns.append(((False, 0, 0, 0), (terms[0][2], 0, 0, 0)))
            continue
        if len(terms) != 2 or any(t[3] is None for t in terms) or all(t[0] < 0 for t in terms):
            return None
        # the positive term first; of two, that of the element itself
        ranked = sorted((-t[0], t[2] != d, -t[2], i) for i, t in enumerate(terms))
        first, second = (terms[rank[-1]] for rank in ranked)
        key = (True, number(first[3]), number(second[3]), second[0])
        columns.append((key, (first[2], first[4], second[2], second[4])))
    if len(inputs) != 1 or len(tensors) > 2:
        return None
    options = [_runs(columns, step) for step in (1, 2) if len(columns) % step == 0]
    return inputs[0], tuple(tensors), min(options, key=len)


def _runs(columns: list[tuple[Any, ...]], to_step: int) -> tuple[Run, ...]:
    out = []
    for start in range(to_step):
        at = list(range(start, len(columns), to_step))
        while at:
            count = 1
            step: tuple[int, ...] = (0, 0, 0, 0)
            key, first = columns[at[0]]
            if len(at) > 1 and columns[at[1]][0] == key:
                step = tuple(b - a for a, b in zip(first, columns[at[1]][1], strict=True))
                while count < len(at) and columns[at[count]] == (key, _after(first, step, count)):
                    count += 1
            pair, ca_of, cb_of, sign = key
            out.append(
                Run(
                    at[0], to_step, count, first[0], step[0], pair, ca_of, first[1], step[1],
                    sign if pair else 1, first[2], step[2], cb_of, first[3], step[3],
                )
            )  # fmt: skip
            at = at[count:]
    return tuple(out)


def _after(first: tuple[int, ...], step: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(f + count * s for f, s in zip(first, step, strict=True))


def _map(f: Any, array: np.ndarray) -> np.ndarray:
    return _array([f(x) for x in array.flat], array.shape)


def _array(flat: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(len(flat), object)
    for i, x in enumerate(flat):
        out[i] = x
    return out.reshape(shape)


def _same_rank(v: Any, var: Any) -> bool:
    return isinstance(v, relax.Var) and len(ir.dims(v)) == len(ir.dims(var))


def _same_dims(a: list[Any], b: list[Any]) -> bool:
    """Equal apart from units."""
    a, b = ([d for d in dims if not ir.is_one(d)] for dims in (a, b))
    if len(a) != len(b):
        return False
    return all(
        int(d) == int(e) if ir.is_constant(d) and ir.is_constant(e) else bool(d.same_as(e))
        for d, e in zip(a, b, strict=True)
    )
