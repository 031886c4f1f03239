"""What ships of a database, and the figures of the cost model, from records that are made up."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmc.schedules.linear import LinearConfig, LinearSchedule
from llmc.schedules.records import Record, RecordFile, read_records
from llmc.schedules.tunable import bucket_of, code_of
from llmc.targets.backend import get
from llmc.tune.sources import tvm_version
from tools import ship_tuning, tune_report

TARGET = "cpu/x86-64-v3"
BF16 = ("bfloat16", "bfloat16", "bfloat16")


def record(target: str, n: int, rows: int, ratio: float, schedule: LinearSchedule) -> Record:
    backend, caps = get(target)
    tunable = next(t for t in backend.tunables() if t.name == "linear")
    bucket = bucket_of(rows)
    return Record(
        "linear", 1, tunable.to_values(tunable.task(LinearConfig(n, 256, *BF16))), bucket.low, bucket.high, rows,
        vars(schedule), caps.preset, tvm_version(), "here", code=code_of(tunable, caps),
        seconds=ratio / 3e3, ratio=ratio, share=0.5, roofline=1e-5, note="so",
    )  # fmt: skip


def test_what_choices_rest_on_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ship_tuning, "SHIPPED", tmp_path)
    plain, fast, slow = LinearSchedule(), LinearSchedule(prefetch=0), LinearSchedule(prefetch=512)

    def shipped(*records: Record) -> list[tuple[int, float]]:
        database = tmp_path / "db"
        database.unlink(missing_ok=True)
        RecordFile(database).append(records)
        ship_tuning.ship(Namespace(file=database, target=TARGET))
        kept = read_records(tmp_path / "cpu-x86-64-v3.jsonl")
        assert not any(r.note for r in kept)
        return [(r.task["n"], r.ratio) for r in kept]

    best = record(TARGET, 64, 1, 0.8, fast)
    others = [
        record(TARGET, 64, 1, 1.0, plain),
        record(TARGET, 64, 1, 0.9, slow),
        replace(record(TARGET, 64, 1, 0.1, LinearSchedule(unroll=2)), code="0" * 16),
        replace(record(TARGET, 64, 1, 0.1, LinearSchedule(unroll=8)), tvm="0.1"),
        record(TARGET, 128, 1, 0.99, fast),  # not worth a schedule of its own
    ]
    assert shipped(best, *others) == [(64, 0.8)]
    assert "1 records of 1 tasks, 0 kept" in " ".join(capsys.readouterr().out.split())
    # another task joins it, a better schedule for the same task takes its place
    assert shipped(record(TARGET, 128, 8, 0.5, fast)) == [(64, 0.8), (128, 0.5)]
    assert shipped(record(TARGET, 64, 1, 0.7, slow)) == [(128, 0.5), (64, 0.7)]
    # a layout that costs prompts what it brings to decode is left to those who tune for their own traffic
    narrow = LinearSchedule(vectors=1)
    pays = record(TARGET, 256, 1, 0.5, narrow), record(TARGET, 256, 100, 1.05, narrow)
    assert shipped(*pays, record(TARGET, 256, 1, 0.9, fast))[-1] == (256, 0.9)
    # kernels that have changed since are dropped
    path = tmp_path / "cpu-x86-64-v3.jsonl"
    path.write_text(path.read_text().replace('"version":1}', '"version":2}'))
    assert shipped(best) == [(64, 0.8)]


def test_figures_of_the_cost_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xgboost", reason="the cost model needs xgboost")
    monkeypatch.setattr(tune_report, "_REPEATS", 4)
    backend, caps = get("cpu")
    tunable = next(t for t in backend.tunables() if t.name == "linear")
    rng, made = np.random.default_rng(0), []
    for n in (512, 1024):
        task = tunable.task(LinearConfig(n, 256, *BF16))
        drawn = {tunable.space(task, bucket_of(1), caps).random(rng) for _ in range(90)}
        # near prefetching and wide blocks are slow
        made += [
            record("cpu", n, 1, 0.5 + abs(np.log2(max(s.prefetch, 256) / 4096)) / 8 + s.unroll / 20, s)
            for s in drawn
        ]
    RecordFile(tmp_path / "db").append(made)
    tune_report.report(tmp_path / "db")
    lines = capsys.readouterr().out.splitlines()
    assert sum("linear" in line for line in lines) == 2
    far, near, random, model, transfer = map(float, lines[-1].split()[1:])
    assert far > 0.9 and near > 0.9 and transfer < 3 and transfer <= model <= random
