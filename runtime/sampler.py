"""Choosing the next token, in Hugging Face's order: repetition penalty, temperature, top-k, top-p, min-p.

Sources: repetition penalty: Keskar et al. 2019 (https://arxiv.org/abs/1909.05858); top-p: Holtzman et al. 2019
(https://arxiv.org/abs/1904.09751); min-p: Nguyen et al. 2024 (https://arxiv.org/abs/2407.01082).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmc.errors import LlmcError
from llmc.runtime.engine import Floats
from llmc.runtime.results import TokenLogprob

Ids = npt.NDArray[np.int64]
_BLOCK = 512


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token.

    Attributes:
        temperature: 0 = the likeliest token (the filters below then change nothing).
        top_k: only the k likeliest tokens; 0 = off. Ties with the k-th stay.
        top_p: only the smallest set of tokens whose probabilities add up to top_p; 1 = off.
        min_p: only tokens at least min_p times as likely as the likeliest; 0 = off.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred; 1 = off.
        seed: the same seed gives the same choices for the same logits; None = different every time.

    Raises:
        LlmcError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0 and finite"),
            (
                "top_k",
                self.top_k >= 0 and int(self.top_k) == self.top_k,
                "a whole number, at least 0 (0 = off)",
            ),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 and finite"),
            ("seed", self.seed is None or self.seed >= 0, "at least 0"),
        ):
            if not good:
                raise LlmcError("sampling-parameter", f"{name} must be {rule}, found {getattr(self, name)}.")


@dataclass(frozen=True)
class Draw:
    """All that one choice depends on beside the logits.

    Attributes:
        share: random number, 0 <= share < 1; 0 for the likeliest token.
        seen: different tokens that the penalty applies to, i64[n]; none where there is no penalty.
    """

    params: SamplingParams
    share: float
    seen: Ids


GREEDY = Draw(SamplingParams(), 0.0, np.zeros(0, np.int64))


class Sampler:
    """Chooses tokens of one sequence; remembers which ones occurred.

    Args:
        params: how.
        seen: tokens of the prompt.
    """

    def __init__(self, params: SamplingParams, seen: Iterable[int] = ()) -> None:
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._seen: Ids = np.unique(np.fromiter(seen, np.int64))

    def sample(self, logits: Floats) -> int:
        """The next token for logits f32[vocab].

        Raises:
            LlmcError: the logits are not numbers.
        """
        token = choose(logits, self.draw())
        self.accept(token)
        return token

    def draw(self) -> Draw:
        """The parameters of the next choice; takes a random number."""
        share = self._random.random() if self.params.temperature > 0 else 0.0
        return Draw(self.params, share, self._seen if self.params.repetition_penalty != 1 else GREEDY.seen)

    def accept(self, token: int) -> None:
        """A choice was made."""
        if self.params.repetition_penalty != 1 and token not in self._seen:
            self._seen = np.append(self._seen, token)


def choose(logits: Floats, draw: Draw) -> int:
    """The token of logits f32[vocab].

    Raises:
        LlmcError: the logits are not numbers.
    """
    scores = penalised(logits, draw)
    best = int(scores.argmax())  # of an array with a NaN: the first NaN
    if not np.isfinite(scores[best]):
        raise not_finite(best, float(scores[best]))
    if draw.params.temperature == 0:
        return best
    ids, probabilities = candidates(scores, draw.params)
    return int(ids[_draw(probabilities, draw.share)])


def not_finite(token: int, value: float | None = None) -> LlmcError:
    """The error of logits of which the largest one is NaN or infinite."""
    what = f"token {token}" if value is None else f"token {token}: {value}"
    return LlmcError(
        "logits-not-finite",
        f"The model's logits are not finite ({what}).",
        hint="The weights are damaged, or float16 overflows for this model: compile with --dtype bf16 or f32.",
    )


def penalised(logits: Floats, draw: Draw) -> Floats:
    if draw.params.repetition_penalty == 1:
        return logits
    penalty = np.float32(draw.params.repetition_penalty)
    scores = logits.copy()
    old = scores[draw.seen]
    scores[draw.seen] = np.where(old < 0, old * penalty, old / penalty)
    return scores


def candidates(scores: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """Tokens that temperature, top-k, top-p and min-p leave, ascending, with unnormalised probabilities.

    Args:
        scores: f32[vocab], the penalty applied.
        params: temperature above 0.
    """
    scores = scores / np.float32(params.temperature)
    ids: Ids = np.arange(len(scores))
    if 0 < params.top_k < len(scores):
        ids = np.flatnonzero(scores >= np.partition(scores, -params.top_k)[-params.top_k])
        scores = scores[ids]
    weights: Floats = np.exp(scores - scores.max())
    if params.top_p < 1:
        keep = _nucleus(weights, params.top_p)
        ids, weights = ids[keep], weights[keep]
    if params.min_p > 0:
        keep = np.flatnonzero(weights >= np.float32(params.min_p) * weights.max())
        ids, weights = ids[keep], weights[keep]
    return ids, weights


def _draw(weights: Floats, share: float) -> int:
    """Index at which the running sum of the weights passes `share` (0 <= share < 1) of their sum."""
    # by blocks: a running sum over a whole vocabulary takes longer than all the rest
    starts = np.arange(0, len(weights), _BLOCK)
    edges = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = share * edges[-1]
    block = int(np.searchsorted(edges, target, side="right"))
    block = min(block, len(starts) - 1)
    before = edges[block - 1] if block else 0.0
    inner = before + np.cumsum(weights[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    # rounding may leave the target just behind the block's last sum
    within = min(int(np.searchsorted(inner, target, side="right")), len(inner) - 1)
    return int(starts[block]) + within


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Indices, ascending, of what top-p keeps: from the least likely up, tokens go while their sum is <= 1 - top_p."""
    total = float(weights.sum(dtype=np.float64))
    spare = (1 - top_p) * total
    # even all together, tokens below an equal share of the spare mass are dropped: no need to sort them
    small = weights <= spare / len(weights)
    rest = np.sort(weights[~small]) if not small.all() else np.sort(weights)
    below = total - float(rest.sum(dtype=np.float64))
    first = int(np.searchsorted(np.cumsum(rest, dtype=np.float64) + below, spare, side="right"))
    first = min(first, len(rest) - 1)  # the likeliest token always stays
    cut = rest[first]
    ties = np.flatnonzero(weights == cut)
    wanted = len(rest) - first - int(np.count_nonzero(weights > cut))
    return np.union1d(np.flatnonzero(weights > cut), ties[len(ties) - wanted :])


def token_logprob(logits: Floats, token: int, top: int) -> TokenLogprob:
    """Log-probability of `token` and of the `top` likeliest tokens for logits f32[vocab]."""
    shifted = logits.astype(np.float64) - float(logits.max())
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best: list[int] = []
    if top > 0:
        top = min(top, len(logits))
        some = np.argpartition(-logprobs, top - 1)[:top]
        best = [int(i) for i in some[np.argsort(-logprobs[some], kind="stable")]]
    return TokenLogprob(token, float(logprobs[token]), tuple((i, float(logprobs[i])) for i in best))
