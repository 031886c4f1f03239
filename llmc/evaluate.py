"""Evaluating a model on a text: perplexity, and how far its predictions are from another model's.

The text's tokens are cut into windows, each run on its own; logits of one window are held at a time. With a second
model every figure is paired: both models predict the same tokens from the same contexts, so that a small difference
shows although the perplexities themselves are uncertain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmc.errors import LlmcError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Logits = Callable[[Sequence[int]], Floats]
Progress = Callable[[float, float, str], None]

WINDOW = 512
MAX_TOKENS = 8192
# neighbouring tokens are predicted well or badly together: the standard error counts blocks of so many as one
_BLOCK = 64
# elements of a piece of logits in float64
_PIECE = 1 << 22


@dataclass(frozen=True)
class Window:
    """Tokens that are run together.

    Attributes:
        ids: the tokens.
        scored: so many of the last ones are predicted and count.
    """

    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Against:
    """How a model's predictions differ from a reference's on the same tokens.

    Attributes:
        perplexity: of the reference.
        increase_percent: of the model's perplexity over the reference's.
        increase_error: its standard error, in percentage points, from the paired differences.
        kl_mean, kl_p99: KL divergence of the model's next-token distribution from the reference's, nats.
        top1_agreement: share of places where both have the same likeliest token.
    """

    perplexity: float
    increase_percent: float
    increase_error: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on a text.

    Attributes:
        tokens: how many were predicted.
        windows: how many pieces of text.
        perplexity: exp of the mean negative log-likelihood of a token.
        against: the comparison with a reference; None without one.
    """

    tokens: int
    windows: int
    perplexity: float
    against: Against | None = None


def cut(
    ids: Sequence[int],
    *,
    window: int = WINDOW,
    stride: int | None = None,
    max_tokens: int | None = MAX_TOKENS,
    prefix: Sequence[int] = (),
) -> list[Window]:
    """Cut a text into windows; every token counts once, but for those that have no context.

    Args:
        ids: tokens of the text.
        window: tokens that are run together, the prefix included.
        stride: text tokens from the start of a window to that of the next; smaller ones give each counted token more
            context and cost more. Default: windows do not overlap.
        max_tokens: the text is used up to here; None = whole.
        prefix: what the tokenizer puts before a text (a begin token); each window starts with it.

    Raises:
        LlmcError: a window or stride that cannot be, or a text shorter than one window.
    """
    size = window - len(prefix)
    if size < 2:
        raise LlmcError(
            "window",
            f"A window must have at least {2 + len(prefix)} tokens, found {window}.",
            hint="Use 512.",
        )
    step = size if stride is None else stride
    if not 1 <= step <= size:
        raise LlmcError("stride", f"stride must lie in 1..{size} (the window's text), found {step}.")
    count = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    if count < size:
        what = "The text" if count == len(ids) else "The part of the text that max_tokens allows"
        raise LlmcError(
            "text-too-short",
            f"{what} has {count} tokens; an evaluation needs at least one window of {size}.",
            hint="Use a longer text, or a smaller --window.",
        )
    out: list[Window] = []
    begin = done = 0
    while done < count:
        end = min(begin + size, count)
        first = max(done, begin if prefix else begin + 1)
        if end > first:
            out.append(Window((*prefix, *ids[begin:end]), end - first))
        done = end
        begin += step
    return out


def evaluate(
    model: Logits,
    windows: Sequence[Window],
    *,
    against: Logits | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a model over windows, and a reference over the same ones.

    Args:
        model, against: tokens of one sequence -> logits f32 [n, V].
        progress: told after each window (done, total, what).

    Raises:
        LlmcError: logits that are not finite, or vocabularies of different sizes.
    """
    total = sum(w.scored for w in windows)
    losses: list[Doubles] = []
    other: list[Doubles] = []
    divergences: list[Doubles] = []
    same = done = 0
    for window in windows:
        targets = np.array(window.ids[-window.scored :])
        rows = slice(len(window.ids) - 1 - window.scored, len(window.ids) - 1)
        logits = model(window.ids)[rows]
        reference = against(window.ids)[rows] if against is not None else None
        if reference is not None and reference.shape != logits.shape:
            raise LlmcError(
                "vocabularies-differ",
                f"The model predicts {logits.shape[1]} tokens, the reference {reference.shape[1]}.",
                hint="Compare with the model that the artifact was compiled from.",
            )
        piece = max(1, _PIECE // logits.shape[1])
        for at in range(0, len(logits), piece):
            part = slice(at, at + piece)
            wide = _log_softmax(logits[part])
            losses.append(_losses(wide, targets[part], "The model"))
            if reference is not None:
                exact = _log_softmax(reference[part])
                other.append(_losses(exact, targets[part], "The reference"))
                divergences.append(_divergence(exact, wide))
                same += int((logits[part].argmax(1) == reference[part].argmax(1)).sum())
        done += window.scored
        if progress is not None:
            progress(done, total, f"{done} of {total} tokens")
    ours = np.concatenate(losses)
    result = None
    if against is not None:
        result = _compare(ours, np.concatenate(other), np.concatenate(divergences), same)
    return Evaluation(len(ours), len(windows), perplexity(ours), result)


def perplexity(losses: Doubles) -> float:
    """exp of the mean of negative log-likelihoods in nats."""
    return math.exp(min(float(losses.mean()), 700.0))


def _compare(ours: Doubles, theirs: Doubles, divergences: Doubles, same: int) -> Against:
    difference = ours - theirs
    ratio = math.exp(min(float(difference.mean()), 700.0))
    return Against(
        perplexity=perplexity(theirs),
        increase_percent=100 * (ratio - 1),
        increase_error=100 * ratio * standard_error(difference),
        kl_mean=float(divergences.mean()),
        kl_p99=float(np.quantile(divergences, 0.99)),
        top1_agreement=same / len(ours),
    )


def standard_error(values: Doubles) -> float:
    """Of the mean of values whose neighbours are correlated: sums over blocks are taken as independent."""
    count = len(values)
    starts = np.arange(0, count, _BLOCK)
    if len(starts) < 2:
        return float("nan")
    sums = np.add.reduceat(values - values.mean(), starts)
    return float(np.sqrt((sums * sums).sum() * len(starts) / (len(starts) - 1))) / count


def _log_softmax(logits: Floats) -> Doubles:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _losses(logprobs: Doubles, targets: npt.NDArray[np.int64], who: str) -> Doubles:
    out = -logprobs[np.arange(len(targets)), targets]
    if not np.isfinite(out).all():
        raise LlmcError(
            "logits-not-finite",
            f"{who} gives NaN or infinite logits for {int((~np.isfinite(out)).sum())} of {len(out)} tokens.",
            hint="The weights are damaged, or float16 overflows for this model: compile with --dtype bf16 or f32.",
        )
    return out


def _divergence(exact: Doubles, model: Doubles) -> Doubles:
    """KL(exact || model) of each row of log-probabilities, nats."""
    weights = np.exp(exact)
    # a token that the reference excludes (-inf) adds nothing
    with np.errstate(invalid="ignore"):
        terms = np.where(weights > 0, weights * (exact - model), 0.0)
    return np.maximum(terms.sum(axis=1), 0.0)
