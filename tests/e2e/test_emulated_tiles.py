"""The demo model with kernels for a matrix unit, whose operations are emulated: the check of the compile is the test."""

from __future__ import annotations

from pathlib import Path

import pytest

import llmc
from llmc.caps import TileUnit
from llmc.pipeline import compile_model
from llmc.targets.cpu.backend import _PRESETS, capabilities, detect
from tests.e2e.conftest import DEMO
from tests.frontend.tiny import save, tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = detect()
    if capabilities(preset).lanes_f32 != 16:
        pytest.skip("machines with the unit have vectors of 512 bits, this one has not")
    monkeypatch.setitem(_PRESETS, preset, {**_PRESETS[preset], "tiles": TileUnit.EMULATED})


@pytest.mark.parametrize("quant", [None, "w8a8", "w4a8", "q4g32"])
def test_the_demo_model(quant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)
    fields = {} if quant is None else {"quant": quant}
    result = compile_model(DEMO, tmp_path / "a", dtype="bfloat16", **fields)
    assert result.manifest is not None and result.manifest.quality.mode != "off"
    model = llmc.load(tmp_path / "a")
    text = "def parse(self, arguments):\n    return self.parser.parse_args(arguments)\n" * 4
    ids = model.tokenize(text)
    assert len(ids) > 40
    # many tokens at once take tiles, single ones take vectors: the same model
    at_once, single = model.logits(ids), model.logits(ids, prefill=1)
    agree = (at_once.argmax(-1) == single.argmax(-1)).mean()
    assert agree > 0.95


def test_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of experts: enough rows for tiles, and fewer."""
    emulate(monkeypatch)
    folder = save(tiny_model("mixtral"), tmp_path / "model")
    assert compile_model(folder, tmp_path / "a", dtype="bfloat16").manifest is not None
    model = llmc.load(tmp_path / "a")
    ids = [(7 * i) % 90 + 3 for i in range(60)]
    at_once, single = model.logits(ids), model.logits(ids, prefill=1)
    assert abs(at_once - single).max() < 0.05 * abs(single).max()
