"""verify passes what is right, and says what it measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.spec import Verify
from llmc.verify import attention_windows, plan_prompts, verify
from tests.verify.models import (
    KINDS,
    TORCH,
    Opened,
    TorchArtifact,
    default_model,
    fails,
    open_saved,
)
from tools.tiny_configs import VOCAB


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kind", KINDS)
def test_right_model_passes(kind: str, dtype: str, opened: Opened) -> None:
    """Other attention and expert kernels than the reference's, so that rounding differs as an artifact's does."""
    model, source = opened(kind, dtype)
    if kind != "gpt_oss":
        model.set_attn_implementation("sdpa")
    artifact = TorchArtifact(model)
    report = verify(artifact, source, mode=Verify.SAMPLE, dtype=dtype)
    assert report.mode == "sample" and report.tokens == 40 and artifact.calls == [(40, 30)]
    assert report.prefill_max_abs_error is not None and report.decode_max_abs_error is not None
    assert report.tolerance is not None and report.top1_agreement is not None and report.kl_mean is not None
    assert report.kl_mean < 1e-3
    if dtype == "float32":
        assert report.prefill_max_abs_error < report.tolerance < 3e-4  # 2e-4 of the largest logit, at least 1
        assert report.reference_noise is None
    else:
        assert report.reference_noise is not None and 1e-3 < report.reference_noise < 2e-2
        assert report.relative_error is not None and report.relative_error < 1.5 * report.reference_noise


@pytest.mark.parametrize("kind", ("llama", "gemma3_text", "mixtral"))
@pytest.mark.parametrize("seed", range(4))
def test_more_exact_than_the_source_passes(kind: str, seed: int, opened: Opened) -> None:
    """Weights in bfloat16, arithmetic in float32: smaller errors than the source's own."""
    _, source = opened(kind, "bfloat16", seed)
    exact = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=torch.float32, attn_implementation="eager"
    )
    report = verify(TorchArtifact(exact), source, mode=Verify.SAMPLE, dtype="bfloat16", seed=seed)
    assert report.relative_error is not None and report.relative_error < 1e-5


@pytest.mark.parametrize("kind", ("llama", "gemma3_text"))
def test_full_mode(kind: str, opened: Opened) -> None:
    model, source = opened(kind, "bfloat16", max_position_embeddings=512)
    artifact = TorchArtifact(model)
    report = verify(artifact, source, mode=Verify.FULL, dtype="bfloat16")
    assert artifact.calls == [(256, 192), (45, 33), (29, 7)]
    assert report.mode == "full" and report.tokens == 330


def test_float16(opened: Opened) -> None:
    model, source = opened("llama", "float16")
    report = verify(TorchArtifact(model), source, mode=Verify.SAMPLE, dtype="float16")
    assert report.reference_noise is not None and report.reference_noise < 2e-3
    fails(TorchArtifact(default_model("llama", "float16", seed=1)), source, "float16")


def test_off(opened: Opened) -> None:
    _, source = opened("llama", "float32")
    report = verify(
        TorchArtifact(default_model("llama", "float32", seed=1)), source, mode=Verify.OFF, dtype="float32"
    )
    assert report.mode == "off" and report.tokens == 0 and report.note


class Exported(torch.nn.Module):
    """Small enough to export: tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(90, 16)
        self.out = torch.nn.Linear(16, 90)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.nn.functional.silu(self.embed(ids)))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_exported_program(dtype: str) -> None:
    torch.manual_seed(0)
    module = Exported().to(TORCH[dtype])
    length = torch.export.Dim("n", min=2, max=256)
    program = torch.export.export(
        module, (torch.zeros(1, 8, dtype=torch.long),), dynamic_shapes=({1: length},)
    )
    source = open_model(program, dtype=None)

    class Artifact:
        bias = 0.0

        def logits(self, token_ids: Sequence[int], *, prefill: int | None = None) -> np.ndarray:
            with torch.no_grad():
                out: np.ndarray = module(torch.tensor([list(token_ids)]))[0].float().numpy()
            return out + self.bias

        logits_batch = TorchArtifact.logits_batch

    artifact = Artifact()
    report = verify(artifact, source, mode=Verify.SAMPLE, dtype=dtype)
    if dtype == "bfloat16":  # nothing to compare with: the manifest says so
        assert report.mode == "off" and "no float32 reference" in report.note
        return
    assert report.mode == "sample" and report.tokens == 40
    artifact.bias = 0.1
    with pytest.raises(LlmcError, match="verify-failed"):
        verify(artifact, source, mode=Verify.SAMPLE, dtype=dtype)


def test_cache_coarser_than_the_weights(tmp_path: Path) -> None:
    """A float32 artifact with a bfloat16 cache is measured against a source with such a cache, not against 2e-4."""
    model = default_model("llama", "float32")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(8)
    source = open_saved(model, tmp_path)
    from llmc.reference import EagerWithCache

    model.set_attn_implementation(EagerWithCache.of("bfloat16").name)
    artifact = TorchArtifact(model)
    fails(artifact, source, "float32")
    report = verify(artifact, source, mode=Verify.SAMPLE, dtype="float32", kv_dtype="bfloat16")
    assert report.reference_noise is not None and report.relative_error == pytest.approx(
        report.reference_noise
    )
    assert report.reference_noise < 4e-3


def test_prompts(opened: Opened) -> None:
    _, source = opened("mistral", "bfloat16", sliding_window=1024)
    assert attention_windows(source) == (1024,)
    sample, note = plan_prompts(source, Verify.SAMPLE, 4096, 0)
    assert [(len(p.ids), p.prefill) for p in sample] == [(40, 30)] and "1024" in note
    full, note = plan_prompts(source, Verify.FULL, 4096, 0)
    assert [(len(p.ids), p.prefill) for p in full] == [(1088, 1008), (45, 33), (29, 7)] and not note
    assert plan_prompts(source, Verify.SAMPLE, 4096, 0)[0] == sample
    assert plan_prompts(source, Verify.SAMPLE, 4096, 1)[0] != sample
    short, _ = plan_prompts(source, Verify.FULL, 12, 0)
    assert [(len(p.ids), p.prefill) for p in short] == [(12, 9), (12, 11), (12, 7)]
    assert all(0 <= t < VOCAB for p in full for t in p.ids)
