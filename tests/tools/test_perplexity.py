"""tools/perplexity.py with stand-ins for artifact and source."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import llmc
from tools import perplexity
from tools.perplexity import Floats, cut, main, nats, score


def test_nats_equals_torch() -> None:
    rng = np.random.default_rng(0)
    logits = 30 * rng.standard_normal((7, 11)).astype(np.float32)
    targets = rng.integers(0, 11, 7)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).double(), torch.tensor(targets), reduction="sum"
    )
    assert nats(logits, targets) == pytest.approx(float(expected))


def test_uniform_logits_give_the_vocabulary_size() -> None:
    got = score("x", lambda w: np.zeros((len(w), 50), np.float32), [[1, 2, 3], [4, 5]])
    assert got.perplexity == pytest.approx(50) and got.tokens == 3


def test_cut() -> None:
    assert cut(range(7), 3, 9) == [[0, 1, 2], [3, 4, 5]]  # a window of one token has nothing to score
    assert cut(range(8), 3, 9) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert cut(range(8), 3, 1) == [[0, 1, 2]]


class Stub:
    """An artifact over bytes that likes the byte after the current one, more or less."""

    manifest = SimpleNamespace(limits=SimpleNamespace(max_seq_len=16))

    def __init__(self, sharpness: float) -> None:
        self.sharpness = sharpness
        self.longest = 0

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        assert not special_tokens
        return list(text.encode())

    def logits(self, window: list[int]) -> Floats:
        self.longest = max(self.longest, len(window))
        out = np.zeros((len(window), 256), np.float32)
        out[np.arange(len(window)), np.array(window) + 1] = self.sharpness
        return out


@pytest.mark.parametrize(("other", "code"), [(5.0, 0), (5.001, 0), (5.1, 1), (math.nan, 1)])
def test_against(other: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("abcdefg" * 10)
    artifact = Stub(5.0)
    monkeypatch.setattr(llmc, "load", lambda path: artifact)
    monkeypatch.setattr(perplexity, "transformers_scorer", lambda model, dtype: Stub(other).logits)
    assert main(["dist", str(text), "--against", "model", "--json", str(file)]) == code
    assert artifact.longest == 16  # the artifact's limit, below --length
    written = json.loads(file.read_text())
    assert [s["tokens"] for s in written["scores"]] == [65, 65]
    assert written["scores"][0]["perplexity"] < 256


def test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc")
    monkeypatch.setattr(llmc, "load", lambda path: Stub(5.0))
    assert main(["dist", str(text)]) == 0
    out = capsys.readouterr().out
    assert "dist" in out and "difference" not in out


@pytest.mark.parametrize("content", (b"", b"a", b"\xff\xfe\xfd"))
def test_bad_text(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    monkeypatch.setattr(llmc, "load", lambda path: Stub(5.0))
    assert main(["dist", str(text)]) == 2
    assert "text.txt" in capsys.readouterr().err
