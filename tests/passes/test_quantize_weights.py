"""QuantizeWeights: which weights are quantized, and that the lowering passes follow."""

from __future__ import annotations

import pytest
from tvm import relax

from llmc.errors import LlmcError
from llmc.passes.lower_embedding import LowerEmbedding
from llmc.passes.lower_linear import LowerLinear
from llmc.passes.quantize_weights import QuantizeWeights
from llmc.quant.schemes import QuantRules
from llmc.spec import CompileSpec
from llmc.targets.backend import get
from tests.passes.graphs import Model, linear
from tests.passes.test_lower_linear import called

CAPS = get("cpu/x86-64-v3")[1]


def model(*, tied: bool = False, hidden: int = 64):
    """Embedding, two linear layers, a narrow one, a head with a softcap."""
    m = Model()
    table = m.param("embed.weight", 96, hidden)
    up, down = m.param("l0.up.weight", 128, hidden), m.param("l0.down.weight", hidden, 128)
    router, norm = m.param("l0.router.weight", 4, hidden), m.param("norm.weight", hidden)
    head = table if tied else m.param("head.weight", 96, hidden)

    def body(emit):
        x = emit(relax.op.take(table, m.ids, axis=0))
        x = emit(relax.op.multiply(x, norm))
        y = linear(emit, linear(emit, x, up), down)
        route = emit(relax.op.sum(linear(emit, x, router), axis=[-1], keepdims=True))
        logits = linear(emit, emit(relax.op.multiply(y, route)), head)
        return emit(relax.op.tanh(logits))

    return m.build(body)


def schemes(lowered):
    return {p.name.removesuffix(".weight"): p.scheme for p in lowered.params if p.scheme}


def test_linear_weights_and_head():
    found = schemes(QuantizeWeights(QuantRules("q4g32"), head="q8")(model()))
    assert found == {"l0.up": "q4g32", "l0.down": "q4g32", "head": "q8"}


def test_nothing_asked_for_nothing_changed():
    graph = model()
    assert QuantizeWeights(QuantRules())(graph) is graph


def test_patterns_win_also_over_head_and_small_weights():
    rules = QuantRules("q4g32", (("*.down", "q6g64"), ("head", "none"), ("router", "q8")))
    found = schemes(QuantizeWeights(rules, head="q8", embedding="q8")(model()))
    assert found == {"l0.up": "q4g32", "l0.down": "q6g64", "l0.router": "q8", "embed": "q8"}


def test_tied_embedding_follows_the_head():
    found = schemes(QuantizeWeights(QuantRules("q4g32"), head="q8", embedding="q6g32")(model(tied=True)))
    assert found["embed"] == "q8"


def test_lowered_to_kernels_on_bytes():
    for tied in (False, True):
        marked = QuantizeWeights(QuantRules("q4g32"), head="q8", embedding="q8")(model(tied=tied))
        out = LowerEmbedding(CAPS)(LowerLinear(CAPS)(marked))
        relax.analysis.well_formed(out.module)
        names = called(out)
        assert "linear_q4g32_128_64" in names
        assert "linear_q8_96_64" in names
        assert names[0] == "embedding"
        packed = {p.name: p for p in out.params if p.layout.startswith("quant(")}
        assert packed["embed.weight"].layout == "quant(q8,n=16,of=96x64)"
        assert packed["l0.up.weight"].dtype == "uint8"
        # a tied table is stored once: the embedding reads the head's
        embedding = sum(p.layout.startswith("quant(q8") for p in out.params)
        assert embedding == (1 if tied else 2)


def test_mistyped_pattern_is_refused():
    with pytest.raises(LlmcError, match="donw_proj"):
        QuantizeWeights(QuantRules("q8", (("donw_proj", "q4g32"),)))(model())


def test_norm_cannot_be_quantized():
    assert "norm" not in schemes(QuantizeWeights(QuantRules("q8", (("*", "q8"),)))(model()))


def test_activation_schemes():
    out = schemes(QuantizeWeights(QuantRules("w4a8"), head="w8a8")(model()))
    assert set(out.values()) == {"w4a8", "w8a8"}


def test_stored_weights_get_int8_activations_if_asked_for():
    """The same codes and scales; by default a stored weight is multiplied with floating-point activations."""
    stored = {"l0.up.weight": "q8"}
    for default, expected in (("none", "q8"), ("w8a8", "w8a8"), ("q4g32", "q8")):
        found = schemes(QuantizeWeights(QuantRules(default), stored=stored)(model()))
        assert found["l0.up"] == expected


def test_a_copy_of_the_head_is_stored_like_it() -> None:
    """An embedding that was tied, and was untied for a rotation; one of its own is left alone."""
    spec = CompileSpec("m", quant="q4g32")
    assert QuantizeWeights.of(spec).embedding is None
    assert QuantizeWeights.of(spec, untied=True).embedding == "q8"
    assert QuantizeWeights.of(CompileSpec("m", quant="fp8"), untied=True).embedding == "fp8"
    # nothing is multiplied with an embedding: the same weights without rounded activations
    assert QuantizeWeights.of(CompileSpec("m", quant="w8a8"), untied=True).embedding == "q8"
    asked = CompileSpec("m", quant="q4g32", quant_embedding="q4g64")
    assert QuantizeWeights.of(asked, untied=True).embedding == "q4g64"
