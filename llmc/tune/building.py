"""Build workers side by side: candidates become libraries."""

from __future__ import annotations

import os
import select
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmc.schedules.records import Status
from llmc.tune.job import Job, Outcome
from llmc.tune.workers import Crashed, Hung, Worker, serve_command

_BUILD_SECONDS = 60.0


class BuildPool:
    """Processes that build candidates; they rest while nothing is asked for.

    Args:
        target: as in ``--target``, with its preset.
        count: of processes; None = one per core, 8 at most.
        command: of a process.
        seconds: that one candidate may take.
    """

    def __init__(
        self,
        target: str,
        count: int | None = None,
        command: list[str] | None = None,
        seconds: float | None = None,
    ) -> None:
        count = count or max(1, min(8, os.cpu_count() or 1))
        self._workers = [Worker(command or serve_command("build", target)) for _ in range(count)]
        self._seconds = seconds or _BUILD_SECONDS
        self._work = tempfile.TemporaryDirectory(prefix="llmc-tune-")
        self._number = 0
        for worker in self._workers:
            worker.start()  # all at once: each takes seconds to import tvm

    @property
    def folder(self) -> Path:
        """Where the libraries are, as long as the pool is open."""
        return Path(self._work.name)

    @property
    def restarts(self) -> int:
        return sum(worker.restarts for worker in self._workers)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self._workers)

    def build(self, job: Job, schedules: Sequence[Any]) -> dict[Any, Path | Outcome]:
        """Library of each schedule, or why there is none, for the job's bucket only."""
        bucket = {"low": job.bucket.low, "high": job.bucket.high}
        return self._build({schedule: {**_question(job, schedule), **bucket} for schedule in schedules})

    def build_defaults(self, jobs: Sequence[Job]) -> list[Path | Outcome]:
        """Library of each job's default schedule, or why there is none, for any number of rows."""
        questions = {i: _question(job, job.space.default) for i, job in enumerate(jobs)}
        built = self._build(questions)
        return [built[i] for i in questions]

    def _build(self, questions: Mapping[Any, dict[str, Any]]) -> dict[Any, Path | Outcome]:
        waiting = list(questions)
        done: dict[Any, Path | Outcome] = {}
        busy: dict[Worker, tuple[Any, Path, float]] = {}
        idle = list(self._workers)
        while waiting or busy:
            while waiting and idle:
                key, worker = waiting.pop(0), idle.pop()
                self._number += 1
                # never a name again: loaders cache
                path = self.folder / f"candidate-{self._number}.so"
                worker.send({**questions[key], "path": str(path)})
                busy[worker] = (key, path, time.monotonic() + self._seconds)
            for worker in _ready(busy):
                key, path, end = busy.pop(worker)
                done[key] = _built(worker, path, max(0.0, end - time.monotonic()))
                idle.append(worker)
        return done

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._work.cleanup()


def _question(job: Job, schedule: Any) -> dict[str, Any]:
    """What a build process is asked, for any number of rows."""
    of = {"rule": job.tunable.name, "task": job.values, "schedule": asdict(schedule)}
    return {**of, "low": 0, "high": 0}


def _built(worker: Worker, path: Path, seconds: float) -> Path | Outcome:
    try:
        answer = worker.receive(seconds)
    except (Crashed, Hung) as e:
        return Outcome(Status.UNBUILT, note=f"the compiler: {e}")
    if "failure" in answer:
        return Outcome(Status.UNBUILT, note=answer["failure"])
    return path


def _ready(busy: dict[Worker, tuple[Any, Path, float]]) -> list[Worker]:
    """Workers that have answered, ended or run out of time; waits until there is one."""
    left = max(0.0, min(end for _, _, end in busy.values()) - time.monotonic())
    ready = list(select.select(list(busy), [], [], left)[0])
    return ready or [min(busy, key=lambda worker: busy[worker][2])]
