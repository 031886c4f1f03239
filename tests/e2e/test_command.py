"""The commands of the README on the demo model, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmc.artifact import MANIFEST, Manifest
from tests.e2e.conftest import ROOT, CompiledDemo, llmc_command
from tests.shared import TINY

pytestmark = pytest.mark.e2e


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_compile_tells_what_it_did(demo: CompiledDemo) -> None:
    for text in (
        "[1/7] capture",
        "[7/7] verify",
        "FuseOps",
        "peak RSS after",
        "checked (sample",
        "LlamaForCausalLM",
    ):
        assert text in demo.printed, text
    manifest = Manifest.from_text((demo.artifact / MANIFEST).read_text(), "x")
    assert manifest.quality.mode == "sample" and manifest.quality.prefill_max_abs_error is not None
    dumps = sorted(p.name for p in demo.dumps.iterdir())
    assert dumps[0].startswith("000_capture_") and any("_lower_LowerLinear" in name for name in dumps)


def test_run_streams_text_and_a_line_of_figures(artifact: Path) -> None:
    done = llmc_command("run", artifact, "def read_file(path):", "--max-tokens", "24", "--threads", "1")
    assert len(done.stdout.strip()) > 20
    assert "tok/s | decode 23 steps" in done.stderr and "memory" in done.stderr
    again = llmc_command("run", artifact, "def read_file(path):", "--max-tokens", "24", "--threads", "1")
    assert again.stdout == done.stdout


def test_inspect_shows_both_functions(artifact: Path) -> None:
    done = llmc_command("inspect", artifact)
    for text in ("step", "decode", "block_table_0", "g0", "6 layers", "model.so", "torch"):
        assert text in done.stdout, text
    assert "problem" not in done.stdout
    inside = json.loads(llmc_command("inspect", artifact / "model.so", "--json").stdout)
    beside = json.loads(llmc_command("inspect", artifact, "--json").stdout)
    assert inside["files"].items() < beside["files"].items()
    assert {**inside, "files": {}} == {**beside, "files": {}}


def test_the_same_spec_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    """In another process, to another place, by the command line instead of Python."""
    options = ["--dtype", TINY["dtype"], "--max-seq-len", str(TINY["max_seq_len"])]
    llmc_command("compile", tiny_llama.parent / "checkpoint", *options, "-o", tmp_path / "again", "-q")
    assert digests(tmp_path / "again") == digests(tiny_llama)


def test_ctrl_c_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "dist" / "demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "llmc", "compile", str(tiny_llama.parent / "checkpoint"), "-o", str(output)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "capture" in process.stderr.readline()  # the first stage is done, the second is running
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.endswith("llmc: interrupted.\n") and "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_a_flipped_byte_is_noticed(artifact: Path, tmp_path: Path) -> None:
    for name in ("model.so", "weights-00001.safetensors", MANIFEST, "tokenizer.json"):
        copy = tmp_path / name
        copy.mkdir()
        for file in artifact.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        raw = bytearray((copy / name).read_bytes())
        raw[len(raw) // 2] ^= 4
        (copy / name).write_bytes(raw)
        done = llmc_command("run", copy, "x", "--max-tokens", "1", code=2)
        assert name in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_bench_counts_every_kernel_that_runs(demo: CompiledDemo) -> None:
    from llmc.bench import Sizes, measure_steps
    from llmc.limits import MachineLimits
    from llmc.runtime.model import load

    model = load(demo.artifact)
    limits = MachineLimits(1, 10e9, {"f32": 1e11, "bf16": 2e11, "int8": 4e11})
    decode, step = measure_steps(model, Sizes(100, 1, 1, 2), limits)
    for found in (decode, step):
        listed = {f.name: f for f in model.manifest.functions}[found.function].kernels
        assert {row.name: row.calls for row in found.rows} == {k.name: k.calls for k in listed}
        assert found.kernel_seconds > 0 and found.rows[0].seconds >= found.rows[-1].seconds
    # a decode step reads every weight of the linear layers once
    weights = sum(p.nbytes for p in model.manifest.params)
    assert 0.8 * weights < sum(row.moved or 0 for row in decode.rows) < 1.5 * weights
    llmc_command("bench", demo.artifact, "--tokens", "3", "--rounds", "1", "--prompt", "20")
