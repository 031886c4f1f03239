"""Element types of weights and of cache pages: the check at the end of the compile is the judge."""

from __future__ import annotations

from pathlib import Path

import pytest

import llmc
from llmc.pipeline import compile_model
from tools.tiny_configs import tiny_model

pytestmark = pytest.mark.e2e
SLOW = pytest.mark.slow(reason="a compile each, of element types that the others have too")


@pytest.mark.parametrize(
    ("architecture", "dtype", "kv_dtype"),
    [
        ("llama", "f16", None),
        pytest.param("llama", "bf16", "f32", marks=SLOW),
        ("llama", "f32", "f16"),
        ("gemma2", "bf16", None),
        ("qwen3_moe", "bf16", "f16"),
        pytest.param("gpt_oss", "bf16", None, marks=SLOW),
        pytest.param("gpt2", "bf16", None, marks=SLOW),
        pytest.param("bloom", "f16", None, marks=SLOW),
    ],
)
def test_full_verification_passes(
    architecture: str, dtype: str, kv_dtype: str | None, tmp_path: Path
) -> None:
    """Prompts past the window and over several pages, decode steps, ragged batches, against float32."""
    model = tiny_model(architecture)
    result = compile_model(
        model, tmp_path / "artifact", dtype=dtype, kv_dtype=kv_dtype, verify="full", max_seq_len=300
    )
    assert result.manifest is not None
    quality = result.manifest.quality
    assert quality.mode == "full"
    assert quality.tokens > 250
    assert quality.decode_max_abs_error is not None
    loaded = llmc.load(tmp_path / "artifact")
    assert {g.dtype for g in loaded.manifest.kv_plan.groups} == {
        {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[kv_dtype or dtype]
    }
