"""The other side of a check in an emulator, with this machine's own Python in the emulator's place."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.emulated import EmulatedModel
from llmc.errors import LlmcError
from llmc.pipeline import compile_model
from tools.tiny_configs import tiny_model


@pytest.mark.slow
def test_logits_are_those_of_the_loaded_artifact(tmp_path: Path) -> None:
    compile_model(tiny_model("llama", num_hidden_layers=1), tmp_path / "a", verify="off")
    here = llmc.load(tmp_path / "a")
    batch = [[1, 2, 3, 4], [9, 8, 7]]
    with EmulatedModel(tmp_path / "a", [sys.executable]) as model:
        assert model.manifest == here.manifest
        expected = here.logits_batch(batch, prefill=[2, 1])
        for found, wanted in zip(model.logits_batch(batch, prefill=[2, 1]), expected, strict=True):
            assert np.array_equal(found, wanted)
        assert np.array_equal(model.logits(batch[0]), here.logits(batch[0]))
    # a call that the model refuses ends the check with the model's own words
    with (
        EmulatedModel(tmp_path / "a", [sys.executable]) as model,
        pytest.raises(LlmcError, match="Token ids must lie in") as caught,
    ):
        model.logits([10**6])
    assert caught.value.ref == "emulator-failed"
    with pytest.raises(LlmcError, match="No such file"):
        EmulatedModel(tmp_path / "a", [str(tmp_path / "no-python")])
