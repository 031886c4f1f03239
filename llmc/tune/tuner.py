"""The tuner: spends a budget of time on jobs, and writes down what it measures as it goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmc.caps import Capabilities
from llmc.schedules.records import Record, RecordFile, Status
from llmc.targets.runner import Limits
from llmc.tune.extract import shares
from llmc.tune.job import Job, Outcome
from llmc.tune.lab import Lab
from llmc.tune.model import CostModel
from llmc.tune.result import TuneProgress, TuneResult, choose_for, step_gain
from llmc.tune.scheduler import LEAST_SHARE, next_job, settled
from llmc.tune.search import propose

_BATCH = 8
_CONFIRM = 0.25  # share of the budget that is kept for measuring the winners again
_CONFIRM_SECONDS = 0.8
_DEFAULTS = 0.5  # share of the budget that measuring default schedules may take
_CONFIRMATIONS = 3
_CALLS_PER_TRIAL = 15  # of the default's length, at least
_WORTH_CONFIRMING = 0.98  # ratios above are no gain to speak of
_SEEDS = 3  # from similar tasks
_DISTURBED = 1.3  # times the default's least time


@dataclass
class Tuner:
    """Args:

    jobs: what to tune.
    lab: where.
    records: what is known, and where measurements are written.
    more: further records to learn from and to seed the search (shipped ones, other versions, other devices).
    caps, tvm, device: of this run's records.
    """

    jobs: Sequence[Job]
    lab: Lab
    records: RecordFile
    caps: Capabilities
    tvm: str
    device: str
    more: Iterable[Record] = ()
    progress: TuneProgress = field(default_factory=TuneProgress)
    seed: int = 0
    batch: int = _BATCH
    use_model: bool = True
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._models: dict[str, CostModel] = {}
        self._trials = 0
        self._failures: Counter[str] = Counter()
        self._spent = 0.0
        self._curve: list[tuple[float, float]] = []

    def run(self, budget: float) -> TuneResult:
        """Tune for `budget` seconds, or until nothing is left to try; Ctrl-C ends it early and keeps what was found."""
        begin = self._begin = self.clock()
        self._end = begin + budget
        interrupted = False
        limits: Limits | None = None
        known = self._recall()
        try:
            self._seed_from_similar()
            if not all(job.default_seconds and settled(job) for job in self.jobs if not job.failure):
                limits = self.lab.limits()
                for job in self.jobs:
                    job.roofline = limits.least_seconds(job.tunable.work(job.task, job.rows))
                self.progress.started(self.jobs, limits, budget)
                self._measure_defaults(limits)
                self._search(self._end - _CONFIRM * budget)
                self._complete()
                self._confirm()
                self._write_defaults()
        except KeyboardInterrupt:
            interrupted = True
        result = TuneResult(
            jobs=tuple(self.jobs),
            trials=self._trials,
            known=known,
            failures=dict(self._failures),
            restarts=getattr(self.lab, "restarts", 0),
            seconds=self.clock() - begin,
            interrupted=interrupted,
            limits=limits,
            gain=step_gain(self.jobs, self.caps),
            spent=dict(getattr(self.lab, "spent", {})),
            curve=tuple(self._curve),
        )
        self.progress.finished(result)
        return result

    # -- what is known already ---------------------------------------------------------------------------------------

    def _recall(self) -> int:
        """Take over what earlier runs measured; the cost models learn from it and from similar tasks."""
        by_key: dict[str, list[Record]] = {}
        here = [r for r in self.records if r.preset == self.caps.preset]
        for record in here:
            if record.tvm == self.tvm and record.device == self.device:
                by_key.setdefault(record.task_key, []).append(record)
        known = 0
        for job in self.jobs:
            own = [r for r in by_key.get(job.key(self.caps.preset), []) if r.bucket == job.bucket]
            job.recall(own)
            known += len(job.measured)
            job.share = max((r.share for r in own), default=0.0)
            job.roofline = next((r.roofline for r in own if r.roofline), 0.0)
        if self.use_model:
            others = [r for r in self.more if r.preset == self.caps.preset]
            for tunable in {job.tunable.name: job.tunable for job in self.jobs}.values():
                model = self._models.setdefault(tunable.name, CostModel(tunable, self.caps))
                model.learn_records([*others, *here])
        return known

    def _seed_from_similar(self) -> None:
        """The best schedules of the most similar tasks, of other versions and devices too, are tried first."""
        best: dict[tuple[str, int, str], Record] = {}
        for record in (*self.more, *self.records):
            if record.status is Status.OK and record.preset == self.caps.preset:
                key = (record.rule, record.low, record.task_key)
                if key not in best or record.ratio < best[key].ratio:
                    best[key] = record
        for job in self.jobs:
            near: list[tuple[float, int, Record]] = []
            for record in best.values():
                # of other versions of the kernel too: a seed is a guess, which is measured
                if record.rule != job.tunable.name or record.low != job.bucket.low:
                    continue
                try:
                    far = distance(job, job.tunable.from_values(record.task), record.rows)
                except ValueError:
                    continue
                near.append((far, len(near), record))
            for _, _, record in sorted(near)[:_SEEDS]:
                self._add_seed(job, job.space.nearest(record.schedule))

    def _add_seed(self, job: Job, schedule: Any) -> None:
        if schedule in job.space and schedule not in job.measured and schedule not in job.seeds:
            job.seeds.append(schedule)

    # -- the phases --------------------------------------------------------------------------------------------------

    def _measure_defaults(self, limits: Limits) -> None:
        """Every job's default schedule: what candidates are compared with, and what the shares come from."""
        self.progress.phase("measuring default schedules")
        shares(self.jobs)
        waiting = [job for job in self.jobs if not job.default_seconds and not job.failure]
        # what is left waits for the next run: without a search the defaults are of no use
        end = self.clock() + _DEFAULTS * (self._end - self.clock())
        while waiting and self.clock() < end:
            waiting.sort(key=lambda j: -j.share)
            if waiting[0].share < LEAST_SHARE:
                break
            self.lab.expect([job for job in waiting if job.share >= LEAST_SHARE])
            job = waiting.pop(0)
            outcome = self.lab.default(job)
            if outcome.status is not Status.OK:
                job.failure = f"the default schedule {outcome.status.value}: {outcome.note}"
                self._failures[outcome.status.value] += 1
            else:
                job.default_seconds = outcome.default or outcome.seconds
                outcome = replace(outcome, ratio=1.0)
            job.add(job.space.default, outcome)
            shares(self.jobs)
            self._write(job, job.space.default, outcome)
            self.progress.measured(job, job.space.default, outcome, self._end - self.clock())
        self._write_defaults()

    def _write_defaults(self) -> None:
        """The defaults' records again: shares need all times, and the least disturbed time may be a later one."""
        shares(self.jobs)
        known = [job for job in self.jobs if job.space.default in job.measured and not job.failure]
        for job in known:
            job.measured[job.space.default] = replace(
                job.measured[job.space.default], seconds=job.default_seconds
            )
        self.records.append(
            self._record(job, job.space.default, job.measured[job.space.default]) for job in known
        )

    def _search(self, end: float) -> None:
        self.progress.phase("searching")
        while self.clock() < end:
            jobs = [job for job in self.jobs if job.default_seconds]
            usual = self._spent / self._trials if self._trials else 1.5
            job = next_job(jobs, self._rng, usual)
            if job is None:
                return
            cost = max(job.spent / job.trials if job.trials else usual, 0.05)
            count = int(min(self.batch, max(1, (end - self.clock()) / cost)))
            schedules = self._propose(job, count)
            before = job.best()
            self._try(job, schedules, end)
            after = job.best()
            if after is not None and after != before:
                self._tell_buckets(job, after[0])
                gain = step_gain(self.jobs, self.caps)
                self._curve.append((self.clock() - self._begin, gain))

    def _propose(self, job: Job, count: int) -> list[Any]:
        score = None
        if self.use_model:
            model = self._models.setdefault(job.tunable.name, CostModel(job.tunable, self.caps))
            score = lambda schedules: model.predict(job.task, job.rows, schedules)  # noqa: E731
        found = propose(job, count, self._rng, score)
        # those with the same layout one after the other, the most promising layout first: the weight is packed once
        layouts = list(dict.fromkeys(_shared(s, job.tunable.shared) for s in found))
        return sorted(found, key=lambda s: layouts.index(_shared(s, job.tunable.shared)))

    def _try(self, job: Job, schedules: Sequence[Any], end: float, seconds: float = 0.25) -> None:
        """Measure candidates and write each down at once; stops at the end of the budget."""
        begin = self.clock()
        for schedule, outcome in self.lab.measure(job, schedules, seconds):
            if _is_doubtful(job, outcome):
                outcome = dict(self.lab.measure(job, [schedule], seconds)).get(schedule, outcome)
            again = schedule in job.measured
            job.add(schedule, outcome)
            if outcome.status is not Status.OK:
                self._failures[outcome.status.value] += 1
            self._write(job, schedule, outcome)
            if not again:
                self._trials += 1
                job.trials += 1
                if self.use_model:
                    ok = outcome.status is Status.OK
                    model = self._models.setdefault(job.tunable.name, CostModel(job.tunable, self.caps))
                    model.learn(job.task, job.rows, schedule, outcome.ratio or 1.0, ok=ok)
            self.progress.measured(job, schedule, outcome, self._end - self.clock())
            if self.clock() >= end:
                break
        job.spent += self.clock() - begin
        self._spent += self.clock() - begin

    def _time_for(self, job: Job) -> bool:
        """Whether one more trial of the job fits into the budget."""
        usual = self._spent / self._trials if self._trials else 1.0
        return self.clock() + usual + _CALLS_PER_TRIAL * job.default_seconds < self._end

    def _tell_buckets(self, job: Job, schedule: Any) -> None:
        """A new best is tried in the task's other buckets too, whose layout it shares, and in like tasks if it pays."""
        pays = job.best_ratio < _WORTH_CONFIRMING
        for other in self.jobs:
            if other is job or other.tunable is not job.tunable:
                continue
            # what earlier runs have settled costs no trial here
            if other.task == job.task or (pays and other.bucket == job.bucket and not settled(other)):
                self._add_seed(other, other.space.nearest(_values(schedule)))

    def _complete(self) -> None:
        """Measure what the choice of shared fields needs: the values that won somewhere, in every bucket of the task."""
        self.progress.phase("completing")
        for group in self._tasks():
            shared = group[0].tunable.shared
            if not shared:
                continue
            usual = _shared(group[0].space.default, shared)
            won = [(job.best(), job) for job in group if job.best_ratio < _WORTH_CONFIRMING]
            for key in {_shared(best[0], shared) for best, _ in won if best is not None} - {usual}:
                for job in group:
                    if any(_shared(s, shared) == key for s in job.measured) or not self._time_for(job):
                        continue
                    best = job.best()
                    near = dict(_values(best[0] if best else job.space.default))
                    near.update(zip(shared, key, strict=True))
                    self._try(job, [job.space.nearest(near)], self._end)

    def _confirm(self) -> None:
        """Measure the winners again, longer: the best of many noisy measurements is partly luck."""
        self.progress.phase("confirming")
        done: set[tuple[int, Any]] = set()
        for group in self._tasks():
            for _ in range(_CONFIRMATIONS):  # what is no winner after all leaves the place to the next
                winners = [w for w in self._winners(group) if (id(w[0]), w[1]) not in done]
                for job, schedule in winners:
                    if not self._time_for(job):
                        continue
                    done.add((id(job), schedule))
                    self._try(job, [schedule], self._end, _CONFIRM_SECONDS)

    def _winners(self, group: Sequence[Job]) -> list[tuple[Job, Any]]:
        """Schedules that would be chosen for a task, where that matters."""
        found = []
        for record in choose_for(group, self.caps)[1]:
            job = next(j for j in group if j.bucket == record.bucket)
            schedule = job.tunable.schedule_type(**record.schedule)
            worth = record.ratio < _WORTH_CONFIRMING and schedule != job.space.default
            if worth and job.share > LEAST_SHARE:
                found.append((job, schedule))
        return found

    def _tasks(self) -> list[list[Job]]:
        """Jobs of one task together, the most important task first."""
        groups: dict[str, list[Job]] = {}
        for job in self.jobs:
            if job.default_seconds:
                groups.setdefault(job.key(self.caps.preset), []).append(job)
        return sorted(groups.values(), key=lambda group: -sum(job.share for job in group))

    def _record(self, job: Job, schedule: Any, outcome: Outcome) -> Record:
        return job.record(schedule, outcome, self.caps.preset, self.tvm, self.device)

    def _write(self, job: Job, schedule: Any, outcome: Outcome) -> None:
        self.records.append([self._record(job, schedule, outcome)])


def _is_doubtful(job: Job, outcome: Outcome) -> bool:
    """Whether a new best was measured beside a default that took longer than it can: half of the turns may be disturbed."""
    best = outcome.status is Status.OK and outcome.ratio < job.best_ratio
    return best and outcome.default > _DISTURBED * job.default_seconds


def distance(job: Job, task: Any, rows: int) -> float:
    """How unlike two tasks are: differences of their sizes on a logarithmic scale."""
    own, other = job.tunable.work(job.task, job.rows), job.tunable.work(task, rows)
    far = abs(np.log2(own.bytes / other.bytes)) + abs(np.log2(own.operations / other.operations))
    mine, theirs = job.values, job.tunable.to_values(task)
    unlike = sum(mine.get(k) != theirs.get(k) for k in {*mine, *theirs})
    return float(far + 0.25 * unlike)


def _values(schedule: Any) -> dict[str, int]:
    return dict(vars(schedule))


def _shared(schedule: Any, names: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(getattr(schedule, name)) for name in names)
