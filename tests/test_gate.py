"""The bounds of the quality gate, its spec and its messages, without a compile."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llmc.artifact import LayerQuality, QualityReport, TextQuality, from_plain, to_plain
from llmc.cli.compile import text_quality_text
from llmc.errors import LlmcError
from llmc.gate import check_gate, worst_layers
from llmc.spec import CompileSpec
from llmc.stages import ProgressReporter

LAYERS = (
    LayerQuality("layers.0", 0.03, 0.003),
    LayerQuality("layers.1", 0.05, 0.004),
    LayerQuality("layers.2", 0.051, 0.005),
)
TEXT = TextQuality("00", 8176, 512, 11.7, 11.5, 1.739, 0.05, 0.0123, 0.11, 0.953, LAYERS)


def test_within_the_bounds_nothing_happens() -> None:
    check_gate(TEXT, max_kl=0.0123, max_ppl_increase=1.8)
    check_gate(TEXT, max_kl=None, max_ppl_increase=None)


def test_each_bound_is_named_with_its_figures_and_the_worst_layers() -> None:
    with pytest.raises(LlmcError) as caught:
        check_gate(TEXT, max_kl=0.01, max_ppl_increase=1.0)
    message = caught.value.message
    assert "the perplexity grows by 1.74 % ± 0.05 (from 11.5000 to 11.7000), allowed 1 %" in message
    assert "the mean KL divergence is 0.0123 nats, allowed 0.01" in message
    # the square root of 0.05**2 - 0.03**2 is 0.04
    assert "layers.1 (0.04, to 0.05), layers.0 (0.03, to 0.03), layers.2 (0.01, to 0.051)" in message
    assert "\n" not in message


def test_a_figure_that_is_no_number_fails() -> None:
    with pytest.raises(LlmcError):
        check_gate(dataclasses.replace(TEXT, kl_mean=float("nan")), max_kl=1.0, max_ppl_increase=None)


def test_a_layer_is_not_blamed_for_what_it_inherits() -> None:
    layers = [LayerQuality(f"l{i}", e, 0.0) for i, e in enumerate([0.1, 0.1, 0.09, 0.12])]
    assert [layer.path for layer, _ in worst_layers(layers, 2)] == ["l0", "l3"]


def test_the_figures_survive_the_manifest() -> None:
    quality = QualityReport("sample", text=TEXT)
    assert from_plain(QualityReport, to_plain(quality)) == quality
    assert from_plain(QualityReport, {"mode": "off"}).text is None


def test_the_figures_in_a_line() -> None:
    line = text_quality_text(TEXT)
    for words in ("11.7000", "+1.739 % ± 0.050", "0.0123", "95.30 %", "5.10e-02 (layers.2)"):
        assert words in line, words


@pytest.mark.parametrize("value", ["1%", "1", 1, 1.0, " 1.0 %"])
def test_a_percentage_is_read_with_and_without_its_sign(value: object) -> None:
    spec = CompileSpec.from_json({"model": "m", "eval_text": "t", "max_ppl_increase": value})
    assert spec.max_ppl_increase == 1.0
    assert CompileSpec.from_json(spec.to_json()) == spec


def test_the_gate_is_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(
        'model = "m"\neval_text = "t"\ncalib_text = "c"\nmax_kl = 0.01\nmax_ppl_increase = "0.5%"\n'
    )
    spec = CompileSpec.from_toml(path)
    assert (spec.calib_text, spec.max_kl, spec.max_ppl_increase) == ("c", 0.01, 0.5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_kl": 0.1}, "Add --eval FILE"),
        ({"max_ppl_increase": "1%"}, "Add --eval FILE"),
        ({"max_kl": -1, "eval_text": "t"}, "at least 0, found -1"),
        ({"max_kl": "nan", "eval_text": "t"}, "at least 0, found nan"),
        ({"max_ppl_increase": "one", "eval_text": "t"}, "must be a number, e.g. 1 or 1%; found 'one'"),
        ({"max_kl": "1%", "eval_text": "t"}, "must be a number, e.g. 0.01; found '1%'"),
        ({"eval_tokens": 0}, "eval_tokens must be at least 1"),
        ({"eval_text": "t", "meta_weights": True}, "without weights"),
    ],
)
def test_bad_bounds_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(LlmcError) as caught:
        CompileSpec.from_json({"model": "m", **values})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"short", "has 5 bytes; at least 512"), (b"\xff\xfe" * 600, "is not UTF-8")],
)
@pytest.mark.parametrize("option", ["eval_text", "calib_text"])
def test_a_text_that_cannot_do_is_refused_before_the_work(
    option: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    from llmc.pipeline import compile_model

    text = tmp_path / "some.txt"
    if content is not None:
        text.write_bytes(content)
    more = {"quant": "q4g32", "quant_method": "gptq"} if option == "calib_text" else {}
    with pytest.raises(LlmcError, match=rf"text .*some\.txt {words}"):
        compile_model("nothing", tmp_path / "out", **{option: str(text)}, **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "ref"),
    [
        ({"eval_text": "TEXT"}, "text-too-short"),
        ({"quant": "q4g32", "quant_method": "gptq", "calib_text": "TEXT"}, "calibration-too-short"),
    ],
)
def test_a_text_of_too_few_tokens_is_refused_before_the_model_is_traced(
    more: dict[str, str], ref: str, tmp_path: Path
) -> None:
    """Enough bytes, but not enough tokens."""
    from llmc.pipeline import compile_model
    from tests.texts import save_tiny

    folder = save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text("be " * 200)
    fields = {k: str(tmp_path / "text.txt") if v == "TEXT" else v for k, v in more.items()}
    stages: list[str] = []
    with pytest.raises(LlmcError) as caught:
        compile_model(folder, tmp_path / "out", progress=Stages(stages), **fields)
    assert caught.value.ref == ref and stages == ["capture"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]


class Stages(ProgressReporter):
    """Keeps the names of the stages that were started."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def stage_started(self, stage: str, number: int, total: int) -> None:
        self.names.append(stage)


def test_auto_needs_a_bound_and_takes_no_other_scheme() -> None:
    bound = {"model": "m", "quant": "auto", "eval_text": "t", "max_ppl_increase": 1}
    assert CompileSpec.from_json(bound).rules().is_empty
    for change in ({"max_ppl_increase": None}, {"quant_head": "q8"}, {"quant_embedding": "q8"}):
        with pytest.raises(LlmcError) as caught:
            CompileSpec.from_json({**bound, **change})
        assert caught.value.ref == "quant-auto"
