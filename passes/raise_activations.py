"""RaiseActivations: an activation written out in arithmetic becomes the operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from llmc import ir
from llmc.passes.rewrite import Builder, Graph, update_function
from llmc.passes.step_module import LoweredGraph

_X = np.linspace(-8.0, 8.0, 257)
_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relax.tanh": np.tanh,
    "relax.sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relax.exp": np.exp,
    "relax.negative": np.negative,
    "relax.square": np.square,
    "relax.erf": np.vectorize(math.erf, otypes=[np.float64]),
    "relax.nn.relu": lambda x: np.maximum(x, 0),
    "relax.astype": lambda x: x,
}
_BINARY: dict[str, Callable[[Any, Any], np.ndarray]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.divide": np.divide,
    "relax.power": np.power,
}
_KNOWN: dict[str, tuple[Callable[[Any], Any], np.ndarray]] = {
    "gelu": (relax.op.nn.gelu, 0.5 * _X * (1 + _UNARY["relax.erf"](_X / math.sqrt(2)))),
    "gelu_tanh": (
        relax.op.nn.gelu_tanh,
        0.5 * _X * (1 + np.tanh(math.sqrt(2 / math.pi) * (_X + 0.044715 * _X**3))),
    ),
    "silu": (relax.op.nn.silu, _X / (1 + np.exp(-_X))),
}
# the two forms of GELU differ by 5e-4; constants of a narrow dtype are rounded, and so is what the source computes
_TOLERANCE = {"float32": 1e-5, "float16": 2e-4, "bfloat16": 1e-3}


class RaiseActivations:
    """Recognise GELU, its tanh form and SiLU by their values.

    before: y = x * 0.5 * (1 + tanh(0.79788456 * x * (1 + 0.044715 * x * x)))
    after:  y = nn.gelu_tanh(x)

    Every elementwise function of one tensor is evaluated at points between -8 and 8 while the graph is read, so that the
    order in which a model writes it does not matter. Runs before FuseGateUp and FuseLinearEpilogue, which take
    activations into matmuls.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph, build = Graph(func), Builder()
        functions: dict[Any, tuple[Any, np.ndarray]] = {}
        changed = False
        for binding in graph.bindings:
            found = _evaluated(graph, binding.value, functions)
            operator = None
            if found is not None:
                functions[binding.var] = found
                operator = _recognised(binding, *found)
            if operator is None or found is None:
                build.keep(binding)
                continue
            changed = True
            build.bind(binding.var, operator(found[0]))
        if not changed:
            return lowered
        new = build.function(func.params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), lowered.params)


def _evaluated(graph: Graph, value: Any, functions: dict[Any, tuple[Any, np.ndarray]]) -> Any | None:
    """(tensor, values) if `value` is an elementwise function of one tensor: its values where the tensor is _X."""
    name = ir.op_name(value)
    if name not in _UNARY and name not in _BINARY:
        return None
    sources: list[Any] = []
    numbers: list[Any] = []
    for arg in value.args[: 1 if name in _UNARY else 2]:
        constant = ir.scalar_of(arg)
        if constant is not None:
            numbers.append(constant)
            continue
        if not isinstance(arg, relax.Var) or graph.definition(graph.source(arg)) is None:
            return None
        source, numbers_of = functions.get(graph.source(arg), (graph.source(arg), _X))
        sources.append(source)
        numbers.append(numbers_of)
    if not sources or any(s != sources[0] for s in sources):
        return None
    with np.errstate(all="ignore"):
        out = (_UNARY.get(name) or _BINARY[name])(*numbers)
    return sources[0], out


def _recognised(binding: Any, source: Any, values: np.ndarray) -> Callable[[Any], Any] | None:
    """The operator whose values these are."""
    if ir.op_name(binding.value) not in _BINARY or str(source.ty.dtype) != str(binding.var.ty.dtype):
        return None
    errors = {name: float(np.abs(values - exact).max()) for name, (_, exact) in _KNOWN.items()}
    best = min(errors, key=lambda name: errors[name])
    return _KNOWN[best][0] if errors[best] <= _TOLERANCE.get(str(source.ty.dtype), 0.0) else None
