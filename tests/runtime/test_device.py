"""A compiled model through TVM's CUDA runtime on a stand-in for NVIDIA's libraries, its kernels in the simulator."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runtime.fake_cuda.artifact import compile_for_fake
from tests.runtime.fake_cuda.device import build, scenario
from tools.tiny_configs import tiny_model

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs a C compiler for the stand-in of NVIDIA's libraries"
)
SCENARIOS = "tests.runtime.fake_cuda.scenarios"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fake-cuda")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama for sm_90, and what torch says of it."""
    folder = tmp_path_factory.mktemp("compiled")
    model = tiny_model("llama", num_hidden_layers=1)
    compile_for_fake(model, folder, target="cuda/sm_90", dtype="f32", max_seq_len=64, max_batch=4)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
        text = list(ids)
        while len(text) < len(ids) + 6:
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    np.savez(folder / "expected.npz", ids=ids, logits=logits, greedy=text[len(ids) :])
    return folder


def test_a_model_on_a_gpu(libraries: Path, compiled: Path) -> None:
    scenario(f"{SCENARIOS}:runs", libraries, compiled)


def test_what_a_machine_lacks(libraries: Path, compiled: Path) -> None:
    scenario(f"{SCENARIOS}:refusals", libraries, compiled)
