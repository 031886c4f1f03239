"""CountKernels: the kernels that a step function calls, with the bytes and operations of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from llmc import ir
from llmc.artifact import KernelEntry
from llmc.kernel_work import Formula, KernelCost
from llmc.passes.rewrite import Graph
from llmc.passes.step_module import StepModule
from llmc.schedules.costs import COST, dim_formula, itemsize

# operators that call a packed function of a library
_LIBRARY = ("relax.call_dps_packed", "relax.call_pure_packed")


@dataclass(frozen=True)
class _Call:
    """A call of a kernel: entries that differ in nothing else are one row of the table."""

    name: str
    kind: str
    operations: Formula
    read: Formula
    written: Formula


class CountKernels:
    """The kernels of ``step`` and ``decode``.

    A block is what lies from one attention kernel to the next: the rest of its layer and the start of the following one.
    So whatever runs once per step, before the first or behind the last layer, is in no block.
    """

    def __call__(self, step_module: StepModule) -> dict[str, tuple[KernelEntry, ...]]:
        """Function name -> its kernels in the order of their first call."""
        return {name: self._function(step_module, name) for name in ("step", "decode")}

    def _function(self, step: StepModule, name: str) -> tuple[KernelEntry, ...]:
        func = step.module[name]
        symbols = _symbols(step, func)
        graph = Graph(func)
        calls = [call for b in graph.bindings if (call := _call(step.module, b, symbols)) is not None]
        at = [i for i, call in enumerate(calls) if call.kind.endswith("attention")]
        blocks = len(at) - 1
        inside = Counter(calls[at[0] : at[-1]]) if blocks > 0 else Counter[_Call]()
        return tuple(
            KernelEntry(
                call.name,
                call.kind,
                count,
                inside[call] / blocks if blocks > 0 else 0.0,
                str(call.read),
                str(call.written),
                str(call.operations),
            )
            for call, count in Counter(calls).items()
        )


def _symbols(step: StepModule, func: Any) -> dict[Any, str]:
    """Variable of a size -> T, B or R."""
    found: dict[Any, str] = {}
    for param, spec in zip(func.params, step.inputs, strict=False):
        for dim, text in zip(ir.dims(param), spec.shape, strict=True):
            if isinstance(dim, tirx.Var) and text in ("T", "B", "R"):
                found.setdefault(dim, str(text))
    return found


def _call(module: Any, binding: Any, symbols: dict[Any, str]) -> _Call | None:
    value = binding.value
    name = ir.op_name(value)
    in_place = name == "relax.call_tir_inplace"
    if name in _LIBRARY:
        return _library(binding, symbols)
    if not in_place and name != "relax.call_tir":
        return None
    gvar, args = value.args[0], list(value.args[1].fields)
    cost = KernelCost.parse(str(module[gvar].attrs[COST]))
    results = _tensor_types(value.ty)
    shared = [int(i) for i in value.attrs.inplace_indices] if in_place else [-1] * len(results)
    values = _local_symbols(args, results, symbols)
    bound = lambda formula: formula.with_symbols(values)  # noqa: E731
    special, changed = dict(cost.read), dict(cost.written)
    read, seen = Formula(), []
    for i, arg in enumerate(args):
        if not isinstance(arg.ty, relax.TensorType) or (i in shared and i not in special):
            continue
        if i in special:
            read += bound(special[i])
        elif arg not in seen:  # q, k and v are one tensor
            seen.append(arg)
            read += _bytes(arg.ty, symbols)
    written = Formula()
    for j, (result, index) in enumerate(zip(results, shared, strict=True)):
        key = index if index >= 0 else -1 - j
        written += bound(changed[key]) if key in changed else _bytes(result, symbols)
    return _Call(gvar.name_hint, cost.kind, bound(cost.operations), read, written)


def _library(binding: Any, symbols: dict[Any, str]) -> _Call:
    value = binding.value
    callee = value.args[0]
    fields = value.args[1].fields if len(value.args) > 1 and isinstance(value.args[1], relax.Tuple) else ()
    read, written = Formula(), Formula()
    for arg in [*fields, *value.args[1:]]:
        if isinstance(getattr(arg, "ty", None), relax.TensorType):
            read += _bytes(arg.ty, symbols)
    for result in _tensor_types(value.ty):
        written += _bytes(result, symbols)
    return _Call(str(callee.global_symbol), "library", Formula(), read, written)


def _local_symbols(args: list[Any], results: list[Any], symbols: dict[Any, str]) -> dict[str, Formula]:
    """Values of the symbols that only a KernelCost has."""
    rows = Formula.of(1)
    for dim in list(results[0].shape)[:-1]:
        rows = rows * dim_formula(dim, symbols)
    values = {"N": rows}
    for i, kind in enumerate([*(a.ty for a in args), *results]):
        for j, dim in enumerate(getattr(kind, "shape", None) or ()):
            values[f"D{i}_{j}"] = dim_formula(dim, symbols)
    return values


def _tensor_types(kind: Any) -> list[Any]:
    return list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]


def _bytes(kind: Any, symbols: dict[Any, str]) -> Formula:
    size = Formula.of(itemsize(str(kind.dtype)))
    for dim in kind.shape:
        size = size * dim_formula(dim, symbols)
    return size
