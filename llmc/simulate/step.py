"""Whole step functions in the simulator: the Relax function in numpy, each of its kernels simulated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from llmc import ir
from llmc.passes.step_module import StepModule
from llmc.simulate.errors import SimulationError, failure
from llmc.simulate.expressions import dtype_of
from llmc.simulate.kernel import Kernel
from llmc.simulate.machine import Counts
from llmc.targets import simt

Array = Any


@dataclass
class KernelUse:
    """How often a kernel ran in a step, and what its launches did altogether."""

    calls: int = 0
    launches: int = 0
    blocks: int = 0
    barriers: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0

    def add(self, counts: list[Counts], seconds: float) -> None:
        self.calls += 1
        self.seconds += seconds
        for launch in counts:
            self.launches += 1
            self.blocks += launch.blocks
            self.barriers += launch.barriers
            self.shared_bytes = max(self.shared_bytes, launch.shared_bytes)


class SimulatedStep:
    """The step functions of a module whose kernels have blocks and threads.

    Args:
        step: after passes.order.step_phase.
        target: for which its kernels are lowered.
        races: whether to look for races.
    """

    def __init__(self, step: StepModule, target: Any, *, races: bool = True) -> None:
        functions = step.module.functions.items()
        kernels = {gvar: func for gvar, func in functions if isinstance(func, tirx.PrimFunc)}
        lowered = simt.lower(tvm.IRModule(kernels), target)
        self._module = step.module
        self._lowered = {gvar.name_hint: func for gvar, func in lowered.functions.items()}
        self._kernels: dict[str, Kernel] = {}
        self._races = races
        self.uses: dict[str, KernelUse] = {}

    def run(
        self, function: str, inputs: Sequence[Array], pools: Sequence[Array], params: Sequence[Array]
    ) -> Array:
        """Logits f32[R, V] of ``step`` or ``decode``; the pools are updated in place.

        Args:
            inputs: in the order of StepModule.inputs.

        Raises:
            SimulationError: a kernel misbehaves; the message begins with its name.
        """
        func = self._module[function]
        values: dict[Any, Any] = dict(zip(func.params, [*inputs, tuple(pools), tuple(params)], strict=True))
        sizes: dict[Any, int] = {}
        for param, value in values.items():
            _solve(param.ty, value, sizes)
        for block in func.body.blocks:
            for binding in block.bindings:
                values[binding.var] = self._value(binding.value, values, sizes)
        return self._value(func.body.body, values, sizes)

    def _value(self, expr: Any, values: dict[Any, Any], sizes: dict[Any, int]) -> Any:
        if isinstance(expr, relax.Var):
            return values[expr] if expr in values else sizes[expr]  # a size that is passed on
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value, values, sizes)[int(expr.index)]
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(f, values, sizes) for f in expr.fields)
        if ir.is_tensor_constant(expr):
            return expr.value.numpy()
        if isinstance(expr, relax.ShapeExpr):
            return tuple(_evaluate(d, sizes) for d in expr.values)
        if isinstance(expr, tirx.IntImm):
            return int(expr)
        operator = _OPERATORS.get(ir.op_name(expr))
        if operator is not None:
            return operator(*(self._value(a, values, sizes) for a in expr.args))
        if ir.op_name(expr) in ("relax.call_tir", "relax.call_tir_inplace"):
            return self._call(expr, values, sizes)
        if hasattr(expr, "value"):  # a PrimValue
            return _evaluate(expr.value, sizes)
        raise failure("unsupported", f"The simulator does not know the graph operator {ir.op_name(expr)}")

    def _call(self, call: Any, values: dict[Any, Any], sizes: dict[Any, int]) -> Any:
        name = call.args[0].name_hint
        args = [
            np.array(a, order="C", copy=None) if isinstance(a, np.ndarray) else a
            for a in self._value(call.args[1], values, sizes)
        ]
        types = call.ty_args[0]
        several = isinstance(types, relax.TupleType)
        kept = list(call.attrs.inplace_indices) if ir.is_op(call, "relax.call_tir_inplace") else None
        results = []
        for i, kind in enumerate(types.fields if several else [types]):
            if kept is not None and int(kept[i]) >= 0:
                results.append(args[int(kept[i])])
                continue
            shape = tuple(_evaluate(d, sizes) for d in kind.shape)
            results.append(_unwritten(shape, dtype_of(str(kind.dtype))[0]))
        fresh = [r for i, r in enumerate(results) if kept is None or int(kept[i]) < 0]
        scalars = [a for a in args if not isinstance(a, np.ndarray)]
        tensors = [a for a in args if isinstance(a, np.ndarray)]
        begin = time.perf_counter()
        try:
            counts = self._kernel(name).run(self._ordered(name, tensors, fresh, scalars))
        except SimulationError as e:
            raise SimulationError(e.ref, f"{name}: {e.message}", hint=e.hint, context=e.context) from None
        self.uses.setdefault(name, KernelUse()).add(counts, time.perf_counter() - begin)
        return tuple(results) if several else results[0]

    def _ordered(self, name: str, tensors: list[Any], fresh: list[Any], scalars: list[Any]) -> list[Any]:
        """Arguments in the order of the kernel's parameters: tensors, then results; scalars where they stand."""
        rest, numbers = iter([*tensors, *fresh]), iter(scalars)
        params = self._lowered[name].params
        return [next(rest) if isinstance(p.ty, tirx.BufferType) else next(numbers) for p in params]

    def _kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = Kernel(self._lowered[name], races=self._races)
        return self._kernels[name]


_OPERATORS: dict[str, Callable[..., Any]] = {
    "relax.reshape": lambda x, shape: x.reshape(shape),
    "relax.expand_dims": lambda x, *_: x,
}


def _unwritten(shape: tuple[int, ...], dtype: Any) -> Array:
    """A result before its kernel runs: what the kernel leaves out shows as NaN (of integers: as -1)."""
    raw = np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8)
    return raw.view(dtype).reshape(shape)


def _solve(kind: Any, value: Any, sizes: dict[Any, int]) -> None:
    """Find the symbolic sizes in the type of an argument."""
    if isinstance(kind, relax.TupleType):
        for field, part in zip(kind.fields, value, strict=True):
            _solve(field, part, sizes)
        return
    for extent, found in zip(kind.shape, value.shape, strict=True):
        if isinstance(extent, tirx.Var):
            sizes[extent] = found


def _evaluate(expr: Any, sizes: dict[Any, int]) -> int:
    if isinstance(expr, tirx.IntImm):
        return int(expr)
    if isinstance(expr, tirx.Var):
        return sizes[expr]
    kind = type(expr).__name__
    if kind in _ARITHMETIC:
        return _ARITHMETIC[kind](_evaluate(expr.a, sizes), _evaluate(expr.b, sizes))
    raise failure("unsupported", f"The simulator does not know sizes such as {expr}")


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "FloorDiv": lambda a, b: a // b,
}
