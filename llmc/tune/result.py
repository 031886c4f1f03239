"""What a run of the tuner tells while it goes on, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmc.caps import Capabilities
from llmc.schedules.choice import ByRows
from llmc.schedules.records import Record
from llmc.schedules.tuned_choice import choose
from llmc.targets.runner import Limits
from llmc.tune.job import Job, Outcome


class TuneProgress:
    """Told what the tuner does. This base class is silent."""

    def started(self, jobs: Sequence[Job], limits: Limits, budget: float) -> None:
        """Jobs are known, nothing is measured yet."""

    def note(self, text: str) -> None:
        """Something to know about the run, before it starts."""

    def phase(self, text: str) -> None:
        """What happens now."""

    def measured(self, job: Job, schedule: Any, outcome: Outcome, left: float) -> None:
        """One more measurement; `left` seconds of the budget remain."""

    def finished(self, result: TuneResult) -> None:
        """The end."""


@dataclass(frozen=True)
class TuneResult:
    """What a run brought.

    Attributes:
        jobs: with all that is known about them.
        trials: candidates tried in this run.
        known: measurements that were in the database.
        failures: status -> how many candidates of this run ended so.
        restarts: processes that had to be replaced.
        seconds: of this run.
        interrupted: by Ctrl-C.
        limits: of the machine.
        spent: what the run waited for -> seconds; parts of a measurement are indented.
        curve: (seconds since the start, gain at that time) after each improvement of the search.
        gain: expected step time under the traffic with what was chosen, over that with default schedules.
    """

    jobs: tuple[Job, ...]
    trials: int
    known: int
    failures: dict[str, int]
    restarts: int
    seconds: float
    interrupted: bool
    limits: Limits | None
    gain: float
    spent: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()

    def seconds_to(self, share: float) -> float:
        """When so large a share of the time that the whole run saves was saved; 0 if it saves nothing."""
        saved = [(t, 1 - gain) for t, gain in self.curve]
        wanted = share * (1 - self.gain)
        return next((t for t, s in saved if s >= wanted), self.seconds) if wanted > 0 else 0.0


def step_gain(jobs: Sequence[Job], caps: Capabilities) -> float:
    """Step time under the traffic with the chosen schedules over that with the default ones."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if job.default_seconds:
            groups.setdefault(job.key(caps.preset), []).append(job)
    total, tuned = 0.0, 0.0
    for group in groups.values():
        choice = choose_for(group, caps)[0]
        for job in group:
            ratio = 1.0
            if choice is not None:
                outcome = job.measured.get(choice.at(job.rows))
                ratio = outcome.ratio if outcome is not None and outcome.ratio else 1.0
            total += job.share
            tuned += job.share * ratio
    return tuned / total if total else 1.0


def choose_for(group: Sequence[Job], caps: Capabilities) -> tuple[ByRows[Any] | None, tuple[Record, ...]]:
    """What the measurements of all buckets of a task choose, and the records behind it."""
    own = [
        job.record(s, outcome, caps.preset, "", "") for job in group for s, outcome in job.measured.items()
    ]
    choice = choose(group[0].tunable, group[0].task, own, caps)
    return (choice.schedule, choice.records) if choice else (None, ())
