"""Where candidates are built and measured: build workers side by side, then one measuring process alone on the machine."""

from __future__ import annotations

import os
import select
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from llmc.errors import LlmcError
from llmc.schedules.records import Status
from llmc.schedules.tunable import key_of
from llmc.targets.runner import Limits
from llmc.tune.job import Job, Outcome
from llmc.tune.workers import Crashed, Hung, Worker, serve_command

_BUILD_SECONDS = 60.0
_PREPARE_SECONDS = 300.0
_LIMITS_SECONDS = 120.0
_MEASURE_SECONDS = 10.0  # beside 100 calls of the default schedule
_DEFAULT_CALLS = 100


class Lab(ABC):
    """Tries candidates of jobs."""

    @abstractmethod
    def limits(self) -> Limits:
        """The machine's limits."""

    @abstractmethod
    def default(self, job: Job) -> Outcome:
        """Measure the default schedule."""

    @abstractmethod
    def measure(
        self, job: Job, schedules: Sequence[Any], seconds: float = 0.25
    ) -> Iterator[tuple[Any, Outcome]]:
        """Build all, then measure one after another; gives (schedule, outcome) as soon as each is known."""

    def close(self) -> None:  # noqa: B027  nothing to end is fine
        """End what runs."""


class ProcessLab(Lab):
    """The lab of a real target.

    Args:
        target: as in ``--target``, with its preset.
        builders: build processes; they rest while something is measured.
        build_command, measure_command: of the processes.

    Attributes:
        restarts: how often a process had to be replaced.
    """

    def __init__(
        self,
        target: str,
        builders: int | None = None,
        build_command: list[str] | None = None,
        measure_command: list[str] | None = None,
        build_seconds: float = _BUILD_SECONDS,
        measure_seconds: float = _MEASURE_SECONDS,
    ) -> None:
        count = builders or max(1, min(8, os.cpu_count() or 1))
        self._builders = [Worker(build_command or serve_command("build", target)) for _ in range(count)]
        self._measurer = Worker(measure_command or serve_command("measure", target))
        self._build_seconds, self._measure_seconds = build_seconds, measure_seconds
        self._work = tempfile.TemporaryDirectory(prefix="llmc-tune-")
        self._number = 0
        self._prepared: tuple[str, int] | None = None
        self._last_default: Outcome | None = None
        self._defaults: dict[str, Path] = {}
        for worker in (*self._builders, self._measurer):
            worker.start()  # all at once: each takes seconds to import tvm

    def __enter__(self) -> ProcessLab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def restarts(self) -> int:
        return sum(worker.restarts for worker in (*self._builders, self._measurer))

    def limits(self) -> Limits:
        try:
            answer = self._measurer.ask({"do": "limits"}, _LIMITS_SECONDS)
        except (Crashed, Hung) as e:
            raise LlmcError(
                "limits-unmeasured", f"The machine's limits could not be measured: the process {e}."
            ) from None
        return Limits(answer["read"], answer["peak"])

    def default(self, job: Job) -> Outcome:
        self._prepared = None
        return self._prepare(job)

    def measure(
        self, job: Job, schedules: Sequence[Any], seconds: float = 0.25
    ) -> Iterator[tuple[Any, Outcome]]:
        built = self._build_all(job, schedules)
        limit = self._measure_seconds + seconds + _DEFAULT_CALLS * job.default_seconds
        try:
            for schedule in schedules:
                path = built[schedule]
                if isinstance(path, Outcome):
                    yield schedule, path
                    continue
                ready = self._prepare(job)
                if ready.status is not Status.OK:
                    yield schedule, ready
                    return
                question = {
                    "do": "measure",
                    "schedule": asdict(schedule),
                    "path": str(path),
                    "seconds": seconds,
                }
                yield schedule, self._ask(question, limit)
        finally:
            for path in built.values():
                if isinstance(path, Path):
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        for worker in (*self._builders, self._measurer):
            worker.close()
        self._work.cleanup()

    def _prepare(self, job: Job) -> Outcome:
        """Have the measuring process ready for the job; the outcome of its default schedule."""
        key = (key_of({"rule": job.tunable.name, "task": job.values}), job.rows)
        if self._prepared == key and self._last_default is not None:
            return self._last_default
        if key[0] not in self._defaults:
            # for any number of rows: one build serves all buckets
            built = self._build_all(job, [job.space.default], whole=True)[job.space.default]
            if isinstance(built, Outcome):
                return built
            self._defaults[key[0]] = built
        question = {
            "do": "prepare",
            "rule": job.tunable.name,
            "task": job.values,
            "rows": job.rows,
            "path": str(self._defaults[key[0]]),
        }
        outcome = self._ask(question, _PREPARE_SECONDS)
        if outcome.status is Status.OK:
            self._prepared, self._last_default = key, outcome
        return outcome

    def _ask(self, question: dict[str, Any], seconds: float) -> Outcome:
        """What the measuring process says; a new process is started, and prepared again, where it does not."""
        try:
            answer = self._measurer.ask(question, seconds)
        except Crashed as e:
            self._prepared = None
            return Outcome(Status.CRASHED, note=str(e))
        except Hung as e:
            self._prepared = None
            return Outcome(Status.HUNG, note=str(e))
        if "failure" in answer:
            return Outcome(Status.CRASHED, note=answer["failure"])
        fields = ("seconds", "ratio", "default", "error", "note")
        return Outcome(Status(answer["status"]), **{k: answer[k] for k in fields if k in answer})

    def _build_all(
        self, job: Job, schedules: Sequence[Any], whole: bool = False
    ) -> dict[Any, Path | Outcome]:
        """Library of each schedule, or why there is none; the builders work side by side."""
        waiting = list(dict.fromkeys(schedules))
        done: dict[Any, Path | Outcome] = {}
        busy: dict[Worker, tuple[Any, Path, float]] = {}
        idle = list(self._builders)
        while waiting or busy:
            while waiting and idle:
                schedule, worker = waiting.pop(0), idle.pop()
                self._number += 1
                path = (
                    Path(self._work.name) / f"candidate-{self._number}.so"
                )  # never a name again: loaders cache
                bucket = {"low": 0, "high": 0} if whole else {"low": job.bucket.low, "high": job.bucket.high}
                question = {
                    "rule": job.tunable.name,
                    "task": job.values,
                    "schedule": asdict(schedule),
                    "path": str(path),
                    **bucket,
                }
                worker.send(question)
                busy[worker] = (schedule, path, time.monotonic() + self._build_seconds)
            for worker in _ready(busy):
                schedule, path, end = busy.pop(worker)
                done[schedule] = self._built(worker, path, max(0.0, end - time.monotonic()))
                idle.append(worker)
        return done

    def _built(self, worker: Worker, path: Path, seconds: float) -> Path | Outcome:
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
