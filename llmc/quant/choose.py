"""``--quant auto``: which scheme each weight gets, so that the perplexity on a text grows by no more than asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmc.evaluate import Window
from llmc.frontend.graph import SourceModel
from llmc.quant.auto import Candidate, Choice, plan_descent, search
from llmc.quant.schemes import NONE, QuantRules
from llmc.quant.sensitivity import Progress, Sensitivity
from llmc.spec import AUTO, AUTO_INT8

# what each weight may become; "none" = it stays in the model's dtype
CANDIDATES = (NONE, "q8", "q6g64", "q4g32", "q4g64", "q3g64")
# the same with int8 activations; a scheme without would always win by its loss, at the same size
INT8_CANDIDATES = (NONE, "w8a8", "w4a8", "w4a8g64", "w4a8g128")
SEARCHED = {AUTO: CANDIDATES, AUTO_INT8: INT8_CANDIDATES}
# the scheme in which weights are measured: coarse enough to show, fine enough for the error to act as small ones do
PROBE = "q4g32"
# of the bound; the rest is left for the rounding of activations and cache, which the search does not see
SHARE = 0.9


@dataclass(frozen=True)
class Size:
    """Weights in a scheme: how many of them and their bytes."""

    scheme: str
    weights: int
    nbytes: int


@dataclass(frozen=True)
class QuantSearch:
    """What a search found.

    Attributes:
        choice: the assignment and everything that was measured.
        candidates: of each weight, with predicted losses.
        uniform: (scheme, bytes, measured loss in nats) with all weights in one scheme, if asked for.
        full_bytes: all weights in the model's dtype.
    """

    choice: Choice
    candidates: dict[str, list[Candidate]]
    uniform: tuple[tuple[str, int, float], ...]
    full_bytes: int

    def rules(self) -> tuple[tuple[str, str], ...]:
        """(module path, scheme) of every weight, as the compile spec takes it."""
        return tuple((name.removesuffix(".weight"), s) for name, s in self.choice.assignment.items())

    def sizes(self) -> list[Size]:
        """Schemes that are used, largest share first."""
        chosen: dict[str, list[int]] = {}
        for name, scheme in self.choice.assignment.items():
            size = next(c.nbytes for c in self.candidates[name] if c.scheme == scheme)
            chosen.setdefault(scheme, []).append(size)
        out = [Size(scheme, len(sizes), sum(sizes)) for scheme, sizes in chosen.items()]
        return sorted(out, key=lambda s: -s.nbytes)


def choose(
    source: SourceModel,
    windows: Sequence[Window],
    *,
    max_increase_percent: float,
    schemes: tuple[str, ...] = CANDIDATES,
    fixed: QuantRules | None = None,
    probe: Window | None = None,
    dtype: str | None = None,
    uniform: bool = False,
    most: int = 10,
    progress: Progress | None = None,
) -> QuantSearch:
    """Find the smallest assignment whose perplexity on the windows grows by at most the given percentage.

    Args:
        source: the opened model with its weights; run by torch in float32 with dequantized weights.
        schemes: what each weight may become.
        fixed: weights that its patterns name keep the scheme given there.
        probe: text for measuring single weights; default: the first window.
        dtype: of weights that stay as they are.
        uniform: also measure all weights in each scheme, to compare.
        most: whole assignments to measure.

    Raises:
        LlmcError: not within the bound even with the finest candidates; damaged weights.
    """
    tell = progress or (lambda done, total, what: None)
    measured = 0

    def loss(assignment: dict[str, str]) -> float:
        nonlocal measured
        measured += 1
        tell(measured, most, f"measurement {measured}")
        return oracle.loss(assignment)

    oracle = Sensitivity(source, windows, probe=probe, dtype=dtype, progress=tell)
    named = {name: scheme for name in oracle.weights if fixed and (scheme := fixed.named(name))}
    candidates = oracle.candidates(tuple(dict.fromkeys((*schemes, *named.values()))), PROBE)
    allowed = {
        name: [c for c in row if c.scheme in ((named[name],) if name in named else schemes)]
        for name, row in candidates.items()
    }
    budget = SHARE * math.log1p(max_increase_percent / 100)
    choice = search(plan_descent(allowed), budget, lambda a: loss(dict(a)), most=most)
    points = []
    for scheme in schemes[1:] if uniform else ():
        size = sum(c.nbytes for row in candidates.values() for c in row if c.scheme == scheme)
        points.append((scheme, size, loss(dict.fromkeys(candidates, scheme))))
    full = sum(c.nbytes for row in candidates.values() for c in row if c.scheme == NONE)
    return QuantSearch(choice, candidates, tuple(points), full)
