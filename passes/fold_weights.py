"""FoldWeights: arithmetic on weights alone is done once, when they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import relax

from llmc import ir
from llmc.passes.relax_eval import OPERATORS, Evaluator
from llmc.passes.rewrite import Builder, Graph, operands, substituted, update_function
from llmc.passes.step_module import LoweredGraph, PackedParam
from llmc.schedules.costs import itemsize

Array = Any

_SMALL = (
    1 << 20
)  # bytes: results up to this size are stored even if they are larger than what they are made of


@dataclass(frozen=True, eq=False)
class WeightExpression:
    """How a parameter is computed from tensors of the source model.

    Attributes:
        function: a Relax function of these tensors, in the order of the parameter's sources.
    """

    function: Any

    @property
    def dtypes(self) -> tuple[str, ...]:
        """In which each source is taken."""
        return tuple(str(p.ty.dtype) for p in self.function.params)

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the operators, in order."""
        values = (b.value for block in self.function.body.blocks for b in block.bindings)
        return tuple(ir.op_name(v).removeprefix("relax.") for v in values if ir.op_name(v))

    def evaluate(self, sources: Sequence[Array]) -> Array:
        """The result (bfloat16 as ml_dtypes has it); every operator rounds to its own dtype, as the compiled one would."""
        known = dict(zip(self.function.params, sources, strict=True))
        made = Evaluator(Graph(self.function), 0, known).value(self.function.body.body)
        return np.asarray(made, order="C")  # ascontiguousarray would give a number a dimension


class FoldWeights:
    """Replace what is computed from parameters and constants alone by a parameter that holds the result.

    before: w [K] param;  a = astype(w, "float32"); b = add(a, 1); y = multiply(x, b)
    after:  b [K] param, packed as add(astype(w), 1);              y = multiply(x, b)

    Large results are folded only if nothing else reads their weights and they take at most twice the place: a table of
    which all tokens read a few rows is not stored twice. Runs last on the graph: the fusions and LowerLinear match weights
    through the transposes and casts in front of them, and what they take costs nothing when the model runs.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        index_of = {var: i for i, var in enumerate(func.params[2:])}
        made_of = _made_of_weights(graph, set(index_of))
        roots = [r for r in _roots(graph, made_of) if made_of[r] and _worth(graph, r, made_of)]
        if not roots:
            return lowered
        params, infos = list(func.params), list(lowered.params)
        folded: dict[Any, Any] = {}
        names = {info.name for info in infos}
        for root in roots:
            sources = made_of[root]
            first, *others = (infos[index_of[s]] for s in sources)
            name = _unused(f"{first.name}.folded", names)
            made = PackedParam(
                name,
                first.source,
                str(root.ty.dtype),
                tuple(int(d) for d in ir.dims(root)),
                more=tuple(info.source for info in others),
                expression=WeightExpression(_function_of(graph, root, sources)),
            )
            infos.append(made)
            folded[root] = relax.Var(name.replace(".", "_"), root.ty)
            params.append(folded[root])
        build = Builder()
        for binding in graph.bindings:
            # what only the folded ones read is dropped with the function's dead code
            if binding.var not in folded:
                value = substituted(binding.value, folded)
                build.keep(binding) if value is binding.value else build.bind(binding.var, value)
        body = substituted(func.body.body, folded)
        new = build.function(params, body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), tuple(infos))


def _made_of_weights(graph: Graph, weights: set[Any]) -> dict[Any, tuple[Any, ...]]:
    """Variable -> the parameters that it is computed from, if it is from nothing else; none for constants."""
    found: dict[Any, tuple[Any, ...]] = {w: (w,) for w in weights}
    for binding in graph.bindings:
        value = binding.value
        reads = list(operands(value))
        if all(var in found for var in reads) and _evaluable(value):
            found[binding.var] = tuple(dict.fromkeys(s for var in reads for s in found[var]))
    return found


def _evaluable(value: Any) -> bool:
    """A copy, a part of a tuple, or an operator on known shapes that the evaluator has."""
    if not isinstance(value, relax.Call):
        return True
    if ir.op_name(value).removeprefix("relax.") not in OPERATORS:
        return False
    shapes = [arg for arg in value.args if isinstance(arg, relax.ShapeExpr)]
    return all(ir.is_constant(d) for shape in shapes for d in shape.values)


def _roots(graph: Graph, made_of: dict[Any, tuple[Any, ...]]) -> list[Any]:
    """Computed variables of `made_of` that the rest of the graph reads."""
    rest = [set(operands(b.value)) for b in graph.bindings if b.var not in made_of]
    read = set(operands(graph.func.body.body)).union(*rest)
    return [
        b.var
        for b in graph.bindings
        if b.var in made_of
        and any(v in read for v in _copies(graph, b.var))
        and isinstance(b.value, relax.Call | relax.TupleGetItem)
        and isinstance(b.var.ty, relax.TensorType)
    ]


def _copies(graph: Graph, var: Any) -> list[Any]:
    """A variable and its plain copies."""
    found = [var]
    for known in found:
        found += [b.var for b in graph.users(known) if isinstance(b.value, relax.Var)]
    return found


def _worth(graph: Graph, root: Any, made_of: dict[Any, tuple[Any, ...]]) -> bool:
    size = _bytes(root)
    if size <= _SMALL:
        return True
    sources = made_of[root]
    elsewhere = any(user.var not in made_of for s in sources for user in graph.users(s))
    return not elsewhere and size <= 2 * sum(_bytes(s) for s in sources)


def _bytes(var: Any) -> int:
    return prod(int(d) for d in ir.dims(var)) * itemsize(str(var.ty.dtype))


def _function_of(graph: Graph, root: Any, sources: Sequence[Any]) -> Any:
    """The Relax function from `sources` to `root`; Builder drops the bindings that it does not need."""
    needed, waiting = {root}, [root]
    while waiting:
        value = graph.definition(waiting.pop())
        if value is not None:
            fresh = set(operands(value)) - needed
            needed |= fresh
            waiting += fresh
    build = Builder()
    for binding in graph.bindings:
        if binding.var in needed:
            build.keep(binding)
    return build.function(sources, root)


def _unused(name: str, taken: set[str]) -> str:
    """`name`, with a number if it is taken; it is taken afterwards."""
    unique, i = name, 2
    while unique in taken:
        unique, i = f"{name}.{i}", i + 1
    taken.add(unique)
    return unique
