"""Processes that crash, hang or answer nonsense, and one real kernel through the real services."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict

import pytest

from llmc.errors import LlmcError
from llmc.host import cache_bytes
from llmc.schedules.linear import LinearConfig, LinearSchedule
from llmc.schedules.records import Status
from llmc.schedules.tunable import BUCKETS
from llmc.schedules.tune_linear import TunableLinear
from llmc.targets.backend import get
from llmc.tune.job import Job
from llmc.tune.lab import ProcessLab
from llmc.tune.measuring import Measurer, Stopwatch
from llmc.tune.serve import Builder
from llmc.tune.workers import Crashed, Hung, Worker

# answers a JSON line by what its field "do" or "schedule" asks for
_ACTOR = """
import json, os, socket, sys, time
s = socket.socket(fileno=int(sys.argv[-1]))
f = s.makefile("rwb")
def say(x): f.write(json.dumps(x).encode() + b"\\n"); f.flush()
say({"ready": True})
for line in f:
    q = json.loads(line)
    tile = q.get("schedule", {}).get("rows_tile", 0)
    if "path" in q and "low" in q:                                     # build
        if tile == 1: say({"failure": "ScheduleError: no"}); continue
        if tile == 2: os._exit(3)
        open(q["path"], "w").write("library")
    elif q.get("do") == "measure":
        if tile == 3: os.kill(os.getpid(), 11)
        if tile == 4: time.sleep(60)
        if tile == 5: say({"status": "wrong", "error": 9.0, "note": "error 9 of what is allowed"}); continue
    say({"status": "ok", "seconds": 0.5, "ratio": 0.5, "default": 1.0, "error": 0.1, "pid": os.getpid()})
"""
ACTOR = [sys.executable, "-S", "-c", _ACTOR]


def job(**changes):
    caps = get("cpu")[1]
    task = TunableLinear().task(LinearConfig(128, 96, "float32", "float32", "float32", **changes))
    made = Job.of(TunableLinear(), task, BUCKETS[1], 4, caps)
    made.default_seconds = 1e-4
    return made


def test_a_worker_is_replaced_when_it_crashes_or_hangs():
    worker = Worker(ACTOR)
    try:
        first = worker.ask({}, 30)["pid"]
        assert worker.ask({}, 30)["pid"] == first
        with pytest.raises(Crashed, match="signal 11"):
            worker.ask({"do": "measure", "schedule": {"rows_tile": 3}}, 30)
        second = worker.ask({}, 30)["pid"]
        assert second != first
        begin = time.monotonic()
        with pytest.raises(Hung, match="within 1 s"):
            worker.ask({"do": "measure", "schedule": {"rows_tile": 4}}, 1)
        assert time.monotonic() - begin < 10
        assert worker.ask({}, 30)["pid"] not in (first, second) and worker.restarts == 2
    finally:
        worker.close()


def test_a_worker_that_cannot_start_is_the_users_to_know():
    worker = Worker([sys.executable, "-c", "raise SystemExit(7)"])
    with pytest.raises(LlmcError, match="status 7") as error:
        worker.ask({}, 30)
    assert error.value.ref == "worker-failed"


def test_every_way_to_fail_is_an_outcome():
    schedules = [LinearSchedule(rows_tile=tile) for tile in range(7)]
    with ProcessLab("cpu", 2, ACTOR, ACTOR, measure_seconds=2) as lab:
        tried = job()
        assert lab.default(tried).status is Status.OK
        found = dict(lab.measure(tried, schedules, seconds=0.1))
        left = list(lab._pool.folder.iterdir())
        assert [found[s].status for s in schedules] == [
            Status.OK, Status.UNBUILT, Status.UNBUILT, Status.CRASHED, Status.HUNG, Status.WRONG, Status.OK,
        ]  # fmt: skip
        assert found[schedules[1]].note == "ScheduleError: no" and "exit status 3" in found[schedules[2]].note
        assert found[schedules[3]].note == "signal 11" and "no answer within" in found[schedules[4]].note
        assert found[schedules[0]].ratio == 0.5 and found[schedules[0]].default == 1.0
        assert lab.restarts == 3 and len(left) == 1  # the default's library
    assert not lab._pool.folder.exists() and lab._measurer._process is None


def test_default_schedules_are_built_side_by_side():
    jobs = [job(), job(has_bias=True), job(activation="relu")]
    with ProcessLab("cpu", 2, ACTOR, ACTOR) as lab:
        libraries = lambda: len(list(lab._pool.folder.iterdir()))  # noqa: E731
        lab.expect([jobs[0], jobs[0], *jobs[1:]])
        assert libraries() == 2  # as many as there are processes, of different tasks
        lab.expect(jobs[1:])
        assert libraries() == 2  # the next one is there
        assert all(lab.default(made).status is Status.OK for made in jobs)
        assert libraries() == 3


@pytest.fixture(scope="module")
def services():
    backend, caps = get("cpu")
    return Builder(backend, caps), Measurer(backend, caps)


def question(made, schedule, path, low=0, high=0, rows=4):
    return {
        "rule": made.tunable.name, "task": made.values, "schedule": asdict(schedule),
        "low": low, "high": high, "rows": rows, "path": str(path),
    }  # fmt: skip


def test_a_real_kernel_is_built_checked_and_timed(services, tmp_path):
    build, measure = services
    made = job(has_bias=True)
    default, other = LinearSchedule(), LinearSchedule(vectors=2, rows_tile=2, k_block=64, prefetch=0)
    for name, schedule, bucket in (("default", default, (0, 0)), ("other", other, (2, 4))):
        assert build.answer(question(made, schedule, tmp_path / f"{name}.so", *bucket))["seconds"] > 0
    prepared = measure.answer({"do": "prepare", **question(made, default, tmp_path / "default.so")})
    assert prepared["status"] == "ok" and prepared["ratio"] == 1 and 0 < prepared["error"] < 1
    answer = measure.answer(
        {"do": "measure", "schedule": asdict(other), "path": str(tmp_path / "other.so"), "seconds": 0.05}
    )
    assert (
        answer["status"] == "ok" and answer["seconds"] > 0 and answer["ratio"] > 0 and answer["default"] > 0
    )
    # weights are cold: copies of them together are larger than the last cache, or as many as are kept
    lists = measure._job._place(default, Stopwatch())[1]
    assert len(lists) == 256 or len(lists) * 128 * 96 * 4 > cache_bytes()


def test_a_kernel_that_computes_something_else_is_wrong(services, tmp_path):
    build, measure = services
    made, other = job(), job(activation="relu")
    assert "seconds" in build.answer(question(made, LinearSchedule(), tmp_path / "right.so"))
    assert "seconds" in build.answer(question(other, LinearSchedule(), tmp_path / "wrong.so"))
    assert (
        measure.answer({"do": "prepare", **question(made, LinearSchedule(), tmp_path / "right.so")})["ratio"]
        == 1
    )
    answer = measure.answer(
        {"do": "measure", "schedule": asdict(LinearSchedule()), "path": str(tmp_path / "wrong.so")}
    )
    assert answer["status"] == "wrong" and "seconds" not in answer and answer["error"] > 1
    # and one that leaves part of the result unwritten
    assert (
        measure.answer({"do": "prepare", **question(other, LinearSchedule(), tmp_path / "right.so")})[
            "status"
        ]
        == "wrong"
    )
