"""ViewReshapes: kernels that only reshape become views; those that compute, convert or move elements stay."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from tvm import relax, tirx

from llmc import ir
from llmc.artifact import TensorSpec
from llmc.kv_plan import KVPlan
from llmc.passes.rewrite import Builder, bindings_of
from llmc.passes.step_module import StepModule
from llmc.passes.view_reshapes import ViewReshapes


def step_module(body: Any, *, dtype: str = "float32") -> StepModule:
    """`step(x [1, T, 4, 8])` with what `body(emit, x, T)` emits, legalized to TIR."""
    tokens = tirx.Var("T", "int64")
    x = relax.Var("x", ir.tensor_type([1, tokens, 4, 8], dtype))
    bb = relax.BlockBuilder()
    with bb.function("step", [x]):
        with bb.dataflow():
            out = bb.emit_output(body(bb.emit, x, tokens))
        bb.emit_func_output(out)
    with tvm.target.Target("llvm"):
        module = relax.transform.LegalizeOps()(bb.get())
    spec = TensorSpec("logits", "float32", ("R", 1))
    return StepModule(module, (), KVPlan(32, ()), (), spec)


def ops(step: StepModule) -> list[str]:
    return [ir.op_name(b.value) for b in bindings_of(step.module["step"]) if ir.op_name(b.value)]


def kernels(step: StepModule) -> set[str]:
    return {gv.name_hint for gv, f in step.module.functions.items() if isinstance(f, tirx.PrimFunc)}


def flat(emit: Any, x: Any, tokens: Any) -> Any:
    return emit(relax.op.reshape(x, relax.ShapeExpr([1, tokens, 32])))


def test_a_reshape_becomes_a_view_and_its_kernel_goes() -> None:
    """Expected: the operator itself, which the virtual machine makes a view of, with a symbolic length."""
    before = step_module(lambda emit, x, t: emit(relax.op.negative(flat(emit, x, t))))
    after = ViewReshapes()(before)
    func = before.module["step"]
    build = Builder()
    first, *rest = bindings_of(func)
    build.bind(first.var, relax.op.reshape(func.params[0], relax.ShapeExpr(ir.dims(first.var))))
    for binding in rest:
        build.keep(binding)
    expected = build.function(func.params, func.body.body, func.attrs, symbol="step")
    tvm.ir.assert_structural_equal(after.module["step"], expected)
    assert isinstance(first.var.ty.shape[1], tirx.Var)
    assert kernels(before) - kernels(after) == {"reshape"}


def test_the_result_may_be_a_view() -> None:
    after = ViewReshapes()(step_module(flat))
    assert ops(after) == ["relax.reshape"] and not kernels(after)


@pytest.mark.parametrize("axes", [[0, 2, 1, 3], [0, 1, 3, 2]])
def test_a_transpose_stays(axes: list[int]) -> None:
    before = step_module(lambda emit, x, t: emit(relax.op.permute_dims(x, axes)))
    assert ViewReshapes()(before) is before


def test_a_cast_and_a_slice_stay() -> None:
    cast = step_module(lambda emit, x, t: emit(relax.op.astype(x, "float16")))
    assert ViewReshapes()(cast) is cast
    part = step_module(lambda emit, x, t: emit(relax.op.strided_slice(x, [2], [0], [2])))
    assert ViewReshapes()(part) is part


def test_a_kernel_that_others_call_is_kept() -> None:
    """Two calls of one reshape kernel: both are views, and it goes; a computing kernel beside them stays."""

    def body(emit: Any, x: Any, t: Any) -> Any:
        y = flat(emit, emit(relax.op.negative(x)), t)
        return emit(relax.op.add(y, flat(emit, x, t)))

    before = step_module(body)
    after = ViewReshapes()(before)
    assert ops(after).count("relax.reshape") == 2
    assert kernels(before) - kernels(after) == {"reshape"}
    assert len(kernels(after)) == 2
