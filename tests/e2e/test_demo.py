"""The main job on the demo model: compile, load, generate, perplexity; the artifact moves and repeats."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import llmc
from llmc.errors import LlmcError
from llmc.evaluate import cut, evaluate
from llmc.pipeline import compile_model
from tests.e2e.conftest import DEMO, ROOT
from tests.texts import sequence_logits
from tools.tiny_configs import tiny_model

pytestmark = pytest.mark.e2e


def test_greedy_tokens_are_those_of_transformers(artifact: Path) -> None:
    """The checkpoint is bf16; compare with the source in bf16 as long as its choice is not a near tie."""
    model = llmc.load(artifact)
    prompt = model.tokenize("import os\nimport sys\n\n\nclass ")
    ours = model.generate(prompt, max_tokens=24, temperature=0).token_ids
    source = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = source(torch.tensor([prompt + list(ours)])).logits[0].numpy()
    for i, token in enumerate(ours):
        row = logits[len(prompt) - 1 + i]
        assert row[token] >= row.max() - 0.1, f"token {i}: {row.max() - row[token]} below the best"


def test_perplexity_equals_the_sources(artifact: Path) -> None:
    """The issue's bound: within 0.1 % of transformers in float32 on the held-out text."""
    model = llmc.load(artifact)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    windows = cut(model.tokenize(text, special_tokens=False), max_tokens=4096)
    source = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    found = evaluate(lambda ids: model.logits(list(ids)), windows, against=sequence_logits(source))
    assert found.against is not None
    assert abs(found.against.increase_percent) < 0.1


def test_moves_to_a_machine_with_only_the_runtime(artifact: Path, tmp_path: Path) -> None:
    """A virtual environment with the runtime's dependencies alone: no torch, no transformers."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(artifact, moved)
    python = runtime_environment(tmp_path / "venv")
    code = (
        "import importlib.util as u\n"
        "assert not u.find_spec('torch') and not u.find_spec('transformers')\n"
        "import llmc, sys\n"
        f"m = llmc.load({str(moved / 'model.so')!r})\n"
        "r = m.generate('import os', max_tokens=16, temperature=0)\n"
        "assert not any(n.startswith(('llmc.passes', 'llmc.frontend', 'llmc.pipeline')) for n in sys.modules)\n"
        "print(r.token_ids)\n"
    )
    done = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    here = llmc.load(artifact).generate("import os", max_tokens=16, temperature=0)
    assert done.stdout.strip() == str(here.token_ids)


def runtime_environment(folder: Path) -> str:
    """A virtual environment that sees llmc and the distributions that it requires without extras; no network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for name in required("llmc-compiler"):
        for file in importlib.metadata.files(name) or ():
            top = file.parts[0]
            source = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if top != ".." and source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    (site / "llmc").symlink_to(ROOT / "llmc")
    return str(folder / "bin" / "python")


def required(name: str) -> list[str]:
    """The distributions that `name` needs, itself left out, followed to the end."""
    from packaging.requirements import Requirement

    found: list[str] = []
    queue = [name]
    while queue:
        for text in importlib.metadata.requires(queue.pop()) or ():
            requirement = Requirement(text)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and requirement.name not in found:
                try:
                    importlib.metadata.distribution(requirement.name)
                except importlib.metadata.PackageNotFoundError:
                    continue
                found.append(requirement.name)
                queue.append(requirement.name)
    return found


def test_any_flipped_byte_is_refused(artifact: Path, tmp_path: Path) -> None:
    """At the start, the end and 12 random places of every file."""
    rng = np.random.default_rng(0)
    for file in sorted(artifact.iterdir()):
        size = file.stat().st_size
        for at in [0, size - 1, *rng.integers(0, size, 12).tolist()]:
            damaged = tmp_path / "damaged"
            shutil.copytree(artifact, damaged)
            raw = bytearray((damaged / file.name).read_bytes())
            raw[at] ^= 0x10
            (damaged / file.name).write_bytes(raw)
            with pytest.raises(LlmcError) as caught:
                llmc.load(damaged)
            assert "\n" not in caught.value.message
            shutil.rmtree(damaged)


def test_a_wrong_artifact_is_never_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that drops its window would pass unnoticed without the check; here a wrong weight layout in one layer."""
    from llmc import packing

    right = packing.pack_tensor

    def wrong(param, tensor):
        array = right(param, tensor)
        return np.roll(array, 1) if param.source.endswith("layers.1.mlp.down_proj.weight") else array

    monkeypatch.setattr(packing, "pack_tensor", wrong)
    with pytest.raises(LlmcError) as caught:
        compile_model(tiny_model("llama"), tmp_path / "artifact", target="cpu")
    assert caught.value.ref == "verify-failed"
    assert "model.layers.1" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_many_generations_leave_no_page(artifact: Path) -> None:
    model = llmc.load(artifact, kv_pages=8)
    for i in range(6):  # two pages each: had one of them kept its pages, the last would find none
        model.generate([1, 5 + i, 9], max_tokens=40, temperature=1.0, seed=i)
    with pytest.raises(LlmcError, match="page"):
        model.generate(list(range(3, 1500)), max_tokens=4)
    model.generate([1, 2, 3], max_tokens=4)
    assert model.memory().kv_in_use == 0
