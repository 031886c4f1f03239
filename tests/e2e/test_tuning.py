"""Tuning a tiny model by the command line: interrupted, resumed, used, and the artifact tuned again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
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


def interrupt(command: list[object], records: Path, lines: int) -> tuple[int, str]:
    """Run llmc, press Ctrl-C once the database has so many lines; (exit code, what it printed)."""
    running = subprocess.Popen(
        [sys.executable, "-m", "llmc", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    end = time.monotonic() + 240
    while not records.exists() or len(records.read_bytes().splitlines()) < lines:
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    return running.returncode, output.decode()


def test_compile_with_a_budget(tmp_path: Path) -> None:
    """Interrupted: nothing of the artifact is left, the records are kept. Then to the end: they are used and travel."""
    model = save(tiny_model("llama", dtype=torch.bfloat16, hidden_size=128), tmp_path / "model")
    records, out = tmp_path / "records.jsonl", tmp_path / "out"
    command = [
        "compile",
        model,
        "-o",
        out,
        "--quant",
        "w4a8",
        "--records",
        records,
        "--max-step-tokens",
        "64",
    ]
    code, said = interrupt([*command, "--tune", "20m"], records, 6)
    assert code == 130 and "interrupted" in said, said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "records.jsonl"]
    kept = read_records(records)
    assert len(kept) >= 5 and "int_linear" in {r.rule for r in kept}
    llmc(*command, "--tune", "40s")
    assert {r.identity for r in read_records(records)} > {r.identity for r in kept}
    manifest = Manifest.from_text((out / "manifest.json").read_text(), "manifest")
    assert manifest.quality.prefill_max_abs_error is not None
    assert bool(manifest.tuning_records) == (out / TUNING).exists()
    assert "decode" in llmc("bench", out, "--prompt", "8", "--tokens", "4", "--rounds", "1").stdout
    # as another llmc would read them: kernels that have changed since are said, and not used
    stale = tmp_path / "stale.jsonl"
    stale.write_text("".join(_stale(line) for line in records.read_text().splitlines(keepends=True)))
    refused = llmc(*command[:4], "--records", stale, code=2)
    assert "[records-other-version]" in refused.stderr


def _stale(line: str) -> str:
    values = json.loads(line)
    return json.dumps({**values, "code": "0" * 16} if "code" in values else values) + "\n"


def test_tune_interrupt_resume_compile(tmp_path: Path) -> None:
    model = save(tiny_model("llama", dtype=torch.bfloat16, hidden_size=128), tmp_path / "model")
    records = tmp_path / "records.jsonl"
    command = ["tune", str(model), "--budget", "20m", "--records", str(records)]
    code, output = interrupt(command, records, 8)
    assert code == 0 and "what was measured is kept" in output
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


def test_shipped_records_are_used_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile without --records takes what ships with llmc, and the manifest lists it."""
    from llmc.pipeline import compile_model
    from llmc.pipeline.lower import lower_model
    from llmc.schedules import tuned_choice
    from llmc.schedules.records import Record, RecordFile
    from llmc.schedules.tunable import code_of
    from llmc.spec import CompileSpec
    from llmc.targets.backend import get
    from llmc.tune.extract import jobs_of, kernel_uses
    from llmc.tune.sources import tvm_version

    model = save(tiny_model("llama", dtype=torch.float32), tmp_path / "model")
    spec = CompileSpec(str(model), max_step_tokens=32)
    backend, caps = get("cpu")
    uses = kernel_uses(lower_model(str(model), spec)[1].module)
    jobs = jobs_of(uses, backend.tunables(), caps, max_batch=1, max_step_tokens=32)
    job = next(j for j in jobs if j.tunable.name == "linear" and j.rows == 1)
    schedule = {**vars(job.space.default), "prefetch": 0}
    record = Record(
        "linear", 1, job.values, 1, 1, 1, schedule, caps.preset, tvm_version(), "a processor, 2 threads",
        code=code_of(job.tunable, caps), seconds=1e-6, ratio=0.5, share=0.1,
    )  # fmt: skip
    more = replace(record, low=2, high=4, rows=4, schedule={**schedule, "prefetch": 512})
    RecordFile(tmp_path / "tuned" / "cpu.jsonl").append([record, more])
    monkeypatch.setattr(tuned_choice, "SHIPPED", tmp_path / "tuned")
    manifest = compile_model(str(model), tmp_path / "out", spec=spec).manifest
    assert manifest is not None and manifest.tuning_records == (record.to_json(), more.to_json())
    assert read_records(tmp_path / "out" / TUNING) == [record, more]
    chosen = [u["config"]["schedule"] for u in manifest.tasks if "schedule" in u["config"]]
    tuned = [s for s in chosen if s["choices"][0] == schedule]
    # the kernel that runs has the records' schedules, and between them thresholds by the number of rows
    assert tuned and all(s["limits"] == [1, 4] and s["choices"][1] == more.schedule for s in tuned)
    assert manifest.quality.prefill_max_abs_error is not None  # which a wrong kernel would not pass
