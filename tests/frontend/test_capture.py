"""capture: the graph of an unmodified model computes what the model does, at lengths other than the traced one."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from tvm import relax

from llmc.errors import LlmcError
from llmc.frontend.capture import capture, capture_exported
from llmc.frontend.graph import ModelGraph
from llmc.ops import ATTENTION, AttentionAttrs
from llmc.passes.relax_eval import match_any_opaque
from llmc.passes.rewrite import bindings_of
from tests.frontend.dense import run_dense
from tools.tiny_configs import VOCAB, randomize, tiny_config, tiny_model

TOLERANCE = 2e-4


def attentions(graph: ModelGraph) -> list[AttentionAttrs]:
    found = (match_any_opaque(b.value) for b in bindings_of(graph.module["main"]))
    return [AttentionAttrs.from_json(m[2]) for m in found if m is not None and m[0] == ATTENTION]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))


def largest_error(model: Any, graph: ModelGraph, lengths: tuple[int, ...] = (1, 5, 37)) -> float:
    error = 0.0
    for length in lengths:
        ids = tokens(length)
        with torch.no_grad():
            output = model(ids)
        reference = getattr(output, "logits", output)[0].float().numpy()
        error = max(
            error, float(np.abs(run_dense(graph, weights_of(model), ids[0].numpy())[0] - reference).max())
        )
    return error


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {}),
        ("mistral", {"window": 8}),
        ("gpt2", {}),
        ("gemma2", {"softcap": 50.0}),
        ("gpt_oss", {"has_sinks": True}),
        ("qwen3_moe", {}),
        ("deepseek_v3", {}),
        ("bloom", {"has_alibi": True}),
        ("mpt", {"has_alibi": True}),
        ("gptj", {}),
        ("gpt_neo", {}),
        ("openai-gpt", {}),
    ],
)
def test_logits_match_eager(model_type: str, expected: dict[str, Any]) -> None:
    """Windows are 8 tokens and the weights have unit gain, so that a lost mask or position shows."""
    model = tiny_model(model_type)
    graph = capture(model)
    blocks = attentions(graph)
    assert [b.layer for b in blocks] == list(range(model.config.num_hidden_layers))
    for name, value in expected.items():
        assert getattr(blocks[0], name) == value
    assert "llmc.mask" not in graph.as_text()
    assert {p.name for p in graph.params} == set(dict(model.named_parameters()))
    assert largest_error(model, graph) < TOLERANCE


def test_alternating_windows() -> None:
    assert [b.window for b in attentions(capture(tiny_model("gemma2")))] == [8, 0, 8, 0]


def test_chunked_attention() -> None:
    model = tiny_model("llama4_text")
    graph = capture(model)
    assert {b.chunk for b in attentions(graph)} == {0, 8}
    assert largest_error(model, graph) < TOLERANCE


def test_window_longer_than_the_traced_length() -> None:
    model = tiny_model("mistral", sliding_window=40)
    graph = capture(model)
    assert [b.window for b in attentions(graph)] == [40, 40]
    assert largest_error(model, graph, (90,)) < TOLERANCE


def test_module_path_and_positions() -> None:
    graph = capture(tiny_model("llama"))
    assert attentions(graph)[1].path == "model.layers.1.self_attn"
    assert "R.arange" not in graph.as_text()


def test_taps_are_the_layer_outputs() -> None:
    model = tiny_model("llama")
    graph = capture(model, taps=True)
    assert graph.taps == ("model.layers.0", "model.layers.1")
    ids = tokens(7)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    logits, first, _ = run_dense(graph, weights_of(model), ids[0].numpy())
    assert logits.shape == (7, VOCAB)
    assert np.abs(first - states[1][0].numpy()).max() < TOLERANCE


def test_tied_weights_appear_once() -> None:
    model = tiny_model("qwen2", tie_word_embeddings=True)
    names = [p.name for p in capture(model).params]
    assert names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in names


def test_bfloat16_keeps_rotary_math_in_float32() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    graph = capture(model)
    assert {p.dtype for p in graph.params} == {"bfloat16"}
    cosines = [b.var for b in bindings_of(graph.module["main"]) if "R.cos(" in str(b)]
    assert [str(v.ty.dtype) for v in cosines] == ["float32"]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("qwen3_moe")
    before = weights_of(model)
    ids = tokens(5)
    with torch.no_grad():
        reference = model(ids).logits
    capture(model, taps=True)
    assert all(value is before[name] for name, value in weights_of(model).items())
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference)


def test_wide_meta_model_is_captured_without_memory() -> None:
    config = tiny_config(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graph = capture(model)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"{grown} kB for 2 layers of 70B width"
    assert graph.params[1].shape == (8192, 8192)
    assert all(p.device.type == "meta" for p in model.parameters())


class Plain(torch.nn.Module):
    """A language model without transformers: learned positions from arange, one attention, a head."""

    def __init__(self, mix: Any = None, mask: str = "causal", sdpa: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 32)
        self.embed_positions = torch.nn.Embedding(64, 32)
        self.qkv = torch.nn.Linear(32, 96)
        self.head = torch.nn.Linear(32, VOCAB)
        self.mix, self.mask, self.sdpa = mix, mask, sdpa

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        at = torch.arange(length, device=input_ids.device)
        x = self.embed(input_ids) + self.embed_positions(at)[None]
        q, k, v = (y.view(1, length, 4, 8).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.mask == "causal":
            allowed = at[:, None] >= at[None, :]
        elif self.mask == "window":
            allowed = (at[:, None] >= at[None, :]) & (at[:, None] - at[None, :] < 6)
        elif self.mask == "prefix":
            allowed = (at[:, None] >= at[None, :]) | (at[None, :] < 3)
        else:
            allowed = at[:, None] >= 0 * at[None, :]
        if self.sdpa:
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        else:
            scores = (q @ k.transpose(2, 3)) / 8**0.5
            y = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
        y = x + y.transpose(1, 2).reshape(1, length, 32)
        return self.head(y if self.mix is None else self.mix(y))


@pytest.mark.parametrize("sdpa", [True, False])
@pytest.mark.parametrize(("mask", "window"), [("causal", 0), ("window", 6)])
def test_module_without_transformers(mask: str, window: int, sdpa: bool) -> None:
    model = Plain(mask=mask, sdpa=sdpa).eval()
    randomize(model)
    graph = capture(model)
    assert [b.window for b in attentions(graph)] == [window]
    assert "R.arange" not in graph.as_text()  # the positions come from the input
    assert largest_error(model, graph) < TOLERANCE


def test_infinite_fills_can_be_lowered() -> None:
    """Routers that mask scores with -inf: TVM's legalization of `full` fails for infinite values."""

    def mask_scores(x: torch.Tensor) -> torch.Tensor:
        chosen, rest = x.topk(8, -1).indices, x.topk(4, -1, largest=False).indices
        kept = torch.full_like(x, float("-inf")).scatter(-1, chosen, x.gather(-1, chosen))
        return kept.softmax(-1) + x.scatter(-1, rest, float("-inf")).softmax(-1)

    model = Plain(mix=mask_scores).eval()
    randomize(model)
    graph = capture(model)
    assert largest_error(model, graph) < TOLERANCE
    assert "R.scatter_elements" not in relax.transform.LegalizeOps()(graph.module).script()


def test_exported_program() -> None:
    model = Plain().eval()
    randomize(model)
    program = torch.export.export(
        model, (tokens(9),), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},), strict=False
    )
    graph = capture_exported(program)
    assert largest_error(model, graph) < TOLERANCE


def test_exported_program_of_fixed_length_is_refused() -> None:
    program = torch.export.export(Plain().eval(), (tokens(9),), strict=False)
    with pytest.raises(LlmcError, match="dynamic T") as refused:
        capture_exported(program)
    assert refused.value.ref == "exported-signature"


@pytest.mark.parametrize("sdpa", [True, False])
@pytest.mark.parametrize("mask", ["prefix", "none"])
def test_other_masks_are_refused(mask: str, sdpa: bool) -> None:
    with pytest.raises(LlmcError) as refused:
        capture(Plain(mask=mask, sdpa=sdpa).eval())
    assert refused.value.ref == "mask-not-understood"


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.cumsum(1),
        lambda x: x + torch.roll(x, 1, 1),
        lambda x: x.flip(1),
        lambda x: torch.cat([x[:, :1] * 0, x[:, :-1]], 1),
        lambda x: x[:, torch.arange(x.shape[1]) // 2],
        lambda x: x * x.shape[1],
        lambda x: x.transpose(1, 2).softmax(-1).transpose(1, 2),
        lambda x: torch.nn.functional.conv1d(
            x.transpose(1, 2), torch.ones(32, 1, 3), padding=1, groups=32
        ).transpose(1, 2),
        lambda x: x.sort(1).values,
    ],
    ids=["mean", "cumsum", "roll", "flip", "shift", "gather", "length", "softmax", "conv", "sort"],
)
def test_mixing_tokens_is_refused(mix: Any) -> None:
    with pytest.raises(LlmcError) as refused:
        capture(Plain(mix=mix).eval())
    assert refused.value.ref == "token-mixing-not-captured"


def test_recurrent_model_is_refused_by_name() -> None:
    with pytest.raises(LlmcError, match="Mamba") as refused:
        capture(tiny_model("mamba"))
    assert refused.value.ref == "token-mixing-not-captured"


def test_frequencies_that_change_with_the_length() -> None:
    """LongRoPE picks its frequencies by the sequence's length: captured below the switch, refused across it."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    with pytest.raises(LlmcError, match="--max-seq-len 64") as refused:
        capture(model)
    assert refused.value.ref == "length-dependent"
    graph = capture(model, max_seq_len=64)
    assert largest_error(model, graph, (5, 64)) < TOLERANCE


def test_frequencies_that_grow_with_the_length() -> None:
    """Dynamic NTK recomputes its frequencies beyond the original length: captured below it, refused beyond."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=64)
    with torch.no_grad():
        model(tokens(100))  # leaves the grown frequencies behind
    assert largest_error(model, capture(model), (5, 64)) < TOLERANCE
    assert model.model.rotary_emb.rope_type == "dynamic"
    model.config.max_position_embeddings = 128
    with pytest.raises(LlmcError, match=r"rotary_emb .*--max-seq-len 64") as refused:
        capture(model)
    assert refused.value.ref == "length-dependent"


class Branching(Plain):
    """Plain with a decision that capture has to refuse and name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.how == "constant":
            list(range(input_ids.shape[1]))
        if self.how == "values":
            for _ in (input_ids[0] > 3).nonzero():
                pass
        logits = super().forward(input_ids)
        return logits * 2 if self.how == "branch" and input_ids.shape[1] > 40 else logits


@pytest.mark.parametrize(
    ("how", "ref", "says"),
    [
        ("constant", "length-dependent", r"Branching uses the length .*\(test_capture.py:\d+, forward\)"),
        ("branch", "length-dependent", r"lengths outside of 2 to 40 \(test_capture.py:\d+, forward\)"),
        ("values", "data-dependent", r"Branching.* values of a tensor .*\(test_capture.py:\d+, forward\)"),
    ],
)
def test_refusals_name_the_line(how: str, ref: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LlmcError, match=says) as refused:
        capture(Branching(how).eval())
    assert refused.value.ref == ref
    assert capsys.readouterr() == ("", "")
