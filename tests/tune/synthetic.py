"""A kernel class whose speed is a formula, and a lab that knows it: searches are tested without building anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmc.caps import Capabilities
from llmc.schedules.choice import ByRows
from llmc.schedules.records import Status
from llmc.schedules.tunable import BUCKETS, Arguments, Bucket, Knob, Space, Tunable, Work
from llmc.targets.runner import Limits
from llmc.tune.job import Job, Outcome
from llmc.tune.lab import Lab

CAPS = Capabilities("toy", "toy/one", "none", "none", vector_bytes=16, threads=2)


@dataclass(frozen=True)
class ToySchedule:
    layout: int = 0
    tile: int = 8
    unroll: int = 1
    ahead: int = 0


@dataclass(frozen=True)
class ToyConfig:
    n: int
    dtype: str = "float32"
    schedule: ByRows[ToySchedule] = ByRows((ToySchedule(),))  # noqa: RUF009

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "dtype": self.dtype, "schedule": self.schedule.to_json()}


class Toy(Tunable):
    name = "toy"
    config_type = ToyConfig
    schedule_type = ToySchedule
    shared = ("layout",)

    def task(self, config: ToyConfig) -> ToyConfig:
        return replace(config, schedule=ByRows((ToySchedule(),)))

    def buckets(self, task: ToyConfig) -> tuple[Bucket, ...]:
        return BUCKETS[:3]

    def space(self, task: ToyConfig, bucket: Bucket, caps: Capabilities) -> Space:
        knobs = (
            Knob("layout", (0, 1, 2)),
            Knob("tile", (1, 2, 4, 8, 16, 32, 64)),
            Knob("unroll", (1, 2, 4, 8, 16)),
            Knob("ahead", tuple(range(0, 4096, 256))),
        )
        return Space(ToySchedule(), knobs, lambda s: s.tile * s.unroll <= 256)

    def scheduled(self, config: ToyConfig, schedule: ByRows[Any]) -> ToyConfig:
        return replace(config, schedule=schedule)

    def schedules_of(self, config: ToyConfig) -> ByRows[Any]:
        return config.schedule

    def build(self, config: Any, caps: Capabilities) -> Any:
        raise NotImplementedError

    def inputs(self, task: Any, rows: int, rng: np.random.Generator) -> dict[str, Any]:
        raise NotImplementedError

    def arguments(
        self, task: Any, schedule: Any, case: Any, caps: Capabilities, packed: Any = None
    ) -> Arguments:
        raise NotImplementedError

    def reference(self, task: Any, case: Any) -> Any:
        raise NotImplementedError

    def work(self, task: ToyConfig, rows: int) -> Work:
        return Work(float(task.n), float(task.n * rows), "float32")

    def terms(
        self, task: ToyConfig, schedule: ToySchedule, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        return {"area": float(schedule.tile * schedule.unroll), "waste": task.n % schedule.tile / task.n}


def toy_ratio(task: ToyConfig, rows: int, s: ToySchedule) -> float:
    """Time over the default's: best at a tile and distance that depend on the size, with layout 2 and unroll 4."""
    want = 4 if task.n < 1000 else 32
    cost = 1 + 0.15 * abs(np.log2(s.tile / want)) + 0.1 * abs(np.log2(s.unroll / 4))
    cost += 0.2 * (s.layout != 2) + abs(s.ahead - (1024 + 256 * rows)) / 8000
    return float(cost)


class ToyLab(Lab):
    """Knows the formula; each trial takes a second of a clock that only it moves.

    Args:
        hurt: schedule -> outcome that it gives instead, for candidates that fail.
        stop_after: raise KeyboardInterrupt at this trial.
    """

    def __init__(self, hurt: Callable[[Any], Outcome | None] | None = None, stop_after: int = 0) -> None:
        self.now, self.tried = 0.0, 0
        self.hurt, self.stop_after = hurt, stop_after
        self.log: list[tuple[str, Any]] = []

    def clock(self) -> float:
        return self.now

    def limits(self) -> Limits:
        return Limits(1e9, {"float32": 1e12})

    def default(self, job: Job) -> Outcome:
        self.now += 1
        seconds = job.roofline * 4
        return Outcome(Status.OK, seconds, 1.0, seconds)

    def measure(
        self, job: Job, schedules: Sequence[Any], seconds: float = 0.25
    ) -> Iterator[tuple[Any, Outcome]]:
        for schedule in schedules:
            self.tried += 1
            if self.tried == self.stop_after:
                raise KeyboardInterrupt
            self.now += 1
            self.log.append((job.name, schedule))
            bad = self.hurt(schedule) if self.hurt else None
            if bad is not None:
                yield schedule, bad
                continue
            ratio = toy_ratio(job.task, job.rows, schedule) / toy_ratio(job.task, job.rows, job.space.default)
            yield schedule, Outcome(Status.OK, job.default_seconds * ratio, ratio, job.default_seconds)


def toy_jobs(*sizes: int, rows: Sequence[int] = (1, 4)) -> list[Job]:
    """A job per size and number of rows; larger tasks take more of the step."""
    tunable = Toy()
    jobs = []
    for n in sizes:
        for r in rows:
            bucket = next(b for b in BUCKETS if b.low <= r <= b.high)
            jobs.append(Job.of(tunable, ToyConfig(n), bucket, r, CAPS, ((0 if r == 1 else 1, 1.0),)))
    return jobs


def best_ratio(job: Job) -> float:
    """Of the whole space."""
    default = toy_ratio(job.task, job.rows, job.space.default)
    return min(toy_ratio(job.task, job.rows, s) / default for s in job.space)
