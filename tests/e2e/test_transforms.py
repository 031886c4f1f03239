"""Rotation, pruning and low-rank factors from the spec to the artifact, which is checked against its own weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmc.artifact import Manifest
from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.frontend.graph import SourceModel
from llmc.frontend.untie import untied
from llmc.passes.step_module import PackedParam
from llmc.pipeline import compile_model
from llmc.quantized_source import ArtifactWeights
from tests.frontend.tiny import save, tiny_model

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).resolve().parent.parent.parent / "examples" / "models" / "stdlib-llama"
TEXT = str(DEMO / "calibration.txt")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose output projection is its embedding, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("tied")
    save(tiny_model("llama", vocab_size=4096, tie_word_embeddings=True, max_position_embeddings=64), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def check_two_of_four(source: SourceModel, manifest: Manifest, folder: Path) -> None:
    """Exactly two of every four weights that the artifact in `folder` holds are zero."""
    assert source.weights is not None
    params = []
    for p in manifest.params:
        layout, _, gated = p.layout.partition(", ")
        first, *more = p.sources
        params.append(
            PackedParam(p.name, first, p.dtype, p.shape, layout, more=tuple(more), gated=bool(gated))
        )
    weights = ArtifactWeights(source.weights, params, manifest.params, folder)
    for layer in range(2):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            values = weights.load(f"model.layers.{layer}.{name}.weight").numpy()
            assert ((values.reshape(-1, 4) == 0).sum(axis=1) == 2).all(), name


def test_pruned_without_text(tied: Path, tmp_path: Path) -> None:
    """Two of four weights are zero in the artifact itself."""
    manifest = compile_model(tied, tmp_path / "a", quant="q8", prune="magnitude:2:4").manifest
    assert manifest is not None and manifest.spec["prune"] == "magnitude:2:4"
    check_two_of_four(open_model(str(tied), dtype=None), manifest, tmp_path / "a")


@pytest.mark.slow(reason="calibrates, prunes and evaluates a model, and compiles its graph twice")
def test_rotated_pruned_and_quantized(tied: Path, tmp_path: Path) -> None:
    """Zeros survive; the tied table became two; the layers' errors are of hidden states that are rotated back."""
    manifest = compile_model(
        tied,
        tmp_path / "a",
        quant="q8",
        quant_method="rotate+gptq",
        prune="sparsegpt:2:4",
        calib_text=TEXT,
        eval_text=TEXT,
        eval_tokens=256,
    ).manifest
    assert manifest is not None and manifest.spec["prune"] == "sparsegpt:2:4"
    stored = {name for param in manifest.params for name in param.sources}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= stored
    assert manifest.quality.text is not None
    # pruned as it is, the model still is the source's: rotated hidden states would have an error above 1
    assert all(0 < layer.error < 0.7 for layer in manifest.quality.text.layers)
    check_two_of_four(untied(open_model(str(tied), dtype=None)), manifest, tmp_path / "a")


def test_low_rank(tied: Path, tmp_path: Path) -> None:
    """Two matmuls in the graph, and fewer weights."""
    manifest = compile_model(tied, tmp_path / "a", svd="0.5", calib_text=TEXT, dtype="f32").manifest
    assert manifest is not None
    shapes = {name: p.shape for p in manifest.params for name in p.sources}
    assert "model.layers.0.mlp.down_proj.first.weight" in shapes
    assert "model.layers.0.mlp.down_proj.second.weight" in shapes
    assert not any(name.endswith("down_proj.weight") for name in shapes)
    assert manifest.quality.mode == "sample" and manifest.quality.relative_error is not None
    assert manifest.quality.relative_error < 1e-5
    assert manifest.quality.quant_relative_error is not None and manifest.quality.quant_relative_error > 1e-3


def test_what_is_refused_leaves_nothing_behind(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="largest rank"):
        compile_model(tied, tmp_path / "a", svd="500", calib_text=TEXT)
    assert list(tmp_path.iterdir()) == []
