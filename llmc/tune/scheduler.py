"""Which job gets the next trials: the one whose expected gain of step time per second of tuning is largest.

The gain is estimated as in Ansor's task scheduler (Zheng et al. 2020, arXiv 2006.06762, section 6): from what the last trials
brought, and, as an optimistic guess, from what the number of trials so far and the best of similar jobs leave room for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.tune.job import Job

_RECENT = 0.2  # weight of what the last trials brought against the optimistic guess
_WINDOW = 8  # trials that count as the last ones
_EPSILON = 0.05  # chance of a random job
_REACHABLE = 0.95  # of the best efficiency that similar jobs reached
LEAST_SHARE = 0.002  # of the step time: less is not worth a measurement
SETTLED = 24  # trials without improvement after which a job is left alone


def settled(job: Job) -> bool:
    """No further trial is worth it: enough without improvement, the whole space, or the job does not work."""
    if job.failure:
        return True
    if job.seeds:
        return False
    return job.stale() >= SETTLED or len(job.measured) >= job.size


def gain(job: Job, jobs: Sequence[Job]) -> float:
    """Expected share of the step time that one more trial saves."""
    history = job.history
    window = min(_WINDOW, len(history) - 1)
    recent = (history[-1 - window] - history[-1]) / window if window > 0 else 0.0
    now = job.best_ratio
    like = [
        j.efficiency
        for j in jobs
        if j.tunable is job.tunable and j.bucket == job.bucket and j.default_seconds
    ]
    reachable = _REACHABLE * max(like, default=0.0) or 1.0
    floor = job.roofline / reachable / job.default_seconds if job.default_seconds else 0.0
    room = max(0.0, now - max(floor, 0.0))
    guess = min(now / max(1, len(history)), max(room, 0.02 * now))
    return job.share * (_RECENT * max(recent, 0.0) + (1 - _RECENT) * guess)


def seconds_per_trial(job: Job, usual: float) -> float:
    """What a trial of the job has cost, or what trials usually cost."""
    return job.spent / job.trials if job.trials else usual


def next_job(jobs: Sequence[Job], rng: np.random.Generator, usual: float = 1.0) -> Job | None:
    """The job to spend the next trials on; None if all are settled."""
    open_jobs = [job for job in jobs if not settled(job)]
    if not open_jobs:
        return None
    if rng.random() < _EPSILON:
        return open_jobs[rng.integers(len(open_jobs))]
    return max(open_jobs, key=lambda job: gain(job, jobs) / seconds_per_trial(job, usual))
