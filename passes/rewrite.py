"""A linear rewrite of one Relax function: read its bindings once, give out a new list.

PyExprMutator rebuilds and renormalises every expression, which costs seconds on an 80-layer graph. Most of our passes replace
a few bindings and leave the others; they keep the Var objects, so that untouched bindings are reused as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tvm
from tvm import relax

from llmc.ir import Expr, Function, IRModule, Var, shallow_copy
from llmc.kernel_work import KernelCost
from llmc.schedules.costs import COST, kernel_cost


def bindings_of(func: Function) -> list[Any]:
    """All bindings of the function's blocks, in order."""
    return [binding for block in func.body.blocks for binding in block.bindings]


def operands(expr: Any) -> Iterable[Any]:
    """Relax variables that a binding's value reads (the value is in A-normal form)."""
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, relax.Call):
        for arg in expr.args:
            yield from operands(arg)
    elif isinstance(expr, relax.Tuple):
        for field in expr.fields:
            yield from operands(field)
    elif isinstance(expr, relax.TupleGetItem):
        yield from operands(expr.tuple_value)
    elif isinstance(expr, relax.SeqExpr):
        raise TypeError("nested blocks are not expected in a model graph")


def substituted(expr: Any, replaced: dict[Any, Any]) -> Any:
    """A binding's value that reads other variables; `expr` itself if it reads none of `replaced`."""
    if isinstance(expr, relax.Var):
        return replaced.get(expr, expr)
    if not any(var in replaced for var in operands(expr)):
        return expr
    if isinstance(expr, relax.Call):
        return relax.Call(expr.op, [substituted(a, replaced) for a in expr.args], expr.attrs, expr.ty_args)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([substituted(field, replaced) for field in expr.fields])
    return relax.TupleGetItem(substituted(expr.tuple_value, replaced), expr.index)


class Graph:
    """Definitions and uses of one function, for matching.

    Attributes:
        func: the function.
        bindings: its bindings in order.
        uses: variable -> how many bindings read it (the function's result counts as one).
    """

    def __init__(self, func: Function) -> None:
        self.func = func
        self.bindings = bindings_of(func)
        self._definition: dict[Any, Any] = {}
        self.uses: dict[Any, int] = {}
        self._users: dict[Any, list[Any]] = {}
        for binding in self.bindings:
            self._definition[binding.var] = binding.value
            for var in operands(binding.value):
                self.uses[var] = self.uses.get(var, 0) + 1
                self._users.setdefault(var, []).append(binding)
        for var in operands(func.body.body):
            self.uses[var] = self.uses.get(var, 0) + 1

    def definition(self, var: Any) -> Any:
        """The value bound to `var`; None for parameters and non-variables."""
        return self._definition.get(var) if isinstance(var, relax.Var) else None

    def resolve(self, var: Any) -> Any:
        """The value bound to `var` behind plain copies (``a = b``)."""
        value = self.definition(var)
        while isinstance(value, relax.Var):
            var, value = value, self.definition(value)
        return value

    def source(self, var: Any) -> Any:
        """The variable that `var` is a plain copy of."""
        value = self.definition(var)
        while isinstance(value, relax.Var):
            var, value = value, self.definition(value)
        return var

    def users(self, var: Any) -> list[Any]:
        """Bindings that read `var`."""
        return self._users.get(var, [])


class Builder:
    """Collects the bindings of the new function."""

    def __init__(self) -> None:
        self.bindings: list[Any] = []
        self._normalizer = relax.BlockBuilder()
        self._count = 0

    def keep(self, binding: Any) -> None:
        self.bindings.append(binding)

    def bind(self, var: Var, value: Expr) -> None:
        """Bind an existing variable to a new value of the same type."""
        self.bindings.append(relax.VarBinding(var, self._typed(value)))

    def emit(self, value: Expr, name: str = "v") -> Var:
        """Bind a fresh variable."""
        value = self._typed(value)
        var = relax.DataflowVar(f"{name}_{self._count}", value.ty)
        self._count += 1
        self.bindings.append(relax.VarBinding(var, value))
        return var

    def _drop_dead(self, final: Any) -> None:
        """Remove bindings that the result does not need; all values of a dataflow block are pure."""
        needed = set(operands(final))
        kept = []
        for binding in reversed(self.bindings):
            if binding.var in needed:
                kept.append(binding)
                needed.update(operands(binding.value))
        self.bindings = kept[::-1]

    def _typed(self, value: Expr) -> Expr:
        return self._normalizer.normalize(value) if isinstance(value, relax.Call) else value

    def function(
        self, params: Sequence[Var], result: Expr, attrs: Any = None, *, symbol: str | None = None
    ) -> Function:
        """The finished function: one dataflow block; `result` is a variable (or tuple of them)."""
        outputs = list(dict.fromkeys(operands(result)))
        renamed: dict[Any, Any] = {}
        for var in outputs:  # what leaves a dataflow block may not be a DataflowVar
            renamed[var] = var
            if isinstance(var, relax.DataflowVar):
                renamed[var] = relax.Var(var.name + "_out", var.ty)
                self.bindings.append(relax.VarBinding(renamed[var], var))
        final = (
            renamed[result]
            if isinstance(result, relax.Var)
            else relax.Tuple([renamed[v] for v in operands(result)])
        )
        self._drop_dead(final)
        final = self._normalizer.normalize(final)
        body = relax.SeqExpr([relax.DataflowBlock(self.bindings)], final)
        body = self._normalizer.normalize(body)
        func = relax.Function(list(params), body, final.ty, is_pure=True)
        for key, value in dict(attrs or {}).items():
            func = func.with_attr(key, value)
        return func.with_attr("global_symbol", symbol) if symbol else func


def update_function(module: IRModule, name: str, func: Function) -> IRModule:
    """A shallow copy of the module with one function replaced."""
    out = shallow_copy(module)
    out.update_func(out.get_global_var(name), func)
    return out


KERNEL_ATTR = "llmc.kernel"  # of a PrimFunc: its config as JSON, for tuning and for reading dumps


class Kernels:
    """Adds PrimFuncs to a module, each configuration once; a configuration with to_json goes into KERNEL_ATTR.

    Args:
        module: gets the functions; changed in place.
    """

    def __init__(self, module: IRModule) -> None:
        self.module = module
        self._known: dict[Any, Any] = {}

    def get(self, config: Any, name: str, build: Callable[[], Any], cost: KernelCost | None = None) -> Any:
        """The GlobalVar of the kernel for `config` (hashable), built on first use; `cost` is that of `config`."""
        if config not in self._known:
            taken = {gv.name_hint for gv in self.module.get_global_vars()}
            unique, i = name, 1
            while unique in taken:
                unique, i = f"{name}_{i}", i + 1
            func = build().with_attr("global_symbol", unique).with_attr("op_pattern", 8)
            func = func.with_attr("tirx.is_scheduled", True)
            func = func.with_attr(COST, (cost or kernel_cost(config)).as_text())
            own = config[0] if isinstance(config, tuple) else config
            if hasattr(own, "to_json"):
                text = json.dumps({"kind": type(own).__name__, "config": own.to_json()}, sort_keys=True)
                func = func.with_attr(KERNEL_ATTR, text)
            gvar = tvm.ir.GlobalVar(unique)
            relax.expr._update_type(gvar, func.ty)
            self.module[gvar] = func
            self._known[config] = gvar
        return self._known[config]
