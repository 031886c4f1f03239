"""Element types of weights and of cache pages: the check at the end of the compile is the judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.frontend.checkpoint import open_model
from llmc.pipeline import compile_model
from llmc.reference import reference_logits
from llmc.spec import KVDType
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
        pytest.param("llama", "bf16", "fp8", marks=SLOW),
        pytest.param("gemma2", "bf16", "int8", marks=SLOW),
        pytest.param("gpt_oss", "f32", "int8", marks=SLOW),
        pytest.param("qwen3_moe", "f16", "fp8", marks=SLOW),
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
    assert {g.dtype for g in loaded.manifest.kv_plan.groups} == {KVDType.parse(kv_dtype or dtype).value}


def test_pages_of_codes_give_what_the_rounded_source_gives(tmp_path: Path) -> None:
    """Greedy tokens, and logits far closer to those of the source with rounded keys and values than to the source's."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "source")
    compile_model(model, tmp_path / "artifact", dtype="f32", kv_dtype="int8", verify="off", max_seq_len=300)
    loaded = llmc.load(tmp_path / "artifact")
    assert loaded.manifest.kv_plan.bytes_per_token() == 2 * 2 * 2 * (16 + 2)
    source = open_model(str(tmp_path / "source"), dtype=None)
    ids = np.random.default_rng(1).integers(0, 64, 90).tolist()
    found = loaded.logits(ids, prefill=50)
    exact, rounded = (reference_logits(source, ids, "float32", kv_dtype=kind) for kind in (None, "int8"))
    assert rounded.cache_rounded and not exact.cache_rounded
    noise = np.abs(rounded.logits - exact.logits).max()
    error = np.abs(found - rounded.logits).max()
    assert error < 0.05 * noise < 0.05 * np.abs(exact.logits).max()
    assert (found.argmax(-1) == rounded.logits.argmax(-1)).mean() > 0.98
