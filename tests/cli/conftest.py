"""The command line in this process, and an artifact without code."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmc.artifact import (
    MANIFEST,
    SCHEMA,
    FunctionEntry,
    Limits,
    Manifest,
    ModelInfo,
    ParamEntry,
    QualityReport,
    TargetInfo,
    TensorSpec,
    sha256_file,
)
from llmc.cli.app import app
from llmc.kv_plan import KVGroup, KVKind, KVPlan

ROOT = Path(__file__).resolve().parents[2]
WIDE = {**os.environ, "COLUMNS": "240", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


MANIFEST_OF_TEST = Manifest(
    schema=SCHEMA,
    llmc_version="0.1.0",
    tvm_version="0.27.0",
    created="2026-11-21T00:00:00+00:00",
    spec={},
    model=ModelInfo("some/checkpoint", "LlamaForCausalLM", "llama", 1000, 6, 8_030_261_248, "bfloat16"),
    target=TargetInfo("cpu", "cpu/x86-64-v3", "x86_64-unknown-linux-gnu", "x86-64-v3", ("avx2", "fma")),
    limits=Limits(4096, 16, 512),
    kv_plan=KVPlan(
        32,
        (
            KVGroup("g0", KVKind.FULL, (0, 2, 3), 4, 64, 64, 0, 0, "bfloat16"),
            KVGroup("g1", KVKind.SLIDING_WINDOW, (1, 4), 4, 64, 64, 1024, 0, "bfloat16"),
        ),
        shared=((5, 3),),
    ),
    functions=(
        FunctionEntry(
            "step",
            (TensorSpec("input_ids", "int32", ("T",)),),
            (TensorSpec("logits", "float32", ("R", 1000)),),
        ),
    ),
    params=tuple(
        ParamEntry(f"w{i}", (8, 16), "bfloat16", "weights-00001.safetensors", 64 * i, 256, "rows", ())
        for i in range(20)
    ),
    quality=QualityReport("sample", 64, 1.5e-5, 2.5e-5, top1_agreement=1.0, tolerance=2e-4),
    versions={"torch": "2.13.0"},
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"COLUMNS": "240", "NO_COLOR": "1", "LLMC_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LLMC_DEBUG", raising=False)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder with a manifest and weights, but no code."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "weights-00001.safetensors").write_bytes(bytes(5120))
    files = {"weights-00001.safetensors": sha256_file(folder / "weights-00001.safetensors")}
    (folder / MANIFEST).write_text(dataclasses.replace(MANIFEST_OF_TEST, files=files).as_text())
    return folder


def llmc(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])
