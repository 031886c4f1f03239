"""Rotations are exact or refused, and make activations easier to round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.frontend.graph import SourceModel
from llmc.frontend.untie import untied
from llmc.products import InputRounding, RoundedInputs
from llmc.quant.orthogonal import hadamard_factors, random_rotation
from llmc.quant.rotate import _Finder, rotated
from llmc.quant.runner import LayerRunner
from llmc.reference import reference_logits
from tests.frontend.tiny import save, tiny_model
from tests.quant.test_calibrate import SEQUENCES, matrices, opened, runner_of


@pytest.mark.parametrize("order", (1, 2, 12, 20, 28, 36, 44, 64, 96, 576, 704, 896, 1536))
def test_hadamard(order: int) -> None:
    """All entries of one size, rows orthogonal: powers of two, and Paley's two constructions with a power of two."""
    assert hadamard_factors(order) is not None
    matrix = random_rotation(order, 3).matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))


@pytest.mark.parametrize(("width", "keep_mean"), [(97, False), (100, False), (64, True), (33, True)])
def test_other_widths_are_orthogonal(width: int, keep_mean: bool) -> None:
    rotation = random_rotation(width, 0, keep_mean=keep_mean)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    ones = torch.ones(width, dtype=torch.float64)
    assert torch.allclose(ones @ matrix, ones) == keep_mean


def test_rotation_of_axes_and_blocks() -> None:
    rotation = random_rotation(12, 5)
    matrix = rotation.matrix()
    x = torch.randn(7, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = (x.reshape(7, 3, 12) @ matrix).reshape(7, 36)
    torch.testing.assert_close(rotation.apply(x), want)
    torch.testing.assert_close(rotation.apply(x.T, 0), want.T)
    torch.testing.assert_close(rotation.apply(want, inverse=True), x)
    assert not torch.equal(matrix, random_rotation(12, 6).matrix())


def logits(source: SourceModel) -> np.ndarray:
    return reference_logits(source, SEQUENCES[1].tolist(), "float32").logits


@pytest.mark.parametrize(
    "kind",
    (
        "llama",
        "gpt2",
        "opt",
        "gpt_oss",
        "deepseek_v3",
        "gemma",
        "cohere",
    ),
)
def test_logits_stay(kind: str, tmp_path: Path) -> None:
    """Norms with and without mean, 1 + weight, biases, experts, parallel blocks, tied and untied heads."""
    source = opened(kind, tmp_path)
    made, _, _ = rotated(untied(source), SEQUENCES)
    want = logits(source)
    assert np.abs(logits(made) - want).max() < 1e-5 * max(1, np.abs(want).max())
    assert made.weights is not None and source.weights is not None
    changed = [
        n for n in matrices(source) if not torch.equal(made.weights.load(n), source.weights.load(n).float())
    ]
    assert len(changed) >= 0.6 * len(matrices(source))  # all but what is inside of an attention block


def test_hidden_states_are_rotated(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    made, stream, notes = rotated(source, SEQUENCES)
    assert notes == ()
    taps = ("model.layers.0", "model.layers.1")
    got = reference_logits(made, SEQUENCES[1].tolist(), "float32", taps=taps).taps
    want = reference_logits(source, SEQUENCES[1].tolist(), "float32", taps=taps).taps
    for path in taps:
        assert np.abs(got[path] - want[path]).max() > 0.1 * np.abs(want[path]).max()
        np.testing.assert_allclose(stream.undone(got[path]), want[path], atol=1e-5 * np.abs(want[path]).max())


@pytest.mark.parametrize("kv_heads", (2, 4))
def test_values_are_rotated_head_by_head(kv_heads: int, tmp_path: Path) -> None:
    """With as many heads for values as for queries nothing but the attention weights tells heads apart."""
    source = open_model(str(save(tiny_model("llama", num_key_value_heads=kv_heads), tmp_path)), dtype=None)
    assert source.weights is not None
    finder = _Finder(source, LayerRunner(source, source.weights, SEQUENCES[:1]), 0).run()
    value = finder.changes["model.layers.0.self_attn.v_proj.weight"].outputs
    output = finder.changes["model.layers.0.self_attn.o_proj.weight"]
    assert value is not None and value.width == 16 and output.inputs is value
    assert output.outputs is finder.stream
    assert finder.changes["model.layers.0.mlp.up_proj.weight"].outputs is None


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("gemma3_text", "post_attention_layernorm.weight"),
        ("bloom", "word_embeddings.weight"),
        ("olmo2", "post_feedforward_layernorm.weight"),
    ],
)
def test_what_cannot_be_rotated_is_refused(kind: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=why) as caught:
        rotated(untied(opened(kind, tmp_path)), SEQUENCES)
    assert caught.value.ref == "cannot-rotate"


def test_tied_embedding(tmp_path: Path) -> None:
    """Refused as it is; with a copy the model is the same, and both tensors are there."""
    source = open_model(str(save(tiny_model("llama", tie_word_embeddings=True), tmp_path)), dtype=None)
    with pytest.raises(LlmcError, match="its embedding is also its output projection"):
        rotated(source, SEQUENCES)
    apart = untied(source)
    assert apart.untied == ("model.embed_tokens.weight", "lm_head.weight")
    assert apart.weights is not None and set(apart.untied) <= set(apart.weights.names())
    np.testing.assert_array_equal(logits(apart), logits(source))
    assert untied(apart) is apart and len(dict(source.module.named_parameters())) + 1 == len(
        dict(apart.module.named_parameters())
    )


def _error_when_rounded(source: SourceModel, bits: int) -> float:
    """Of the first layer's output with the inputs of its matrices rounded."""
    runner = runner_of(source)
    with runner.held(runner.layers[0]) as layer:
        exact = runner.probe(layer)
        names = [n for n in matrices(source) if n in layer.parameters]
        inputs = dict.fromkeys(names, InputRounding(bits))
        got = runner.probe(layer, lambda: RoundedInputs.of(layer.parameters, inputs))
        entering = runner.probe_hidden()
    return float((got - exact).norm() / (exact - entering).norm())


def test_outliers_are_spread(tmp_path: Path) -> None:
    """A few channels of the stream are very large, as in trained models; a token's scale is then theirs alone."""
    model = tiny_model("llama", hidden_size=128)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [9, 70]] *= 100
        for layer in model.model.layers:  # what the matrices make of them stays moderate
            for name in "qkv":
                getattr(layer.self_attn, f"{name}_proj").weight[:, [9, 70]] /= 100
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
                matrix.weight[:, [9, 70]] /= 100
    source = open_model(str(save(model, tmp_path)), dtype=None)
    made, _, _ = rotated(source, SEQUENCES)
    assert _error_when_rounded(made, 8) < 0.4 * _error_when_rounded(source, 8)
