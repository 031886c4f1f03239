"""Compiled logits against transformers in float32: prefill, decode through the paged cache, ragged batches.

Tiny random models whose weights are large enough that a wrong mask, position or head shows; windows are 8 tokens.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import llmc
from llmc.pipeline import compile_model
from tests.shared import TINY
from tools.tiny_configs import VOCAB, tiny_model

pytestmark = pytest.mark.e2e

# each has something that the others lack: windows, biases, norms, rotations, ALiBi, fused or shared weights, experts, latents
ARCHITECTURES = """
llama mistral qwen3 gemma2 gemma3_text phi phi3 gpt2 gpt_neox gptj opt bloom falcon cohere2 qwen3_moe gpt_oss deepseek_v3
""".split()
# the same parts in other arrangements; tools/coverage.py compiles every architecture
MORE = """
qwen2 gemma mpt stablelm starcoder2 olmo2 granite glm4 smollm3 nemotron mixtral olmoe minicpm3 exaone4 ernie4_5 llama4_text
phimoe deepseek_v2 youtu
""".split()
TOLERANCE = 2e-4


def compiled_tiny(architecture: str, request: pytest.FixtureRequest) -> llmc.Model:
    if architecture == "llama":
        return llmc.load(request.getfixturevalue("tiny_llama"))
    output = request.getfixturevalue("tmp_path") / "artifact"
    compile_model(tiny_model(architecture), output, **TINY)
    return llmc.load(output)


def reference(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


@pytest.mark.parametrize(
    "architecture", [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_logits_match_transformers(architecture: str, request: pytest.FixtureRequest) -> None:
    model = tiny_model(architecture)
    compiled = compiled_tiny(architecture, request)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, 53).tolist()
    other = rng.integers(0, VOCAB, 30).tolist()
    expected, expected_other = reference(model, ids), reference(model, other)
    # 37 tokens in one step, then 16 through decode; then both sequences in one batch
    got = compiled.logits(ids, prefill=37)
    assert np.abs(got - expected).max() <= TOLERANCE
    pair = compiled.logits_batch([ids, other], prefill=[40, 17])
    assert np.abs(pair[0] - expected).max() <= TOLERANCE
    assert np.abs(pair[1] - expected_other).max() <= TOLERANCE
