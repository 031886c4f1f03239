"""The search for per-module schemes: against brute force, and with losses that do not add up as predicted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from llmc.errors import LlmcError
from llmc.quant.auto import Candidate, Descent, plan_descent, search

BITS = {"none": 16, "q8": 8, "q6": 6, "q4": 4, "q3": 3}


def problem(modules: int, seed: int) -> dict[str, list[Candidate]]:
    """Modules of random sizes and sensitivities whose loss falls fourfold per bit, with some noise."""
    rng = np.random.default_rng(seed)
    out = {}
    for m in range(modules):
        size, weight = int(rng.integers(1, 50)) * 1000, float(rng.lognormal(0, 2))
        out[f"m{m}"] = [
            Candidate(
                name,
                size * bits // 8,
                0.0 if name == "none" else weight * 4.0 ** (3 - bits) * float(rng.lognormal(0, 0.3)),
            )
            for name, bits in BITS.items()
        ]
    return out


def total(candidates: Mapping[str, list[Candidate]], assignment: Mapping[str, str]) -> tuple[int, float]:
    chosen = [next(c for c in cs if c.scheme == assignment[m]) for m, cs in candidates.items()]
    return sum(c.nbytes for c in chosen), sum(c.loss for c in chosen)


@pytest.mark.parametrize("seed", range(8))
def test_the_path_misses_the_optimum_by_less_than_a_step(seed: int) -> None:
    candidates = problem(4, seed)
    path = plan_descent(candidates)
    largest = max(step.saved for step in path.steps)
    every = [
        total(candidates, dict(zip(candidates, names, strict=True)))
        for names in itertools.product(BITS, repeat=len(candidates))
    ]
    for budget in np.quantile([loss for _, loss in every], [0.05, 0.3, 0.7]):
        place = path.place_for(budget)
        size, loss = total(candidates, path.assignment(place))
        assert (size, loss) == (path.nbytes(place), pytest.approx(path.loss(place)))
        assert loss <= budget
        best = min(s for s, each in every if each <= budget)
        assert best <= size < best + largest


def test_every_point_of_the_path_is_optimal_for_its_own_loss() -> None:
    candidates = problem(4, 11)
    path = plan_descent(candidates)
    every = [
        total(candidates, dict(zip(candidates, names, strict=True)))
        for names in itertools.product(BITS, repeat=len(candidates))
    ]
    for place in range(len(path.steps) + 1):
        budget = path.loss(place) * (1 + 1e-12)
        assert path.nbytes(place) == min(s for s, loss in every if loss <= budget)


def test_dominated_and_noisy_candidates_are_passed_over() -> None:
    path = plan_descent(
        {
            "m": [
                Candidate("none", 160, 0.0),
                Candidate("q8", 80, -1e-6),  # noise: better than exact
                Candidate("q6", 60, 0.5),  # worse and larger than q4
                Candidate("q4", 40, 0.1),
            ]
        }
    )
    assert path.start == {"m": "q8"}
    assert [s.scheme for s in path.steps] == ["q4"]
    assert path.steps[0].loss == pytest.approx(0.1)


def test_a_candidate_above_the_hull_is_skipped() -> None:
    # q6 saves little at almost the full price of q4
    path = plan_descent(
        {"m": [Candidate("q8", 80, 0.0), Candidate("q6", 75, 0.09), Candidate("q4", 40, 0.1)]}
    )
    assert [s.scheme for s in path.steps] == ["q4"]


class Oracle:
    """Measures an assignment: `factor` times the predicted loss, plus an interaction between modules."""

    def __init__(
        self, candidates: Mapping[str, list[Candidate]], factor: float, exponent: float = 1.0
    ) -> None:
        self.candidates, self.factor, self.exponent = candidates, factor, exponent
        self.calls: list[dict[str, str]] = []

    def __call__(self, assignment: Mapping[str, str]) -> float:
        self.calls.append(dict(assignment))
        return self.factor * total(self.candidates, assignment)[1] ** self.exponent


def smallest(path: Descent, oracle: Oracle, budget: float) -> int:
    return min(path.nbytes(k) for k in range(len(path.steps) + 1) if oracle(path.assignment(k)) <= budget)


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.7, 6.0])
@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.3])
def test_the_search_finds_the_smallest_within_the_bound_by_measuring(factor: float, exponent: float) -> None:
    candidates = problem(60, 5)
    path = plan_descent(candidates)
    oracle = Oracle(candidates, factor, exponent)
    budget = oracle(path.assignment(len(path.steps) * 3 // 5))
    wanted = smallest(path, Oracle(candidates, factor, exponent), budget)
    oracle.calls.clear()
    choice = search(path, budget, oracle, most=12)
    assert choice.loss <= budget
    assert choice.nbytes == wanted
    assert choice.assignment in oracle.calls
    assert len(oracle.calls) <= 12


def test_a_wrong_prediction_is_backed_off_from() -> None:
    candidates = problem(30, 2)
    path = plan_descent(candidates)
    choice = search(path, 0.5, Oracle(candidates, 50.0), most=8)
    assert choice.loss <= 0.5
    assert [p.place for p in choice.points] == sorted(p.place for p in choice.points)
    assert any(p.measured > 0.5 for p in choice.points)


def test_everything_may_be_as_small_as_possible() -> None:
    candidates = problem(10, 3)
    path = plan_descent(candidates)
    oracle = Oracle(candidates, 1.0)
    choice = search(path, 1e9, oracle)
    assert set(choice.assignment.values()) == {"q3"}
    assert len(oracle.calls) == 1


def test_nothing_within_the_bound_is_an_error() -> None:
    candidates = {"m": [Candidate("q8", 80, 0.2), Candidate("q4", 40, 0.5)]}
    with pytest.raises(LlmcError, match=r"Even the finest schemes add 0\.2 nats"):
        search(plan_descent(candidates), 0.1, Oracle(candidates, 1.0))
    with pytest.raises(LlmcError, match="m has no scheme"):
        plan_descent({"m": []})


def test_the_measurements_are_bounded() -> None:
    candidates = problem(200, 4)
    oracle = Oracle(candidates, 3.0)
    choice = search(plan_descent(candidates), 0.1, oracle, most=4)
    assert len(oracle.calls) <= 5
    assert choice.loss <= 0.1
