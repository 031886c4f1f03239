"""Real kernels that hang, crash, are wrong or do not build, in real processes: dropped, counted, reported, remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.cli.tune_view import conclusions
from llmc.schedules.records import RecordFile, Status, read_records
from llmc.targets.backend import get
from llmc.tune.job import Job
from llmc.tune.lab import ProcessLab
from llmc.tune.tuner import Tuner
from tests.tune.awkward import (
    CRASHES,
    HANGS,
    NOT_BUILT,
    RIGHT,
    WRONG,
    Awkward,
    AwkwardConfig,
    AwkwardSchedule,
    command,
)

pytest.importorskip("xgboost", reason="the cost model needs xgboost")
pytestmark = pytest.mark.slow


def test_awkward_candidates_are_dropped_counted_and_remembered(tmp_path: Path) -> None:
    caps = get("cpu")[1]
    path = tmp_path / "records"

    def run(budget: float) -> tuple[Job, object]:
        job = Job.of(Awkward(), AwkwardConfig(4096), Awkward().buckets(None)[0], 1, caps, ((0, 1.0),))
        with ProcessLab(caps.preset, 1, command("build"), command("measure"), measure_seconds=2) as lab:
            return job, Tuner([job], lab, RecordFile(path), caps, "1", "here").run(budget)

    job, result = run(120)
    expected = {
        WRONG: Status.WRONG,
        HANGS: Status.HUNG,
        CRASHES: Status.CRASHED,
        NOT_BUILT: Status.UNBUILT,
    }
    found = {s.kind: o for s, o in job.measured.items()}
    assert {kind: found[kind].status for kind in expected} == expected
    assert result.failures == {"wrong": 1, "hung": 1, "crashed": 1, "unbuilt": 1} and result.restarts == 2
    assert found[WRONG].error > 1 and "no answer within" in found[HANGS].note
    assert found[CRASHES].note == "signal 11" and "there is no such kernel" in found[NOT_BUILT].note
    best = job.best()
    assert best is not None and best[0].kind not in expected and found[RIGHT].status is Status.OK
    assert "dropped: 1 crashed, 1 hung, 1 unbuilt, 1 wrong" in "\n".join(conclusions(result))
    statuses = {AwkwardSchedule(**r.schedule).kind: r.status for r in read_records(path)}
    assert {kind: statuses[kind] for kind in expected} == expected
    # a later run does not try them again
    again, later = run(60)
    assert later.failures == {} and later.known == 6 and {s.kind for s in again.measured} == set(range(6))
