"""Which module gets which scheme: the smallest model whose loss stays within a bound.

A knapsack with one choice per module. Each module's candidates are cut to the convex hull of (bytes, loss); going down
all hulls at once, cheapest loss per byte saved first, gives a path of assignments from the largest to the smallest. It
is optimal at each of its points for the loss predicted there (the linear relaxation's solution, e.g. Kellerer et al.,
Knapsack Problems, 2004, chapter 11), and a budget between two points is missed by less than one module's step.
Losses do not quite add up, so the path is then searched by measuring whole assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llmc.errors import LlmcError

Assignment = Mapping[str, str]
Measure = Callable[[Assignment], float]


@dataclass(frozen=True)
class Candidate:
    """One way to store a module.

    Attributes:
        scheme: its name.
        nbytes: size of the module's weights in it.
        loss: what it adds to the model's loss by itself, nats; measuring noise below zero counts as nothing.
    """

    scheme: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Step:
    """From one assignment of the path to the next.

    Attributes:
        module: changes to `scheme`.
        saved: bytes.
        loss: added, nats; predicted.
    """

    module: str
    scheme: str
    saved: int
    loss: float


@dataclass(frozen=True)
class Point:
    """An assignment that was measured: its place on the path, size, predicted and measured loss (nats)."""

    place: int
    nbytes: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Descent:
    """Assignments from the largest to the smallest; place k is `start` with the first k steps taken.

    Attributes:
        start: the assignment with the least loss.
        start_bytes, start_loss: its size and predicted loss.
        steps: changes, cheapest loss per byte first.
    """

    start: Mapping[str, str]
    start_bytes: int
    start_loss: float
    steps: tuple[Step, ...]

    def assignment(self, place: int) -> dict[str, str]:
        """Module -> scheme after `place` steps."""
        out = dict(self.start)
        for step in self.steps[:place]:
            out[step.module] = step.scheme
        return out

    def nbytes(self, place: int) -> int:
        """Size after `place` steps."""
        return self.start_bytes - sum(step.saved for step in self.steps[:place])

    def loss(self, place: int) -> float:
        """Predicted loss after `place` steps."""
        return self.start_loss + sum(step.loss for step in self.steps[:place])

    def place_for(self, budget: float) -> int:
        """The last place whose predicted loss is within `budget`."""
        place, loss = 0, self.start_loss
        for step in self.steps:
            loss += step.loss
            if loss > budget:
                break
            place += 1
        return place


@dataclass(frozen=True)
class Choice:
    """What a search found.

    Attributes:
        assignment: module -> scheme.
        nbytes: its size.
        loss: its measured loss, nats.
        points: everything that was measured, in order of size, largest first.
    """

    assignment: dict[str, str]
    nbytes: int
    loss: float
    points: tuple[Point, ...]


def plan_descent(candidates: Mapping[str, Sequence[Candidate]]) -> Descent:
    """The path through the candidates of each module.

    Raises:
        LlmcError: a module without candidates.
    """
    start: dict[str, str] = {}
    size, loss = 0, 0.0
    steps: list[Step] = []
    for module, choices in candidates.items():
        if not choices:
            raise LlmcError("no-candidates", f"{module} has no scheme to choose from.")
        hull = _hull(choices)
        start[module] = hull[0].scheme
        size += hull[0].nbytes
        loss += max(hull[0].loss, 0.0)
        for a, b in pairwise(hull):
            added = max(b.loss, 0.0) - max(a.loss, 0.0)
            steps.append(Step(module, b.scheme, a.nbytes - b.nbytes, added))
    # within a module the hull's slopes grow, so that its steps stay in order
    steps.sort(key=lambda s: s.loss / s.saved)
    return Descent(start, size, loss, tuple(steps))


def search(path: Descent, budget: float, measure: Measure, *, most: int = 10) -> Choice:
    """The smallest assignment of the path that was measured to be within the budget.

    Starts where the predicted losses say, goes on while that is too cautious, and back where it was too bold. The
    start of the path is measured only if nothing else holds.

    Args:
        budget: largest loss, nats.
        measure: assignment -> loss of the whole model, nats.
        most: measurements, at most (one more may be needed for the start).

    Raises:
        LlmcError: not even the start of the path is within the budget.
    """
    points: dict[int, Point] = {}

    def good(place: int) -> bool:
        if place not in points:
            measured = measure(path.assignment(place))
            points[place] = Point(place, path.nbytes(place), path.loss(place), measured)
        return points[place].measured <= budget

    last = len(path.steps)
    low, high = 0, last + 1  # within the budget (the start is taken to be), beyond it (past the end)
    place = path.place_for(budget)
    # where the prediction was wrong by some factor, that factor is likely to hold nearby
    while low + 1 < high and len(points) < most:
        place = min(max(place, low + 1), high - 1)
        if good(place):
            low = place
        else:
            high = place
        point = points[place]
        factor = point.measured / point.predicted if point.predicted > 0 and point.measured > 0 else 1.0
        guess = path.place_for(budget / factor)
        # a guess that barely moves is no better than half way
        place = guess if low < guess < high and len(points) <= 3 else (low + high) // 2
    best = max((p for p in points.values() if p.measured <= budget), key=lambda p: p.place, default=None)
    if best is None and good(0):
        best = points[0]
    if best is None:
        raise LlmcError(
            "bound-not-reached",
            f"Even the finest schemes add {points[0].measured:.3g} nats to the loss; {budget:.3g} are allowed.",
            hint="Allow a larger --max-ppl-increase, or finer schemes.",
        )
    return Choice(
        path.assignment(best.place),
        best.nbytes,
        best.measured,
        tuple(sorted(points.values(), key=lambda p: p.place)),
    )


def _hull(choices: Sequence[Candidate]) -> list[Candidate]:
    """Lower convex hull of (bytes, loss), largest first; starts at the smallest candidate with the least loss."""
    ordered = sorted(choices, key=lambda c: (max(c.loss, 0.0), c.nbytes))
    hull: list[Candidate] = []
    for candidate in ordered:
        if hull and candidate.nbytes >= hull[-1].nbytes:
            continue  # larger and no better
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull


def _slope(a: Candidate, b: Candidate) -> float:
    """Loss per byte saved from a to b."""
    return (max(b.loss, 0.0) - max(a.loss, 0.0)) / (a.nbytes - b.nbytes)
