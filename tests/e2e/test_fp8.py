"""A checkpoint in fp8 blocks becomes an artifact, with activations as they are or rounded, and the compile says which."""

from __future__ import annotations

from pathlib import Path

import pytest

import llmc
from llmc.artifact import Manifest
from llmc.pipeline import compile_model
from llmc.stages import ProgressReporter
from tests.quant.prequantized import write
from tests.quant.test_readers_fp8 import BLOCK, checkpoint

pytestmark = pytest.mark.e2e


class Notes(ProgressReporter):
    """Keeps what the user would see."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def compiled(model: Path, output: Path, quant: str) -> tuple[Manifest, str]:
    notes = Notes()
    manifest = compile_model(model, output, quant=quant, dtype="f32", progress=notes).manifest
    assert manifest is not None
    return manifest, "\n".join(notes.said)


def test_activations_are_rounded_when_asked(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", checkpoint("weight_scale_inv", 128, 128)[0], BLOCK)
    manifest, said = compiled(folder, tmp_path / "a", "fp8a8")
    layouts = {p.name: p.layout for p in manifest.params}
    assert (
        sum(text.startswith("quant(fp8a8g128,") for text in layouts.values()) == 4
    )  # qkv, o, gate and up, down
    assert layouts["model.embed_tokens.weight"].startswith("quant(fp8a8,")  # the head was not quantized
    assert manifest.quality.relative_error < manifest.quality.tolerance < 0.2
    assert "there are no fp8 units" in said and "unrounded" not in said
    assert llmc.load(tmp_path / "a").logits([1, 2, 3]).shape[0] == 3


@pytest.mark.slow(reason="a compile")
def test_activations_stay_as_they_are_by_default(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", checkpoint("weight_scale_inv", 128, 128)[0], BLOCK)
    manifest, said = compiled(folder, tmp_path / "a", "none")
    assert sum(p.layout.startswith("quant(fp8g128f,") for p in manifest.params) == 4
    assert "7 weights were made for fp8 activations" in said and "--quant fp8a8 rounds them" in said
    assert manifest.quality.relative_error < 1e-3
