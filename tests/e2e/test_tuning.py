"""Tuning a tiny model by the command line: interrupted, resumed, used, and the artifact tuned again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmc.artifact import TUNING, Manifest
from llmc.schedules.records import Status, read_records
from tests.e2e.conftest import ROOT
from tests.e2e.conftest import llmc_command as llmc
from tests.frontend.tiny import save, tiny_model

pytest.importorskip("xgboost", reason="the cost model needs xgboost")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_tune_interrupt_resume_compile(tmp_path: Path) -> None:
    model = save(tiny_model("llama", dtype=torch.bfloat16, hidden_size=128), tmp_path / "model")
    records = tmp_path / "records.jsonl"
    command = ["tune", str(model), "--budget", "20m", "--records", str(records)]
    running = subprocess.Popen(
        [sys.executable, "-m", "llmc", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    end = time.monotonic() + 240
    while not records.exists() or len(records.read_bytes().splitlines()) < 8:
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and b"what was measured is kept" in output
    kept = read_records(records)
    assert len(kept) >= 7 and {r.status for r in kept} == {Status.OK}
    # the second run begins with what is known
    llmc(*command[:2], "--budget", "40s", "--records", records)
    after = {r.identity for r in read_records(records)}
    assert after > {r.identity for r in kept}
    out = tmp_path / "out"
    llmc("compile", model, "-o", out, "--records", records, "--max-step-tokens", "64")
    manifest = Manifest.from_text((out / "manifest.json").read_text(), "manifest")
    if manifest.tuning_records:  # nothing may have beaten the defaults
        travelling = read_records(out / TUNING)
        assert [r.to_json() for r in travelling] == [
            json.loads(json.dumps(r)) for r in manifest.tuning_records
        ]
        again = tmp_path / "again"
        llmc("compile", model, "-o", again, "--records", out / TUNING, "--max-step-tokens", "64")
        assert (again / TUNING).read_bytes() == (out / TUNING).read_bytes()
    said = llmc("tune", out, "--budget", "5s", "--records", records).stdout
    assert "measurements known before" in said and " 0 measurements known" not in said
