"""FoldWeights: what is computed from weights alone becomes a parameter; what reads tokens, or would be stored twice, stays."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from tvm import relax, tirx

from llmc import ir
from llmc.errors import LlmcError
from llmc.packing import pack_sources
from llmc.passes import order
from llmc.passes.fold_weights import FoldWeights
from llmc.passes.quantize_weights import QuantizeWeights
from llmc.passes.rewrite import bindings_of, operands
from llmc.passes.step_module import LoweredGraph
from llmc.pipeline.lower import capture_graph
from llmc.spec import CompileSpec
from llmc.targets.backend import get
from tests.passes.graphs import Model, assert_same, linear
from tools.tiny_configs import decoder_types, tiny_config

K = 8


def model(body, *, dtype="float32", params=()):
    """`body(m, emit, x, *weights)`: x [1, T, K] is computed from tokens; `params` are (name, *shape)."""
    m = Model(dtype)
    table = m.param("table", 50, K)
    weights = [m.param(name, *shape) for name, *shape in params]

    def whole(emit):
        rows = relax.ShapeExpr([1, m.tokens, K])
        x = emit(relax.op.reshape(emit(relax.op.take(table, m.ids, axis=0)), rows))
        return body(m, emit, x, *weights)

    return m.build(whole)


def plus_one(emit, w):
    wide = emit(relax.op.astype(w, "float32"))
    return emit(relax.op.astype(emit(relax.op.add(wide, relax.const(1.0, "float32"))), "bfloat16"))


def test_a_norms_weight_is_added_to_when_it_is_packed():
    def before(m, emit, x, w):
        return emit(relax.op.multiply(x, plus_one(emit, w)))

    def after(m, emit, x, w, folded):
        return emit(relax.op.multiply(x, folded))

    lowered = model(before, dtype="bfloat16", params=[("norm.weight", K)])
    found = FoldWeights()(lowered)
    expected = model(after, dtype="bfloat16", params=[("norm.weight", K), ("norm_weight_folded", K)])
    assert_same(found, expected)
    made = found.params[-1]
    assert (made.name, made.sources, made.dtype, made.shape) == (
        "norm.weight.folded",
        ("norm.weight",),
        "bfloat16",
        (K,),
    )
    assert made.layout_text == "rows, of astype add astype"
    # the checkpoint may have another dtype; every step rounds as the compiled operators would
    source = torch.linspace(-1, 1, K, dtype=torch.float64)
    packed = pack_sources(made, {"norm.weight": source}.__getitem__)
    assert packed.dtype == np.uint16
    exact = (source.to(torch.bfloat16).float() + 1).to(torch.bfloat16)
    np.testing.assert_array_equal(packed.view(ml_dtypes.bfloat16).astype(np.float32), exact.float().numpy())


def test_several_weights_become_one_parameter():
    """The longest expression is folded, and a part of it that is read by others too."""

    def before(m, emit, x, a, b):
        scaled = emit(relax.op.multiply(a, relax.const(3.0, "float32")))
        both = emit(relax.op.concat([scaled, emit(relax.op.exp(b))], axis=0))
        y = emit(relax.op.matmul(x, emit(relax.op.permute_dims(both))))
        return emit(relax.op.matmul(emit(relax.op.matmul(y, both)), scaled))

    def after(m, emit, x, a, b, scaled, both, turned):
        y = emit(relax.op.matmul(x, turned))
        return emit(relax.op.matmul(emit(relax.op.matmul(y, both)), scaled))

    weights = [("a", K, K), ("b", 2, K)]
    found = FoldWeights()(model(before, params=weights))
    folded = [("a_folded", K, K), ("a_folded_2", K + 2, K), ("a_folded_3", K, K + 2)]
    assert_same(found, model(after, params=weights + folded))
    tensors = {name: torch.randn(shape) for name, *shape in weights}
    want = torch.cat([tensors["a"] * 3, tensors["b"].exp()])
    for param, value in zip(found.params[-3:], (tensors["a"] * 3, want, want.T), strict=True):
        np.testing.assert_allclose(pack_sources(param, tensors.__getitem__), value.numpy(), rtol=1e-6)
    assert [p.sources for p in found.params[-3:]] == [("a",), ("a", "b"), ("a", "b")]


def test_what_reads_tokens_or_has_a_symbolic_shape_stays():
    def tokens(m, emit, x, w):
        return emit(relax.op.multiply(emit(relax.op.add(x, w)), w))

    def symbolic(m, emit, x, w):
        rows = relax.ShapeExpr([1, m.tokens, K])
        return emit(relax.op.multiply(x, emit(relax.op.broadcast_to(w, rows))))

    def positions(m, emit, x, w):
        at = emit(relax.op.astype(m.positions, "float32"))
        at = emit(relax.op.reshape(at, relax.ShapeExpr([1, m.tokens, 1])))
        return emit(relax.op.multiply(x, emit(relax.op.multiply(at, w))))

    def constants(m, emit, x, w):
        ones = emit(relax.op.ones([K], "float32"))
        return emit(relax.op.multiply(emit(relax.op.multiply(x, ones)), w))

    for body in (tokens, symbolic, positions, constants):
        before = model(body, params=[("w", K)])
        assert FoldWeights()(before) is before


def test_a_symbolic_length_beside_it_is_kept():
    found = FoldWeights()(
        model(lambda m, emit, x, w: emit(relax.op.multiply(x, emit(relax.op.negative(w)))), params=[("w", K)])
    )
    (last,) = [b for b in bindings_of(found.module["main"]) if ir.is_op(b.value, "relax.multiply")]
    assert isinstance(last.var.ty.shape[1], tirx.Var)


@pytest.mark.parametrize("shared", [False, True])
def test_a_large_table_is_not_stored_twice(shared):
    """2 MB: turned round once if nothing else reads it; two copies would be worse than a transpose per step."""

    def body(m, emit, x, w):
        y = linear(emit, x, w)
        return emit(relax.op.matmul(y, w)) if shared else y

    before = model(body, params=[("w", 1 << 16, K)])
    found = FoldWeights()(before)
    assert (found is before) == shared
    if not shared:
        assert found.params[-1].shape == (K, 1 << 16)


def test_an_operator_without_a_definition_stays():
    """The evaluator has no einsum; the graph computes it as before."""
    before = model(
        lambda m, emit, x, w: emit(relax.op.multiply(x, emit(relax.op.einsum([w, w], "i,i->i")))),
        params=[("w", K)],
    )
    assert FoldWeights()(before) is before


def test_the_plan_is_kept():
    """A computed parameter that is not what was planned is a bug, not a wrong artifact."""
    found = FoldWeights()(
        model(lambda m, emit, x, w: emit(relax.op.multiply(x, emit(relax.op.negative(w)))), params=[("w", K)])
    )
    with pytest.raises(AssertionError, match="planned"):
        pack_sources(replace(found.params[-1], shape=(K + 1,)), lambda name: torch.ones(K))


def lowered(architecture: str):
    """(source model, graph after all passes on it) of a tiny random model in bfloat16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), attn_implementation="eager").eval()
    spec = CompileSpec.from_json({"model": "tiny", "dtype": "bf16"})
    source, graph = capture_graph(model, spec)
    low = LoweredGraph.from_model(graph)
    for _, run in order.graph_phase(get("cpu/x86-64-v3")[1], QuantizeWeights.of(spec)):
        low = run(low)
    return source, low


def left_over(low: LoweredGraph) -> list[str]:
    """Operators of Relax, with known shapes, all of whose operands come from parameters alone; by another way than the pass."""
    func = low.module["main"]
    known, found = set(func.params[2:]), []
    for binding in bindings_of(func):
        value = binding.value
        reads = list(operands(value))
        symbolic = any(isinstance(d, tirx.Var) for d in getattr(binding.var.ty, "shape", None) or ())
        if reads and not symbolic and all(var in known for var in reads):
            known.add(binding.var)
            found += [ir.op_name(value)] if ir.op_name(value) else []
    return found


# architecture -> an operator among those that it applies to weights alone
FOLDED = {
    "afmoe": "astype",  # the bias of its router
    "apertus": "nn.softplus",  # parameters of its activation
    "beam": "reshape",
    "diffllama": "exp",  # the weight of its second softmax, from four vectors
    "ernie4_5_moe": "reshape",
    "laguna": "astype",
    "llama": None,
    "gemma2": None,
}


@pytest.mark.parametrize(
    "architecture",
    [a if a in ("apertus", "diffllama") else pytest.param(a, marks=pytest.mark.slow) for a in FOLDED],
)
def test_what_models_compute_of_weights(architecture: str) -> None:
    source, low = lowered(architecture)
    made = [p for p in low.params if p.expression is not None]
    wanted = FOLDED[architecture]
    assert bool(made) == bool(wanted)
    assert wanted is None or any(wanted in p.expression.steps for p in made)
    assert left_over(low) == []
    for param in made:
        packed = pack_sources(param, source.weights.load)
        if param.expression.steps == ("nn.softplus",):
            got = packed.view(ml_dtypes.bfloat16).astype(np.float32)
            want = torch.nn.functional.softplus(source.weights.load(param.source).to(torch.bfloat16))
            np.testing.assert_allclose(got, want.float().numpy(), rtol=2**-7)


@pytest.mark.slow(reason="every architecture that compiles, a second or two each")
@pytest.mark.parametrize("architecture", decoder_types())
def test_no_architecture_computes_on_weights_alone(architecture: str) -> None:
    """The guarantee: with FoldWeights, no step repeats what depends on no token."""
    try:
        _, low = lowered(architecture)
    except LlmcError as error:
        pytest.skip(f"refused when it is captured: {error.ref}")
    assert left_over(low) == []
