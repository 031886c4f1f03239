"""The quality gate on a compiled model: figures in the manifest, bounds that refuse, and llmc eval on the artifact."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import llmc
import llmc.packing
from llmc.artifact import MANIFEST
from llmc.cli.app import app
from llmc.errors import LlmcError
from llmc.pipeline import compile_model
from tests.shared import made_once
from tests.texts import random_text, save_tiny

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parent.parent.parent
OPTIONS = {"dtype": "bf16", "verify": "off", "max_seq_len": 256, "eval_tokens": 600}


def make_folder(folder: Path) -> None:
    save_tiny(folder / "checkpoint")
    (folder / "text.txt").write_text(random_text(4000))
    compile_model(
        str(folder / "checkpoint"),
        folder / "artifact",
        eval_text=str(folder / "text.txt"),
        max_kl=0.05,
        max_ppl_increase="5%",
        **OPTIONS,
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint/, text.txt and artifact/, which was compiled with an evaluation; only to be read."""
    return made_once(tmp_path_factory, "gate", make_folder)


def test_the_manifest_holds_the_figures(folder: Path) -> None:
    text = llmc.load(folder / "artifact").manifest.quality.text
    assert text is not None
    assert 500 < text.tokens < 600 and text.window == 256
    assert 0 < text.kl_mean < text.kl_p99 < 0.05
    assert 0.9 < text.top1_agreement <= 1
    ratio = text.perplexity / text.source_perplexity
    assert text.increase_percent == pytest.approx(100 * (ratio - 1), abs=1e-3)
    assert [layer.path for layer in text.layers] == ["model.layers.0", "model.layers.1"]
    # rounding to bfloat16 is 2**-9 at most; the source does the same
    for layer in text.layers:
        assert 1e-4 < layer.error < 3e-2
        assert layer.error < 2 * layer.source_error


def test_a_bound_that_is_exceeded_leaves_the_old_artifact(folder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(folder / "artifact", tmp_path / "artifact")
    before = {p.name: p.stat().st_mtime_ns for p in old.iterdir()}
    beside = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(LlmcError) as caught:
        compile_model(
            str(folder / "checkpoint"),
            old,
            eval_text=str(folder / "text.txt"),
            max_kl=1e-9,
            **OPTIONS,
        )
    assert caught.value.ref == "quality-gate"
    assert "allowed 1e-09" in caught.value.message and "model.layers.0" in caught.value.message
    # two compiles of one spec have the same figures
    text = llmc.load(old).manifest.quality.text
    assert text is not None and f"divergence is {text.kl_mean:.3g} nats" in caught.value.message
    assert caught.value.context == {layer.path: layer.error for layer in text.layers}
    assert {p.name: p.stat().st_mtime_ns for p in old.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == beside


def llmc_command(*arguments: str | Path) -> dict[str, object]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_eval_against_the_source_repeats_the_gates_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers run on the artifact's mapped weights: packing them once more would take memory and lose a calibration."""
    packed: list[object] = []
    monkeypatch.setattr(llmc.packing, "packed_tensors", lambda params, *_: (packed.extend(params), ())[1])
    found = llmc_command(
        "eval", folder / "artifact", "--text", folder / "text.txt", "--against", folder / "checkpoint",
        "--max-tokens", "600", "--layers", "--json",
    )  # fmt: skip
    manifest = json.loads((folder / "artifact" / MANIFEST).read_text())
    wanted = manifest["quality"]["text"]
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
    against = found["against"]
    assert isinstance(against, dict)
    assert against["kl_mean"] == pytest.approx(wanted["kl_mean"], rel=1e-3)
    assert against["perplexity"] == pytest.approx(wanted["source_perplexity"], rel=1e-5)
    assert found["layers"] == wanted["layers"]
    assert packed == []


def test_perplexity_is_that_of_transformers(folder: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32)
    ids = llmc.load(folder / "artifact").tokenize((folder / "text.txt").read_text(), special_tokens=False)
    losses = []
    for at in range(0, 512, 128):
        piece = torch.tensor(ids[at : at + 128])
        with torch.no_grad():
            logits = model(piece[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none"))
    found = llmc_command(
        "eval", folder / "artifact", "--text", folder / "text.txt", "--against", folder / "checkpoint",
        "--max-tokens", "512", "--window", "128", "--json",
    )  # fmt: skip
    against = found["against"]
    assert isinstance(against, dict)
    assert against["perplexity"] == pytest.approx(float(np.exp(torch.cat(losses).mean())), rel=1e-5)


def test_eval_needs_only_the_runtime(folder: Path) -> None:
    """Without torch, also against another artifact."""
    code = (
        "import sys\nsys.modules.update(torch=None, transformers=None)\nfrom llmc.cli import main\nmain()\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "eval",
        str(folder / "artifact"),
        "--text",
        str(folder / "text.txt"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, env=environment, check=False)

    done = run("--against", str(folder / "artifact"), "--max-tokens", "512")
    assert done.returncode == 0, done.stderr
    assert "same top token  100.00 %" in done.stdout
    done = run("--against", str(folder / "checkpoint"))
    assert done.returncode == 2
    assert "needs the package torch" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-tokens", "100"], "100 tokens; an evaluation needs at least one window of 256"),
        (["--window", "1000"], "at most 256 tokens"),
        (["--layers"], "Add --against MODEL"),
        (["--max-tokens", "-1"], "at least 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(folder: Path, arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(
        app, ["eval", str(folder / "artifact"), "--text", str(folder / "text.txt"), *arguments]
    )
    assert done.exit_code == 2
    assert words in done.stderr


def test_auto_searches_before_it_compiles(folder: Path, tmp_path: Path) -> None:
    result = compile_model(
        str(folder / "checkpoint"),
        tmp_path / "auto",
        quant="auto",
        eval_text=str(folder / "text.txt"),
        calib_text=str(folder / "text.txt"),
        max_ppl_increase="1%",
        stop_after="search",
        **{**OPTIONS, "eval_tokens": 256},
    )
    assert [t.stage for t in result.runner.timings] == ["search"]
    assert result.output is None and list(tmp_path.iterdir()) == []


# a kernel for every shape in every scheme that was chosen: over a minute of code generation
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["auto", "auto-a8"])
def test_auto_finds_schemes_within_the_bound(quant: str, folder: Path, tmp_path: Path) -> None:
    """Some weights fixed by a rule, the rest searched; the manifest holds what was chosen, and the gate agrees."""
    result = compile_model(
        str(folder / "checkpoint"),
        tmp_path / "auto",
        quant=quant,
        quant_rules={"lm_head": "q8"},
        eval_text=str(folder / "text.txt"),
        max_ppl_increase="1%",
        **{**OPTIONS, "eval_tokens": 256},
    )
    assert result.search is not None and result.manifest is not None
    spec = result.manifest.spec
    assert spec["quant"] == "none"
    rules = dict(map(tuple, spec["quant_rules"]))
    assert rules == dict(result.search.rules())
    assert rules.pop("lm_head") == "q8"
    layouts = {
        p.layout.partition("(")[2].partition(",")[0] for p in result.manifest.params if "quant(" in p.layout
    }
    assert layouts == {"q8", *rules.values()} - {"none"}
    if quant == "auto-a8":  # activations are rounded in the artifact that the gate measures
        assert any(scheme.startswith("w") for scheme in rules.values())
    text = result.manifest.quality.text
    assert text is not None and text.increase_percent <= 1.0
    assert result.search.choice.nbytes < 0.6 * result.search.full_bytes
