"""Where candidates are tried: built by processes side by side, then measured by one process alone on the machine."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from llmc.errors import LlmcError
from llmc.schedules.records import Status
from llmc.schedules.tunable import key_of
from llmc.targets.runner import Limits
from llmc.tune.building import BuildPool
from llmc.tune.job import Job, Outcome
from llmc.tune.remote import RemoteWorker
from llmc.tune.workers import Crashed, Hung, Worker, serve_command

_PREPARE_SECONDS = 300.0
_LIMITS_SECONDS = 120.0
_MEASURE_SECONDS = 10.0  # beside 100 calls of the default schedule
_DEFAULT_CALLS = 100


class Lab(ABC):
    """Tries candidates of jobs."""

    @abstractmethod
    def limits(self) -> Limits:
        """The machine's limits."""

    def expect(self, jobs: Sequence[Job]) -> None:  # noqa: B027  whoever builds nothing has nothing to do
        """Told before `default` whose turn it will be, the next one first: what can be done for several at a time, is."""

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


class MeasuringLab(Lab):
    """A lab with a measuring process; where libraries come from is its subclasses' matter.

    Args:
        target: as in ``--target``, with its preset.
        measurer: what measures: the command of a process here, or a process on another machine.
        seconds: that measuring one candidate may take beside 100 calls of the default schedule.

    Attributes:
        spent: what the tuner waited for -> seconds; parts of the measuring process's time are indented.
    """

    def __init__(
        self,
        target: str,
        measurer: list[str] | RemoteWorker | None = None,
        seconds: float | None = None,
    ) -> None:
        self._measurer = (
            measurer
            if isinstance(measurer, RemoteWorker)
            else Worker(measurer or serve_command("measure", target))
        )
        self._measurer.start()
        self._measure_seconds = seconds or _MEASURE_SECONDS
        self._prepared: tuple[str, int] | None = None
        self._last_default: Outcome | None = None
        self.spent: defaultdict[str, float] = defaultdict(float)

    @abstractmethod
    def _libraries(self, job: Job, schedules: Sequence[Any]) -> dict[Any, Path | Outcome]:
        """Library of each schedule, for the job's bucket, or why there is none."""

    @abstractmethod
    def _default_library(self, job: Job) -> Path | Outcome:
        """Library of the default schedule, for any number of rows."""

    def _done_with(self, path: Path) -> None:
        """A candidate's library is not needed any more."""

    def __enter__(self) -> MeasuringLab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def restarts(self) -> int:
        """How often a process had to be replaced."""
        return self._measurer.restarts

    def limits(self) -> Limits:
        try:
            with self._waiting("start"):
                self._measurer.wait()
            with self._waiting("limits"):
                answer = self._measurer.ask({"do": "limits"}, _LIMITS_SECONDS)
        except (Crashed, Hung) as e:
            raise LlmcError(
                "limits-unmeasured", f"The machine's limits could not be measured: the process {e}."
            ) from None
        if "failure" in answer:
            self._replace_ended(answer)
            raise LlmcError(
                "limits-unmeasured", f"The machine's limits could not be measured: {answer['failure']}."
            )
        return Limits(answer["read"], answer["peak"])

    def default(self, job: Job) -> Outcome:
        self._prepared = None
        return self._prepare(job)

    def measure(
        self, job: Job, schedules: Sequence[Any], seconds: float = 0.25
    ) -> Iterator[tuple[Any, Outcome]]:
        with self._waiting("build"):
            built = self._libraries(job, schedules)
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
                    "best": job.best_ratio if schedule not in job.measured else 0.0,
                }
                with self._waiting("measure"):
                    outcome = self._ask(question, limit)
                yield schedule, outcome
        finally:
            for path in built.values():
                if isinstance(path, Path):
                    self._done_with(path)

    def close(self) -> None:
        self._measurer.close()

    def _prepare(self, job: Job) -> Outcome:
        """Have the measuring process ready for the job; the outcome of its default schedule."""
        key = (_key(job), job.rows)
        if self._prepared == key and self._last_default is not None:
            return self._last_default
        with self._waiting("build"):
            library = self._default_library(job)
        if isinstance(library, Outcome):
            return library
        question = {
            "do": "prepare",
            "rule": job.tunable.name,
            "task": job.values,
            "rows": job.rows,
            "path": str(library),
        }
        with self._waiting("prepare"):
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
            self._replace_ended(answer)
            return Outcome(Status.CRASHED, note=answer["failure"])
        for what, took in answer.get("spent", {}).items():
            self.spent[f"  {what}"] += took
        fields = ("seconds", "ratio", "default", "error", "note")
        return Outcome(Status(answer["status"]), **{k: answer[k] for k in fields if k in answer})

    def _replace_ended(self, answer: dict[str, Any]) -> None:
        """Let go of a process that ends with its failure; the next question starts another."""
        if answer.get("ends"):
            self._prepared = None
            self._measurer.renew()

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.spent[what] += time.monotonic() - begin


class ProcessLab(MeasuringLab):
    """The lab of a target at hand: build processes and the measuring process on this machine.

    Args:
        target: as in ``--target``, with its preset.
        builders: build processes; they rest while something is measured.
        build_command, measurer, build_seconds, measure_seconds: see BuildPool and MeasuringLab.
    """

    def __init__(
        self,
        target: str,
        builders: int | None = None,
        build_command: list[str] | None = None,
        measurer: list[str] | RemoteWorker | None = None,
        build_seconds: float | None = None,
        measure_seconds: float | None = None,
    ) -> None:
        super().__init__(target, measurer, measure_seconds)
        self._pool = BuildPool(target, builders, build_command, build_seconds)
        self._defaults: dict[str, Path | Outcome] = {}

    @property
    def restarts(self) -> int:
        return super().restarts + self._pool.restarts

    def _libraries(self, job: Job, schedules: Sequence[Any]) -> dict[Any, Path | Outcome]:
        return self._pool.build(job, schedules)

    def expect(self, jobs: Sequence[Job]) -> None:
        # for any number of rows: one build serves all buckets
        missing: dict[str, Job] = {}
        for job in jobs:
            if _key(job) not in self._defaults and len(missing) < self._pool.size:
                missing.setdefault(_key(job), job)
        # one of several that are needed soon is no reason to build
        if jobs and _key(jobs[0]) in missing:
            with self._waiting("build"):
                built = self._pool.build_defaults(list(missing.values()))
            self._defaults.update(zip(missing, built, strict=True))

    def _default_library(self, job: Job) -> Path | Outcome:
        if _key(job) not in self._defaults:
            (self._defaults[_key(job)],) = self._pool.build_defaults([job])
        return self._defaults[_key(job)]

    def _done_with(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def close(self) -> None:
        super().close()
        self._pool.close()


def _key(job: Job) -> str:
    """Equal for all buckets of a task."""
    return key_of({"rule": job.tunable.name, "task": job.values})
