"""A fused artifact computes what one without any fusion computes, and fusions are what makes the difference in kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.errors import LlmcError
from llmc.passes import order
from llmc.pipeline import compile_model
from llmc.spec import OPTIONAL_PASSES, CompileSpec
from llmc.targets.backend import get
from tests.shared import TINY
from tools.tiny_configs import VOCAB, tiny_model

TOLERANCE = 1e-5  # of the logits' range
# norms of heads, before and behind, and windows; a parallel block with LayerNorm
MORE = (
    "gemma3_text",
    "gpt_neox",
    "gemma2",
    "cohere",
    "qwen3",
    "phi3",
    "bloom",
    "codegen",
    "mixtral",
    "deepseek_v3",
    "gpt2",
)


def kernels_per_block(model: llmc.Model, function: str = "decode") -> float:
    entry = next(f for f in model.manifest.functions if f.name == function)
    return sum(k.block_calls for k in entry.kernels)


def compare(architecture: str, folder: Path) -> tuple[float, float]:
    """Compile with and without fusions, compare logits; (kernels per block without, with)."""
    model = tiny_model(architecture)
    compile_model(model, folder / "plain", disable_passes=OPTIONAL_PASSES, **TINY)
    if not (folder / "fused").exists():
        compile_model(model, folder / "fused", **TINY)
    both = [llmc.load(folder / name) for name in ("plain", "fused")]
    rng = np.random.default_rng(0)
    ids, other = (rng.integers(0, VOCAB, n).tolist() for n in (45, 20))
    # a prompt, then one token at a time; then two sequences in one batch
    runs = [(m.logits(ids, prefill=37), *m.logits_batch([ids, other], prefill=[40, 11])) for m in both]
    for plain, fused in zip(*runs, strict=True):
        assert np.ptp(plain) > 1
        assert np.abs(plain - fused).max() <= TOLERANCE * np.ptp(plain)
    return kernels_per_block(both[0]), kernels_per_block(both[1])


@pytest.mark.e2e
def test_fused_and_unfused_agree(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "fused").symlink_to(tiny_llama)
    plain, fused = compare("llama", tmp_path)
    assert plain >= 2 * fused


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("architecture", MORE)
def test_fused_and_unfused_agree_for_more(architecture: str, tmp_path: Path) -> None:
    plain, fused = compare(architecture, tmp_path)
    assert plain > fused


def test_every_optional_pass_is_a_pass() -> None:
    backend, caps = get("cpu")
    target = backend.tvm_target(caps)
    names = [name for name, _ in [*order.graph_phase(caps), *order.step_phase(caps, target, {})]]
    assert set(OPTIONAL_PASSES) <= set(names)
    left = [
        name
        for name, _ in [
            *order.graph_phase(caps, disabled=OPTIONAL_PASSES),
            *order.step_phase(caps, target, {}, OPTIONAL_PASSES),
        ]
    ]
    # decode has to be made; all else is gone
    assert [name for name in left if name in OPTIONAL_PASSES] == ["SpecializeDecode"]


@pytest.mark.parametrize("name", ["LowerLinear", "fuserope", "no such pass"])
def test_other_passes_cannot_be_disabled(name: str) -> None:
    with pytest.raises(LlmcError, match="cannot be disabled") as raised:
        CompileSpec.from_json({"model": "m", "disable_passes": ["FuseQKV", name]})
    assert raised.value.ref == "pass-not-optional"
    assert "FuseRoPE" in str(raised.value) and name in str(raised.value)


def test_disabled_passes_are_part_of_the_spec() -> None:
    spec = CompileSpec.from_json({"model": "m", "disable_passes": ["FuseQKV", "FuseNorm", "FuseQKV"]})
    assert spec.disable_passes == ("FuseQKV", "FuseNorm")
    assert CompileSpec.from_json(spec.to_json()) == spec
    assert spec.hash() != CompileSpec(model="m").hash()
    with pytest.raises(LlmcError, match="list of names"):
        CompileSpec.from_json({"model": "m", "disable_passes": 3})
