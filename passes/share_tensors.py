"""ShareTensors: planned memory is seen through one tensor per place and shape, not one per kernel call."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import relax, tirx

from llmc import ir
from llmc.passes.rewrite import operands, substituted

_VIEWS = ("relax.memory.alloc_tensor", "relax.reshape")
_KILLS = ("relax.memory.kill_tensor",)


class ShareTensors:
    """Make every shape, and every view of the same memory, once per function.

    before: t1 = memory.alloc_tensor(s, 0, shape([1, T, 2048]), "bfloat16");  f(x, t1)
            t2 = memory.alloc_tensor(s, 0, shape([1, T, 2048]), "bfloat16");  f(y, t2)
    after:  n = shape([1, T, 2048])
            t1 = memory.alloc_tensor(s, 0, n, "bfloat16");  f(x, t1);  f(y, t1)

    The memory plan gives tensors one place only if none is needed after the next is written; through which tensor the
    kernels see the place does not matter. Likewise fields of a tuple that is made here are read without it. Each call of
    the virtual machine that goes away saves as much as a third of a small kernel takes. Runs after StaticPlanBlockMemory
    and LowerAllocTensor, which make the views, and before KillAfterLastUse, so that a tensor lives to its last use.
    """

    def __call__(self, module: Any) -> Any:
        out = ir.shallow_copy(module)
        for gvar, func in module.functions.items():
            if isinstance(func, relax.Function) and _is_straight(func):
                out.update_func(gvar, _Sharing().function(func))
        return out


def _is_straight(func: Any) -> bool:
    """Bindings without branches."""
    return isinstance(func.body, relax.SeqExpr) and not any(
        isinstance(binding.value, relax.If | relax.SeqExpr | relax.Function)
        for block in func.body.blocks
        for binding in block.bindings
    )


class _Sharing:
    """What one function has made so far."""

    def __init__(self) -> None:
        self._bindings: list[Any] = []
        self._replaced: dict[Any, Any] = {}  # variable -> the one that takes its place
        self._tuples: dict[Any, Any] = {}
        self._views: dict[Any, Any] = {}
        self._shapes: dict[str, list[tuple[Any, Any]]] = {}

    def function(self, func: Any) -> Any:
        for block in func.body.blocks:
            for binding in block.bindings:
                self._binding(binding)
        result = substituted(func.body.body, self._replaced)
        self._drop_tuples(result)
        body = relax.SeqExpr([relax.BindingBlock(self._bindings)], result)
        relax.expr._update_type(body, func.body.ty)
        new = relax.Function(func.params, body, func.ret_ty, is_pure=func.is_pure)
        return new.with_attrs(dict(func.attrs)) if func.attrs else new

    def _binding(self, binding: Any) -> None:
        var, old = binding.var, binding.value
        value = substituted(old, self._replaced)
        if not isinstance(binding, relax.VarBinding):
            if value is not old:
                binding = relax.MatchCast(var, value, binding.ty)
            self._bindings.append(binding)
            return
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in self._tuples:
            self._replaced[var] = self._tuples[value.tuple_value].fields[value.index]
            return
        if isinstance(value, relax.Tuple) and all(isinstance(f, relax.Var) for f in value.fields):
            self._tuples[var] = value
        name = ir.op_name(value)
        if name in _KILLS:
            return  # the tensor may be shared
        if name in _VIEWS:
            value = self._with_shape(value)
            key = _key(value)
            if key in self._views:
                self._replaced[var] = self._views[key]
                return
            self._views[key] = var
        if value is not old:
            _typed(value, old)
            binding = relax.VarBinding(var, value)
        self._bindings.append(binding)

    def _with_shape(self, call: Any) -> Any:
        """The call with a variable for its symbolic shape."""
        args = [self._shape(a) if isinstance(a, relax.ShapeExpr) else a for a in call.args]
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _shape(self, shape: Any) -> Any:
        if all(isinstance(d, tirx.IntImm) for d in shape.values):
            return shape  # a constant of the virtual machine
        known = self._shapes.setdefault(str(shape), [])
        for other, var in known:
            if tvm_ffi.structural_equal(other, shape):
                return var
        var = relax.Var(f"shape_{sum(map(len, self._shapes.values()))}", shape.ty)
        self._bindings.append(relax.VarBinding(var, shape))
        known.append((shape, var))
        return var

    def _drop_tuples(self, result: Any) -> None:
        """Remove tuples whose fields alone were read."""
        used = set(operands(result))
        for binding in self._bindings:
            used.update(operands(binding.value))
        self._bindings = [b for b in self._bindings if b.var not in self._tuples or b.var in used]


def _key(call: Any) -> tuple[Any, ...]:
    """Equal for calls that make the same view."""
    return (call.op.name, *(a if isinstance(a, relax.Var) else str(a) for a in call.args))


def _typed(value: Any, old: Any) -> None:
    """Give a rebuilt value the type that it had."""
    if isinstance(value, relax.Call):
        relax.expr._update_type(value, old.ty)
