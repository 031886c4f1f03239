"""MakeStepFunction and SpecializeDecode, written out: main -> step -> decode of one attention layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tvm
from tvm import relax, tirx

from llmc import ir
from llmc.ops import AttentionAttrs
from llmc.passes import order
from llmc.passes.plan_kv_cache import PlanKVCache
from llmc.passes.rewrite import Builder
from llmc.passes.step_module import StepModule
from llmc.schedules.attention import partial_shape
from llmc.targets.backend import get
from tests.passes.graphs import attention_model

WIDTH, HEADS, KV_HEADS, DIM, VOCAB, PAGE = 64, 4, 2, 16, 50, 16


def stepped(disabled: tuple[str, ...] = (), **options: Any) -> StepModule:
    """The step function of a small model as MakeStepFunction leaves it."""
    _, caps = get("cpu")
    graph = attention_model(**options)
    for _, graph_pass in order.graph_phase(caps, disabled=disabled):
        graph = graph_pass(graph)
    return order.make_step(caps, PlanKVCache(page_size=PAGE, kv_dtype=None, max_seq_len=64)(graph))(graph)


def decoded(step: StepModule, disabled: tuple[str, ...] = ()) -> StepModule:
    backend, caps = get("cpu")
    bounds = {"T": 64, "B": 4, "R": 64}
    for name, step_pass in order.step_phase(caps, backend.tvm_target(caps), bounds, disabled):
        step = step_pass(step)
        if name == "SpecializeDecode":
            break
    return step


def f32(*shape: Any) -> Any:
    return ir.tensor_type(list(shape), "float32")


@dataclass
class Expected:
    """Writes the function that is expected, with the kernels of `module`."""

    module: Any

    def __post_init__(self) -> None:
        self.t, self.b, self.r, self.w = (tirx.Var(n, "int64") for n in "TBRW")
        pages = tirx.Var("P0", "int64")
        shapes = {
            "input_ids": [self.t],
            "positions": [self.t],
            "query_start": [self.b + 1],
            "context_len": [self.b],
            "block_table": [self.b, self.w],
            "slot": [self.t],
            "logit_rows": [self.r],
        }
        self.inputs = {n: relax.Var(n, ir.tensor_type(s, "int32")) for n, s in shapes.items()}
        self.pool = f32(pages, 1, KV_HEADS, DIM, PAGE)
        self.pools = relax.Var("pools", relax.TupleType([self.pool, self.pool]))
        self.build = Builder()

    def call(self, kernel: str, args: list[Any], out: Any) -> Any:
        gvar = self.module.get_global_var(kernel)
        return self.build.emit(relax.call_tir(gvar, relax.Tuple(args), out), "y")

    def in_place(self, kernel: str, args: list[Any], indices: list[int], out: list[Any]) -> list[Any]:
        gvar = self.module.get_global_var(kernel)
        both = self.build.emit(relax.op.call_tir_inplace(gvar, relax.Tuple(args), indices, out), "y")
        return [self.build.emit(relax.TupleGetItem(both, i), "part") for i in range(len(out))]

    def get(self, of: Any, i: int) -> Any:
        return self.build.emit(relax.TupleGetItem(of, i), "item")

    def reshape(self, x: Any, *shape: Any) -> Any:
        return self.build.emit(relax.op.reshape(x, relax.ShapeExpr(list(shape))), "reshaped")

    def function(self, weights: list[Any], body: Callable[..., Any]) -> Any:
        """`body(weights, pools)` gives the logits."""
        params = relax.Var("params", relax.TupleType(weights))
        ws = [self.get(params, i) for i in range(len(weights))]
        pools = [self.get(self.pools, i) for i in range(2)]
        logits = body(*ws, *pools)
        args = [*self.inputs.values(), self.pools, params]
        return self.build.function(args, logits, None, symbol="step")


def assert_function(module: Any, name: str, expected: Any) -> None:
    """Equal but for aliases, and for the attributes of the function (its name, and the bounds of sizes)."""
    func = module[name]
    again = Builder()
    for block in func.body.blocks:
        for binding in block.bindings:
            again.keep(binding)
    plain = again.function(func.params, func.body.body, None, symbol="step")
    tvm.ir.assert_structural_equal(canonical(module, plain), canonical(module, expected))


def canonical(module: Any, func: Any) -> Any:
    """`func` without aliases."""
    kernels = {g: module[g] for g in module.get_global_vars() if g.name_hint not in ("step", "decode")}
    return relax.transform.CanonicalizeBindings()(tvm.IRModule({**kernels, relax.GlobalVar("f"): func}))["f"]


def embedded(e: Expected, embed: Any) -> Any:
    y = e.call("embedding", [e.inputs["input_ids"], embed], f32(e.t, WIDTH))
    return e.reshape(y, 1, e.t, WIDTH)


def head(e: Expected, x: Any, embed: Any) -> Any:
    """Only the rows asked for go through the output projection."""
    rows = e.call("gather_rows", [x, e.inputs["logit_rows"]], f32(1, e.r, WIDTH))
    return e.reshape(e.call("linear_50_64", [rows, embed], f32(1, e.r, VOCAB)), e.r, VOCAB)


PACKED = [f32(2, 64, WIDTH, 1), f32(1, 64, WIDTH, 1), f32(1, 64, WIDTH, 1)]
LAYER = relax.prim_value(tirx.IntImm("int64", 0))


@pytest.fixture(scope="module")
def step() -> StepModule:
    return stepped(layers=1)


def attention_inputs(e: Expected) -> list[Any]:
    return [e.inputs[n] for n in ("query_start", "context_len", "block_table")]


def test_step_appends_reads_pages_and_gathers_rows(step):
    """Before: o = attention(heads(qkv), heads(qkv), heads(qkv)); logits = head(h), for every token."""
    e = Expected(step.module)

    def body(qkv_w, o_w, embed, k_pool, v_pool):
        x = embedded(e, embed)
        qkv = e.call("linear_128_64", [x, qkv_w], f32(1, e.t, 128))
        q, k_pool, v_pool = e.in_place(
            "rope_append_0",
            [qkv, qkv, qkv, e.inputs["slot"], k_pool, v_pool, LAYER],
            [-1, 4, 5],
            [f32(1, e.t, HEADS, DIM), e.pool, e.pool],
        )
        a = e.call(
            "attention_prefill_0",
            [q, k_pool, v_pool, *attention_inputs(e), LAYER],
            f32(1, e.t, HEADS, DIM),
        )
        a = e.reshape(a, 1, e.t, WIDTH)
        return head(e, e.call("linear_add_64_64", [a, o_w, x], f32(1, e.t, WIDTH)), embed)

    assert_function(step.module, "step", e.function(PACKED, body))


def test_decode_rotates_and_splits_the_context_in_one_kernel(step):
    both = decoded(step)
    e = Expected(both.module)
    (config,) = dict(both.attention).values()

    def body(qkv_w, o_w, embed, k_pool, v_pool):
        x = embedded(e, embed)
        qkv = e.call("linear_128_64", [x, qkv_w], f32(1, e.t, 128))
        gvar = both.module.get_global_var("attention_decode_0")
        args = [qkv, qkv, qkv, e.inputs["slot"], k_pool, v_pool, *attention_inputs(e), LAYER]
        out = [f32(1, e.t, HEADS, DIM), f32(e.t, *partial_shape(config)), e.pool, e.pool]
        four = e.build.emit(relax.op.call_tir_inplace(gvar, relax.Tuple(args), [-1, -1, 4, 5], out), "split")
        a = e.reshape(e.get(four, 0), 1, e.t, WIDTH)
        return head(e, e.call("linear_add_64_64", [a, o_w, x], f32(1, e.t, WIDTH)), embed)

    assert_function(both.module, "decode", e.function(PACKED, body))


def test_decode_without_fusion_keeps_the_rotating_kernel(step):
    both = decoded(step, disabled=("SpecializeDecode",))
    e = Expected(both.module)
    (config,) = dict(both.attention).values()

    def body(qkv_w, o_w, embed, k_pool, v_pool):
        x = embedded(e, embed)
        qkv = e.call("linear_128_64", [x, qkv_w], f32(1, e.t, 128))
        q, k_pool, v_pool = e.in_place(
            "rope_append_0",
            [qkv, qkv, qkv, e.inputs["slot"], k_pool, v_pool, LAYER],
            [-1, 4, 5],
            [f32(1, e.t, HEADS, DIM), e.pool, e.pool],
        )
        out = [f32(1, e.t, HEADS, DIM), f32(e.t, *partial_shape(config))]
        pair = e.call("attention_decode_0", [q, k_pool, v_pool, *attention_inputs(e), LAYER], out)
        a = e.reshape(e.get(pair, 0), 1, e.t, WIDTH)
        return head(e, e.call("linear_add_64_64", [a, o_w, x], f32(1, e.t, WIDTH)), embed)

    assert_function(both.module, "decode", e.function(PACKED, body))


def test_a_layer_that_reads_anothers_pages_does_not_append():
    """Near miss: the second layer has a query of its own and no keys."""
    step = stepped(layers=2, share={1: 0}, attrs=lambda i: AttentionAttrs(layer=i, scale=0.25))
    names = [
        b.value.args[0].name_hint
        for b in step.module["step"].body.blocks[0].bindings
        if isinstance(b.value, relax.Call) and isinstance(b.value.args[0], relax.GlobalVar)
    ]
    assert [n for n in names if n.startswith(("rope", "kv", "attention"))] == [
        "rope_append_0",
        "attention_prefill_0",
        "rope_0",
        "attention_prefill_0",
    ]
