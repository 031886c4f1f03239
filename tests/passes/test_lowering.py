"""Before and Expected of the passes that choose kernels, over a symbolic number of tokens; what is not theirs stays."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from tvm import relax, tirx

from llmc import ir
from llmc.artifact import TensorSpec
from llmc.kv_plan import KVPlan
from llmc.ops import EXPERT_LINEAR, LINEAR, NORM, ExpertLinearAttrs, LinearAttrs, NormAttrs
from llmc.passes.estimate_costs import EstimateCosts
from llmc.passes.fuse_gate_up import FuseGateUp
from llmc.passes.lower_embedding import LowerEmbedding
from llmc.passes.lower_experts import LowerExperts
from llmc.passes.lower_linear import LowerLinear
from llmc.passes.lower_norm import LowerNorm
from llmc.passes.order import BoundSymbols
from llmc.passes.step_module import LoweredGraph, StepModule
from llmc.passes.widen_logits import WidenLogits
from llmc.schedules.costs import COST
from llmc.targets.backend import get
from tests.passes.graphs import Model, assert_same, linear

CAPS = get("cpu/x86-64-v3")[1]
K, N = 32, 48


def model(body: Any, *params: tuple[Any, ...], dtype: str = "float32") -> LoweredGraph:
    """`body(m, emit, x, *weights)`: x [1, T, K] is computed from tokens."""
    m = Model(dtype)
    table = m.param("table", 50, K)
    weights = [m.param(name, *shape) for name, *shape in params]

    def whole(emit: Any) -> Any:
        rows = relax.ShapeExpr([1, m.tokens, K])
        x = emit(relax.op.reshape(emit(relax.op.take(table, m.ids, axis=0)), rows))
        return body(m, emit, x, *weights)

    return m.build(whole)


def kernel(after: LoweredGraph, name: str, args: list[Any], shape: list[Any], dtype: str = "float32") -> Any:
    """The call that a lowering pass is to make; the kernel of that name must be there."""
    return relax.call_tir(after.module.get_global_var(name), args, ir.tensor_type(shape, dtype))


def shape_of(after: LoweredGraph, name: str) -> tuple[int, ...]:
    return next(p.shape for p in after.params if p.name == name)


def test_gate_and_up() -> None:
    def before(m: Any, emit: Any, x: Any, gate: Any, up: Any) -> Any:
        return emit(relax.op.multiply(emit(relax.op.nn.silu(linear(emit, x, gate))), linear(emit, x, up)))

    def expected(m: Any, emit: Any, x: Any, gate: Any, up: Any, both: Any) -> Any:
        out = ir.tensor_type([1, m.tokens, N], "float32")
        attrs = LinearAttrs("silu", gated=True).to_json()
        return emit(ir.opaque_call(LINEAR, [x, both], attrs, out))

    two = [("gate.weight", N, K), ("up.weight", N, K)]
    after = FuseGateUp()(model(before, *two))
    assert_same(after, model(expected, *two, ("both", 2 * N, K)))


def test_linear() -> None:
    def before(m: Any, emit: Any, x: Any, w: Any, b: Any) -> Any:
        return emit(relax.op.add(linear(emit, x, w), b))

    weights = [("w", N, K), ("b", N)]
    after = LowerLinear(CAPS)(model(before, *weights))
    packed = after.params[-1]
    assert packed.source == "w" and packed.layout.startswith("blocked(")

    def expected(m: Any, emit: Any, x: Any, w: Any, b: Any, stored: Any) -> Any:
        return emit(kernel(after, f"linear_{N}_{K}", [x, stored, b], [1, m.tokens, N]))

    assert_same(after, model(expected, *weights, ("packed", *packed.shape)))


def test_norm() -> None:
    attrs = NormAttrs(1e-5, has_weight=True)

    def before(m: Any, emit: Any, x: Any, w: Any) -> Any:
        return emit(ir.opaque_call(NORM, [x, w], attrs.to_json(), x.ty))

    after = LowerNorm(CAPS)(model(before, ("w", K)))

    def expected(m: Any, emit: Any, x: Any, w: Any) -> Any:
        return emit(kernel(after, f"rms_norm_{K}", [x, w], [1, m.tokens, K]))

    assert_same(after, model(expected, ("w", K)))


def test_norm_of_another_name_stays() -> None:
    before = model(lambda m, emit, x, w: emit(relax.op.multiply(x, w)), ("w", K))
    assert LowerNorm(CAPS)(before) is before
    assert LowerExperts(CAPS)(before) is before


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed: bool) -> None:
    shape = (4, K, N) if transposed else (4, N, K)
    attrs = ExpertLinearAttrs(transposed=transposed).to_json()

    def both(m: Any, emit: Any, x: Any, weight: Any, call: Any) -> Any:
        rows = emit(relax.op.reshape(x, relax.ShapeExpr([m.tokens, K])))
        ids = emit(relax.op.astype(m.ids, "int64"))
        return call(m, emit, rows, ids, weight)

    def opaque(m: Any, emit: Any, rows: Any, ids: Any, weight: Any) -> Any:
        out = ir.tensor_type([m.tokens, N], "float32")
        return emit(ir.opaque_call(EXPERT_LINEAR, [rows, ids, weight], attrs, out))

    after = LowerExperts(CAPS)(model(lambda m, e, x, w: both(m, e, x, w, opaque), ("w", *shape)))
    packed = after.params[-1]
    assert packed.transposed == transposed and len(packed.shape) == 5

    def lowered(m: Any, emit: Any, rows: Any, ids: Any, weight: Any) -> Any:
        return emit(kernel(after, f"expert_linear_{N}_{K}", [rows, ids, weight], [m.tokens, N]))

    expected = model(lambda m, e, x, w, p: both(m, e, x, p, lowered), ("w", *shape), ("p", *packed.shape))
    assert_same(after, expected)


def test_embedding() -> None:
    """The table of `model` itself; a gather along another axis is none."""
    after = LowerEmbedding(CAPS)(model(lambda m, emit, x: emit(relax.op.negative(x))))
    m = Model()
    table = m.param("table", 50, K)

    def expected(emit: Any) -> Any:
        rows = emit(kernel(after, "embedding", [m.ids, table], [m.tokens, K]))
        return emit(relax.op.negative(emit(relax.op.reshape(rows, relax.ShapeExpr([1, m.tokens, K])))))

    assert_same(after, m.build(expected))
    other = Model()
    columns = other.param("columns", K, 50)
    near = other.build(lambda emit: emit(relax.op.take(columns, other.ids, axis=1)))
    tvm.ir.assert_structural_equal(LowerEmbedding(CAPS)(near).module["main"], near.module["main"])


def test_logits_are_widened() -> None:
    def before(m: Any, emit: Any, x: Any, w: Any) -> Any:
        return linear(emit, x, w)

    def expected(m: Any, emit: Any, x: Any, w: Any) -> Any:
        return emit(relax.op.astype(linear(emit, x, w), "float32"))

    weight = ("w", N, K)
    after = WidenLogits()(model(before, weight, dtype="bfloat16"))
    assert_same(after, model(expected, weight, dtype="bfloat16"))


def test_bounds_of_symbols() -> None:
    """decode has one token and one row per sequence; sizes that a function does not have are left out."""
    tokens, batch, rows = (tirx.Var(name, "int64") for name in "TBR")
    functions = {}
    for name, sizes in (("step", (tokens, batch, rows)), ("decode", (tokens, batch)), ("other", (tokens,))):
        params = [relax.Var(f"a{i}", ir.tensor_type([s], "int32")) for i, s in enumerate(sizes)]
        bb = relax.BlockBuilder()
        with bb.function(name, params):
            bb.emit_func_output(params[0])
        functions[name] = bb.get()[name]
    step = StepModule(
        tvm.IRModule(functions), (), KVPlan(32, ()), (), TensorSpec("logits", "float32", ("R", 1))
    )
    after = BoundSymbols({"T": 512, "B": 4, "R": 512})(step).module

    def bounds(name: str) -> dict[str, int] | None:
        found = (after[name].attrs or {}).get("tir_var_upper_bound")
        return None if found is None else {str(k): int(v) for k, v in found.items()}

    assert bounds("step") == {"T": 512, "B": 4, "R": 512}
    assert bounds("decode") == {"T": 4, "B": 4}
    assert bounds("other") is None
    for name in functions:  # nothing else is changed
        tvm.ir.assert_structural_equal(
            after[name].without_attr("tir_var_upper_bound"), functions[name].without_attr("none")
        )


def test_costs_are_noted_once() -> None:
    lowered = model(lambda m, emit, x: emit(relax.op.exp(x)))
    with tvm.target.Target("llvm"):
        module = relax.transform.LegalizeOps()(lowered.module)
    step = StepModule(module, (), KVPlan(32, ()), (), TensorSpec("logits", "float32", ("R", 1)))
    once = EstimateCosts()(step)
    noted = {
        g.name_hint: f.attrs[COST] for g, f in once.module.functions.items() if isinstance(f, tirx.PrimFunc)
    }
    assert len(noted) == len(module.functions) - 1 and any("32*" in text for text in noted.values())
    tvm.ir.assert_structural_equal(EstimateCosts()(once).module, once.module)
