"""Whole step functions on the simulated GPU against the cpu artifact of the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import llmc
from llmc.artifact import Limits
from llmc.cli.app import app
from llmc.pipeline import compile_model, lower_model
from llmc.simulate.model import SimulatedModel
from llmc.spec import CompileSpec
from tests.shared import TINY
from tools.tiny_configs import VOCAB, tiny_model

# gemma2: windows, softcap and norms with an offset; gpt2: learned positions, biases, transposed weights, tied head
ARCHITECTURES = [
    "llama",
    *(pytest.param(a, marks=pytest.mark.slow) for a in ("gemma2", "gpt2", "gpt_neox", "phi3")),
]


def simulated(model: object, dtype: str, **changes: object) -> SimulatedModel:
    given = {"model": "tiny", "target": "cuda/sm_90", "dtype": dtype, "page_size": 16, **changes}
    step, source, caps = (
        (lowered := lower_model(model, CompileSpec.from_json(given)))[1],
        lowered[0],
        lowered[2],
    )
    return SimulatedModel(step, source, caps, Limits(64, 4, 64))


@pytest.mark.e2e
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_ragged_batch_equals_the_cpu_artifact(architecture: str, request: pytest.FixtureRequest) -> None:
    model = tiny_model(architecture)
    if architecture == "llama":
        artifact = request.getfixturevalue("tiny_llama")
    else:
        artifact = request.getfixturevalue("tmp_path") / "cpu"
        compile_model(model, artifact, **TINY)
    rng = np.random.default_rng(0)
    batch = [rng.integers(0, VOCAB, n).tolist() for n in (21, 3, 18)]
    expected = llmc.load(artifact).logits_batch(batch, prefill=[17, 3, 17])
    got = simulated(model, "f32").logits(batch, 17)
    for one, other in zip(got, expected, strict=True):
        assert np.abs(one - other).max() < 1e-4


@pytest.mark.e2e
@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    done = CliRunner().invoke(
        app,
        ["debug", "simulate", str(tmp_path / "tiny"), "--dtype", "bf16", "--tokens", "6", "--decode", "2"],
    )
    assert done.exit_code == 0, done.output
    assert "attention_decode_0" in done.output and "no race" in done.output
    done = CliRunner().invoke(app, ["debug", "simulate", str(tmp_path / "tiny"), "--target", "cpu"])
    assert done.exit_code == 2
