"""tools/bisect_layers.py: the table, the exit code and the file, with a torch model in place of the compiled graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import llmc.pipeline
from llmc.frontend.graph import SourceModel
from llmc.reference import reference_logits
from llmc.spec import CompileSpec
from tests.frontend.tiny import save, tiny_model
from tools.bisect_layers import main

PATHS = tuple(f"model.layers.{i}" for i in range(4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=4), tmp_path / "model")


def run(patch: pytest.MonkeyPatch, argv: list[str], bad: int | None = None) -> tuple[int, list[CompileSpec]]:
    """Run the tool with the source's own hidden states, wrong from layer `bad` on."""
    specs: list[CompileSpec] = []

    def taps(source: SourceModel, spec: CompileSpec, ids: Sequence[int]) -> Mapping[str, np.ndarray]:
        specs.append(spec)
        dtype = spec.dtype.value if spec.dtype else source.dtype
        out = reference_logits(source, ids, dtype, taps=PATHS).taps
        return {p: x + 0.3 if bad is not None and i >= bad else x for i, (p, x) in enumerate(out.items())}

    patch.setattr(llmc.pipeline, "run_taps", taps)
    return main(argv), specs


@pytest.mark.parametrize("dtype", ("f32", "bf16"))
def test_all_layers_agree(
    dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, specs = run(monkeypatch, [str(folder), "--dtype", dtype, "--tokens", "12"])
    out = capsys.readouterr().out
    assert code == 0 and "no layer diverges" in out
    assert all(path in out for path in PATHS)
    assert specs[0].dtype is not None and specs[0].dtype.value.startswith(
        "float" if dtype == "f32" else "bfloat"
    )


@pytest.mark.parametrize("bad", (0, 2))
def test_first_diverging_layer(
    bad: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "out.json"
    code, _ = run(monkeypatch, [str(folder), "--ids", "3,1,4,1,5", "--json", str(file)], bad)
    assert code == 1
    assert f"first diverging layer: model.layers.{bad}" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["first"] == f"model.layers.{bad}"
    assert [e["diverges"] for e in written["layers"]] == [i >= bad for i in range(4)]


def test_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["/no/such/model"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_artifact_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--artifact", "/no/artifact"]) == 2
    assert "manifest.json cannot be read" in capsys.readouterr().err
