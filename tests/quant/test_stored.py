"""A quantized checkpoint becomes an artifact with the same codes and scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.pipeline import compile_model
from llmc.quant.readers.gguf_blocks import KINDS
from llmc.quant.readers.gguf_file import GGUFFile
from llmc.quant.schemes import SCHEMES, STORED_ONLY, Code, Scheme, by_name, stored_scheme
from llmc.quant.stored import SourceQuantizer, packed_as, stored_schemes
from llmc.quant.weight import QuantizedWeight
from llmc.reference import reference_logits
from tests.frontend.tiny import tiny_model
from tests.quant.prequantized import write_gptq, write_nf4
from tests.quant.test_gguf import export, random_blocks, write_gguf

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
def test_gptq_act_order(tmp_path: Path) -> None:
    """Projections of one input share its order and are fused; down_proj has another."""
    expected = write_gptq(
        tmp_path / "model", SCHEMES["q4g64a"], version="gptq_v2", reorder=True, desc_act=True
    )
    stored = stored_schemes(open_model(str(tmp_path / "model"), dtype=None).weights)
    assert set(stored) == set(expected) and len(set(stored.values())) > 1
    check(tmp_path / "model", tmp_path / "out")
    layouts = [p.layout for p in llmc.load(tmp_path / "out").manifest.params]
    assert sum(layout.startswith("quant(q4g64ap,") for layout in layouts) == 4


def test_parts_that_cannot_be_joined_are_not_quantized_again() -> None:
    class Source:
        def scheme_of(self, name: str) -> Scheme:
            return by_name("q4g32")

        def quantized(self, name: str) -> None:
            return None

    weight = np.zeros((64, 64), np.float32)
    with pytest.raises(LlmcError, match="several parts"):
        SourceQuantizer(Source()).quantize("a.weight", weight, by_name("q4g32"))  # type: ignore[arg-type]


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
@pytest.mark.parametrize("kind", ("q8_0", "q4_k", pytest.param("q6_k", marks=pytest.mark.slow)))
def test_gguf(kind: str, tmp_path: Path) -> None:
    """Every weight as it is, also the tied embedding."""
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
    assert set(stored.values()) == {KINDS[kind].name} and len(stored) == 15
    check(path, tmp_path / "out")
    layouts = [p.layout for p in llmc.load(tmp_path / "out").manifest.params]
    assert sum(layout.startswith(f"quant({KINDS[kind].name},") for layout in layouts) == 9


class _Stored:
    """A source with one weight whose codes are all 7."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def scheme_of(self, name: str) -> Scheme:
        return self._scheme

    def quantized(self, name: str) -> QuantizedWeight:
        return QuantizedWeight(self._scheme, np.full((2, 32), 7, np.uint8), np.ones((2, 1), np.float32))


def test_what_goes_into_an_artifact_as_it_is() -> None:
    assert packed_as(SCHEMES["w8a8"]) is SCHEMES["q8"]
    assert packed_as(SCHEMES["w4a8"]) is SCHEMES["q4g32"]
    asked = SourceQuantizer(_Stored(SCHEMES["w8a8"]))
    weight = np.ones((2, 32), np.float32)
    for name in ("q8", "w8a8"):
        made = asked.quantize("w", weight, SCHEMES[name])
        assert made.scheme is SCHEMES[name] and (made.codes == 7).all()
    assert (asked.quantize("w", weight, SCHEMES["q8g32"]).codes != 7).all()  # rounded anew
    names = [
        *STORED_ONLY,
        "mxfp4",
        "q4g128a",
        "nf4f",
        "nf4g256f",
        "q8g64f",
        "q3g32ab",
        "q2g128",
        "q4",
        "q8a",
        "fp8g128",
    ]
    for name in [*names, "q4g128p", "q4g128p0a1b2c3d"]:
        assert packed_as(by_name(name)) is by_name(name)
    assert by_name("q4g128p0a1b2c3d").any_order == by_name("q4g128p")
    odd = stored_scheme(Code.INT, 4, 40)
    assert packed_as(odd) is None
