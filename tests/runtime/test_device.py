"""A compiled model through TVM's CUDA runtime on a stand-in for NVIDIA's libraries, its kernels in the simulator."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import llmc
from llmc.pipeline import compile_model
from tests.runtime.fake_cuda.artifact import compile_for_fake
from tests.runtime.fake_cuda.device import build, scenario
from tools.tiny_configs import tiny_model

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs a C compiler for the stand-in of NVIDIA's libraries"
)
needs_compiler = pytest.mark.skipif(
    shutil.which("nvcc") is None and importlib.util.find_spec("nvidia") is None, reason="needs NVRTC or nvcc"
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


@pytest.mark.slow(reason="each loads several models")
@pytest.mark.parametrize("name", ["several", "newer", "memory"])
def test_several_models_and_what_a_machine_lacks(name: str, libraries: Path, compiled: Path) -> None:
    scenario(f"{SCENARIOS}:{name}", libraries, compiled)


@pytest.mark.slow(reason="compiles a model")
def test_a_compile_for_the_gpu_at_hand_is_checked_on_it(libraries: Path, tmp_path: Path) -> None:
    scenario(f"{SCENARIOS}:compiles", libraries, tmp_path)


@pytest.mark.slow(reason="compiles a model for each")
@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("gemma2", {"dtype": "f32"}, 1e-4),
        ("mixtral", {"dtype": "f32"}, 1e-4),
        ("llama", {"dtype": "f32", "quant": "q4g32"}, 1e-4),
        # bf16 rounds where the two targets' sums differ in the last bit
        pytest.param("llama", {"dtype": "bf16"}, 0.06, marks=needs_compiler),
    ],
)
def test_models_agree_with_the_cpu_target(
    kind: str, options: dict[str, str], error: float, libraries: Path, tmp_path: Path
) -> None:
    assembled = options["dtype"] == "bf16"  # this one with the real assembler
    model = tiny_model(kind)
    spec = {"max_seq_len": 64, "max_batch": 4, **options}
    compile_for_fake(model, tmp_path, assemble=assembled, target="cuda/sm_90", **spec)
    compile_model(model, tmp_path / "cpu", target="cpu", verify="off", **spec)
    prompts = np.full((3, 20), -1)
    rng = np.random.default_rng(5)
    for row, length in zip(prompts, (20, 3, 9), strict=True):
        row[:length] = rng.integers(0, 200, length)
    cpu = llmc.load(tmp_path / "cpu", kv_pages=40)
    both = [cpu.logits(row[row >= 0], prefill=int((row >= 0).sum()) - 2)[-2:] for row in prompts]
    rows = np.stack(both, axis=1)
    np.savez(tmp_path / "expected.npz", prompts=prompts, rows=rows, error=error, assembled=assembled)
    scenario(f"{SCENARIOS}:agrees", libraries, tmp_path)
