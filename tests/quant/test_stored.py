"""A quantized checkpoint becomes an artifact with the same codes and scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.frontend.checkpoint import open_model
from llmc.pipeline import compile_model
from llmc.quant.readers.gguf_file import GGUFFile
from llmc.quant.schemes import SCHEMES, STORED_ONLY, by_name
from llmc.quant.stored import packed_as, stored_schemes
from llmc.reference import reference_logits
from tests.frontend.tiny import tiny_model
from tests.quant.test_gguf import export, random_blocks, write_gguf
from tests.quant.test_readers import write_gptq, write_nf4

IDS = [5, 40, 30, 77, 102, 8]


def check(model: Path, out: Path) -> None:
    """Logits of the artifact against torch with the checkpoint's own dequantized weights."""
    compile_model(str(model), out, dtype="f32", max_batch=2, max_seq_len=64, max_step_tokens=16, verify="off")
    got = llmc.load(out).logits(IDS)
    want = reference_logits(open_model(str(model), dtype=None), IDS, "float32").logits
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.e2e
@pytest.mark.slow  # compiles a model; the default run compiles the one of test_gguf
def test_gptq(tmp_path: Path) -> None:
    expected = write_gptq(tmp_path / "model", SCHEMES["q4g64a"], version="gptq_v2")
    source = open_model(str(tmp_path / "model"), dtype=None)
    assert stored_schemes(source.weights) == dict.fromkeys(expected, "q4g64a")
    check(tmp_path / "model", tmp_path / "out")
    layouts = [p.layout for p in llmc.load(tmp_path / "out").manifest.params]
    assert sum(layout.startswith("quant(q4g64a") for layout in layouts) >= 4


@pytest.mark.e2e
@pytest.mark.slow  # compiles a model
@pytest.mark.parametrize("nested", (False, True))
def test_nf4(nested: bool, tmp_path: Path) -> None:
    """Scales in float32, which no scheme of llmc's own has in groups."""
    write_nf4(tmp_path / "model", nested)
    source = open_model(str(tmp_path / "model"), dtype=None)
    assert set(stored_schemes(source.weights).values()) == {"nf4f"}
    check(tmp_path / "model", tmp_path / "out")


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ("q8_0", pytest.param("q4_k", marks=pytest.mark.slow)))
def test_gguf(kind: str, tmp_path: Path) -> None:
    """q8_0 as it is, with the tied embedding; q4_k dequantized, because its offsets have no kernel."""
    model = tiny_model("llama", hidden_size=256, head_dim=64, intermediate_size=256, tie_word_embeddings=True)
    file = GGUFFile(export(model, tmp_path / "f.gguf", "llama"))
    tensors = {}
    for name, tensor in file.tensors.items():
        rows = file.rows(tensor)
        if len(tensor.shape) == 2:
            rows = random_blocks(kind, *tensor.shape, seed=len(tensors))
        tensors[name] = (kind if len(tensor.shape) == 2 else tensor.kind, tensor.shape, rows.tobytes())
    path = write_gguf(tmp_path / "m.gguf", file.metadata, tensors)
    stored = stored_schemes(open_model(str(path), dtype=None).weights)
    assert set(stored.values()) == ({"q8g32"} if kind == "q8_0" else set())
    check(path, tmp_path / "out")


def test_what_goes_into_an_artifact_as_it_is() -> None:
    assert packed_as(SCHEMES["w8a8"]) is SCHEMES["q8"]
    assert packed_as(SCHEMES["w4a8"]) is SCHEMES["q4g32"]
    assert packed_as(STORED_ONLY["q4k"]) is None and packed_as(STORED_ONLY["q6k"]) is None
    for name in ("mxfp4", "q4g128a", "nf4f", "q8g64f"):
        assert packed_as(by_name(name)) is by_name(name)
