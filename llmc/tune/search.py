"""Evolutionary search in a space of schedules, guided by a cost model.

Each round breeds candidates from the best measured schedules by mutation and crossover, keeps those that the model likes, and
proposes the best that have not been measured; a share of the proposals is random, so that a wrong model is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.schedules.tunable import Space
from llmc.tune.job import Job

_POPULATION = 64
_GENERATIONS = 4
_PARENTS = 12
_EPSILON = 0.15  # share of proposals that are random
_CROSSED = 0.2  # share of children with two parents
_TRIES = 200

Score = Callable[[Sequence[Any]], Any]


def propose(job: Job, count: int, rng: np.random.Generator, score: Score | None = None) -> list[Any]:
    """Up to `count` schedules of the job's space that were not measured, seeds first; fewer if the space is exhausted.

    Args:
        score: schedules -> how good a model thinks they are; None = no model: children of the best, in any order.
    """
    chosen: dict[Any, None] = {}

    def take(schedules: Sequence[Any], most: int) -> None:
        for schedule in schedules:
            if len(chosen) >= min(most, count):
                return
            if schedule not in job.measured and schedule in job.space:
                chosen.setdefault(schedule)

    take(job.seeds, count)
    job.seeds = [s for s in job.seeds if s not in chosen]
    randoms = sum(rng.random() < _EPSILON for _ in range(count - len(chosen)))
    take(_bred(job, rng, score), count - randoms)
    take([job.space.random(rng) for _ in range(_TRIES)], count)
    if len(chosen) < count:  # nearly exhausted: what is left, in order
        take(list(job.space), count)
    return list(chosen)


def _bred(job: Job, rng: np.random.Generator, score: Score | None) -> list[Any]:
    """A population, the most promising first."""
    space = job.space
    known = sorted((o.ratio, i, s) for i, (s, o) in enumerate(job.measured.items()) if o.ratio > 0)
    parents = [s for _, _, s in known[:_PARENTS]]
    population = list(parents) or [space.default]
    population += [space.random(rng) for _ in range(_POPULATION - len(population))]
    if score is None:
        best = parents or [space.default]
        # without a model the better parents have more children
        return [_child(best[: 1 + i // 8], space, rng) for i in range(_POPULATION)]
    for _ in range(_GENERATIONS):
        children = [_child(population[:_PARENTS], space, rng) for _ in range(_POPULATION)]
        merged = list(dict.fromkeys([*population, *children]))
        order = np.argsort(-np.asarray(score(merged)), kind="stable")
        population = [merged[i] for i in order[:_POPULATION]]
    return population


def _child(parents: Sequence[Any], space: Space, rng: np.random.Generator) -> Any:
    first = parents[int(rng.integers(len(parents)))]
    if len(parents) > 1 and rng.random() < _CROSSED:
        first = space.cross(first, parents[int(rng.integers(len(parents)))], rng)
    return space.mutate(first, rng)
