"""A tuning job: one kernel task in one bucket of rows, and what has been found out about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from llmc.caps import Capabilities
from llmc.schedules.records import Record, Status, task_key
from llmc.schedules.tunable import Bucket, Space, Tunable, code_of

IMPROVEMENT = 0.01  # a schedule counts as better if it saves this share of the time


@dataclass(frozen=True)
class Outcome:
    """What trying a candidate gave; see Record for the fields. `default` = seconds of the default measured in turns."""

    status: Status
    seconds: float = 0.0
    ratio: float = 0.0
    default: float = 0.0
    error: float = 0.0
    note: str = ""


@dataclass
class Job:
    """One task in one bucket.

    Attributes:
        tunable, task, bucket, rows: what is tuned, and the number of rows that stands for the bucket.
        space: of its schedules.
        code: what the kernel class generates (llmc.schedules.tunable.code_of).
        calls: (number of a kind of step, calls of the kernel in it); see llmc.tune.extract.
        share: of the step time under the traffic, with default schedules.
        roofline: least possible seconds.
        default_seconds: of the default schedule; 0 until measured.
        measured: schedule -> outcome, from this run or earlier ones.
        seeds: schedules to try first.
        history: best ratio after each trial of this run and earlier ones.
        spent, trials: seconds and candidates of this run.
        failure: why the job cannot be tuned (its default schedule does not run), else "".
    """

    tunable: Tunable
    task: Any
    bucket: Bucket
    rows: int
    space: Space
    code: str = ""
    calls: tuple[tuple[int, float], ...] = ()
    share: float = 0.0
    roofline: float = 0.0
    default_seconds: float = 0.0
    measured: dict[Any, Outcome] = field(default_factory=dict)
    seeds: list[Any] = field(default_factory=list)
    history: list[float] = field(default_factory=list)
    spent: float = 0.0
    trials: int = 0
    failure: str = ""

    @staticmethod
    def of(
        tunable: Tunable,
        task: Any,
        bucket: Bucket,
        rows: int,
        caps: Capabilities,
        calls: tuple[tuple[int, float], ...] = (),
    ) -> Job:
        space = tunable.space(task, bucket, caps)
        return Job(tunable, task, bucket, rows, space, code_of(tunable, caps), calls)

    @cached_property
    def size(self) -> int:
        """How many schedules the space has."""
        return sum(1 for _ in self.space)

    @property
    def values(self) -> dict[str, Any]:
        """The task as JSON values."""
        return self.tunable.to_values(self.task)

    def key(self, preset: str) -> str:
        """Equal to task_key of the job's records."""
        return task_key(self.tunable.name, self.tunable.version, self.code, self.values, preset)

    @property
    def name(self) -> str:
        """A short name for people, e.g. ``linear 8192x2048 bfloat16 silu gated, 65-512 rows``."""
        return f"{self.short_name}, {self.bucket} row{'s' * (self.bucket.high != 1)}"

    @property
    def short_name(self) -> str:
        """The same without the bucket."""
        return task_name(self.tunable.name, self.values)

    def best(self) -> tuple[Any, Outcome] | None:
        """The fastest schedule so far."""
        good = [(s, o) for s, o in self.measured.items() if o.status is Status.OK]
        return min(good, key=lambda item: item[1].ratio) if good else None

    @property
    def best_ratio(self) -> float:
        found = self.best()
        return found[1].ratio if found else 1.0

    @property
    def best_seconds(self) -> float:
        """Time of the best schedule, on the scale of the default's."""
        return self.default_seconds * self.best_ratio

    @property
    def efficiency(self) -> float:
        """Least possible time over the best so far; 0 before a measurement."""
        return self.roofline / self.best_seconds if self.best_seconds else 0.0

    def add(self, schedule: Any, outcome: Outcome) -> None:
        """Note what a candidate gave."""
        self.measured[schedule] = outcome
        if outcome.default:
            # the least disturbed of all measurements of the default
            self.default_seconds = min(self.default_seconds or outcome.default, outcome.default)
        self.history.append(min(self.best_ratio, self.history[-1] if self.history else math.inf))

    def stale(self) -> int:
        """Trials since the last improvement."""
        if not self.history:
            return 0
        now = self.history[-1]
        since = 0
        for ratio in reversed(self.history):
            if ratio > now * (1 + IMPROVEMENT):
                break
            since += 1
        return since

    def record(self, schedule: Any, outcome: Outcome, preset: str, tvm: str, device: str) -> Record:
        """The outcome as a record."""
        return Record(
            rule=self.tunable.name,
            version=self.tunable.version,
            task=self.values,
            low=self.bucket.low,
            high=self.bucket.high,
            rows=self.rows,
            schedule=asdict(schedule),
            preset=preset,
            tvm=tvm,
            device=device,
            code=self.code,
            status=outcome.status,
            seconds=outcome.seconds,
            ratio=outcome.ratio,
            share=self.share,
            roofline=self.roofline,
            error=outcome.error,
            note=outcome.note,
        )

    def recall(self, records: Iterable[Record]) -> None:
        """Take over records of this very job (same task, preset, versions and device)."""
        for record in records:
            schedule = self.tunable.schedule_type(**record.schedule)
            if schedule not in self.space:
                continue
            outcome = Outcome(record.status, record.seconds, record.ratio, 0.0, record.error, record.note)
            self.add(schedule, outcome)
            if schedule == self.space.default:
                if record.status is Status.OK:
                    self.default_seconds = record.seconds
                else:
                    self.failure = f"the default schedule {record.status.value}: {record.note}"


def task_name(rule: str, task: Mapping[str, Any]) -> str:
    """A task's JSON values in a few words: sizes first, then what is not the usual."""
    values = dict(task)
    sizes = [str(values.pop(name)) for name in ("experts", "n", "k") if name in values]
    layout = values.pop("layout", None)
    if isinstance(layout, dict):
        sizes += [str(layout.get(name, "")) for name in (("k",) if "n" in task else ("n", "k"))]
        values["in_dtype"] = layout.get("scheme", "")
    heads = [str(values.pop(name)) for name in ("heads", "kv_heads", "key_dim") if name in values]
    words = [rule, "x".join(filter(None, sizes)) or "/".join(heads)]
    words.append(str(values.pop("in_dtype", values.pop("dtype", ""))))
    for name in ("activation", "window", "chunk"):
        if values.get(name):
            words.append(str(values[name]) if name == "activation" else f"{name} {values[name]}")
    words += [word for flag, word in (("gated", "gated"), ("has_residual", "add")) if values.get(flag)]
    return " ".join(filter(None, words))


def schedule_text(schedule: Any, default: Any) -> str:
    """What a schedule does otherwise than the default."""
    changed = [
        f"{f.name}={getattr(schedule, f.name)}"
        for f in fields(schedule)
        if getattr(schedule, f.name) != getattr(default, f.name)
    ]
    return " ".join(changed) or "default"
