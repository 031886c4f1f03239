"""Many texts at a time on a loaded artifact: log-likelihoods of continuations, and generation until a stop string.

Requests run side by side in ragged batches of any lengths; nothing is padded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc.errors import LlmcError
from llmc.runtime.model import Model
from llmc.runtime.sampler import Sampler, SamplingParams
from llmc.runtime.sequence import Sequence as Slot
from llmc.runtime.text import Detokenizer, StopFinder

Ids = tuple[int, ...]
Progress = Callable[[int], None]

# logits held at once, elements
_MOST_LOGITS = 1 << 25


@dataclass(frozen=True)
class Continuation:
    """Tokens to be scored after a context; both must have at least one."""

    context: Ids
    tokens: Ids


@dataclass(frozen=True)
class Score:
    """Sum of the log-probabilities (nats) of a continuation's tokens; whether greedy decoding would give them."""

    logprob: float
    greedy: bool


def split_pair(context: Sequence[int], whole: Sequence[int]) -> Continuation:
    """The part of a text to score, from the tokens of its context alone and of context and continuation together.

    A tokenizer may merge the end of the context with the beginning of the continuation. As long as the whole has more
    tokens than the context, its last ones are taken (as lm-evaluation-harness does); if merging has left none, the
    tokens from the first one that differs.
    """
    at = len(context)
    if at >= len(whole):
        common = (i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b)
        at = min(next(common, len(whole)), len(whole) - 1)
        context = whole[:at]
    return Continuation(tuple(context), tuple(whole[at:]))


def rolling(ids: Sequence[int], prefix: int, length: int) -> list[Continuation]:
    """A text longer than a model takes, in pieces that score each token once; the last one has a full context.

    Args:
        prefix: what the first token is predicted from.
        length: most tokens that are run at once.
    """
    out: list[Continuation] = []
    done = 0
    while done < len(ids):
        end = min(done + length, len(ids))
        if done == 0:
            out.append(Continuation((prefix,), tuple(ids[:end])))
        else:
            out.append(Continuation(tuple(ids[max(0, end - 1 - length) : done]), tuple(ids[done:end])))
        done = end
    return out


def loglikelihoods(
    model: Model,
    requests: Sequence[Continuation],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Score continuations; contexts that do not fit the artifact's longest sequence lose their beginning.

    Args:
        batch: most sequences that run side by side; None = the artifact's limit.
        progress: told how many more requests are done.

    Raises:
        LlmcError: a continuation that is empty or longer than the artifact takes.
    """
    limit = model.manifest.limits.max_seq_len
    # requests whose inputs are the same (choices of a single token) are run once
    groups: dict[tuple[Ids, int], list[int]] = {}
    for i, request in enumerate(requests):
        if not request.context or not request.tokens:
            raise LlmcError(
                "empty-continuation", "A context and a continuation need at least one token each."
            )
        if len(request.tokens) > limit:
            raise LlmcError(
                "sequence-too-long",
                f"A continuation has {len(request.tokens)} tokens; the artifact takes {limit}.",
                hint="Compile with a larger max_seq_len.",
            )
        inputs = (request.context + request.tokens[:-1])[-limit:]
        groups.setdefault((inputs, len(request.tokens)), []).append(i)
    scores: list[Score | None] = [None] * len(requests)
    size = min(batch or model.manifest.limits.max_batch, model.manifest.limits.max_batch)
    for keys in _batches(sorted(groups, key=lambda k: (-len(k[0]), k)), size, model):
        for key, rows in zip(keys, _rows(model, keys), strict=True):
            shifted = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
            logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            best = rows.argmax(axis=1)
            for i in groups[key]:
                targets = np.array(requests[i].tokens)
                total = float(logprobs[np.arange(len(targets)), targets].sum())
                scores[i] = Score(total, bool((best == targets).all()))
            if progress is not None:
                progress(len(groups[key]))
    return [s for s in scores if s is not None]


def _batches(keys: Sequence[tuple[Ids, int]], size: int, model: Model) -> Iterator[list[tuple[Ids, int]]]:
    """Consecutive keys that run together: few enough sequences and rows of logits."""
    most_rows = max(1, _MOST_LOGITS // model.manifest.model.vocab_size)
    part: list[tuple[Ids, int]] = []
    rows = 0
    for key in keys:
        if part and (len(part) == size or rows + key[1] > most_rows):
            yield part
            part, rows = [], 0
        part.append(key)
        rows += key[1]
    if part:
        yield part


def _rows(model: Model, keys: Sequence[tuple[Ids, int]]) -> list[np.ndarray]:
    """Logits f32 [n, V] of the last n tokens of each key's inputs."""
    slots = [model.new_sequence() for _ in keys]
    try:
        heads = [(slot, ids[:-n]) for slot, (ids, n) in zip(slots, keys, strict=True) if len(ids) > n]
        if heads:
            model.step(heads)
        tails = [(slot, ids[-n:]) for slot, (ids, n) in zip(slots, keys, strict=True)]
        logits = model.step(tails, logits="all")
    except LlmcError as e:
        if e.ref != "kv-pool-exhausted" or len(keys) == 1:
            raise
        logits = None
    finally:
        for slot in slots:
            slot.free()
    if logits is None:
        half = len(keys) // 2
        return _rows(model, keys[:half]) + _rows(model, keys[half:])
    return np.split(logits, np.cumsum([n for _, n in keys])[:-1])


@dataclass(frozen=True)
class Generation:
    """What to generate.

    Attributes:
        prompt: token ids, at least one; its beginning is dropped where the artifact's longest sequence asks for it.
        max_tokens: most new tokens.
        until: the text ends before the first of these strings.
        sampling: how tokens are chosen.
    """

    prompt: Ids
    max_tokens: int
    until: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)


class _Run:
    """A generation under way."""

    def __init__(self, index: int, request: Generation, model: Model) -> None:
        limit = model.manifest.limits.max_seq_len
        self.index = index
        self.most = min(request.max_tokens, limit - 1)
        prompt = request.prompt[-(limit - self.most) :]
        self.pending: Sequence[int] = prompt
        self.ids = list(prompt)
        self.made = 0
        self.slot: Slot | None = None
        self.text: list[str] = []
        self._sampler = Sampler(request.sampling, prompt)
        self._words = Detokenizer(lambda ids: model.detokenize(ids), prompt)
        self._stops = StopFinder([s for s in request.until if s])
        self._ends = model.end_token_ids

    def push(self, row: np.ndarray) -> bool:
        """Choose a token; True if the generation has ended."""
        token = self._sampler.sample(row)
        self.ids.append(token)
        self.pending = (token,)
        self.made += 1
        ended = token in self._ends
        if not ended:
            self.text.append(self._stops.push(self._words.push(token)))
        if not (ended or self._stops.found or self.made >= self.most):
            return False
        if not self._stops.found:
            self.text.append(self._stops.push(self._words.flush()) + self._stops.flush())
        return True

    def drop(self) -> None:
        """Give the cache back; what is generated so far is run again with the prompt when there is room."""
        if self.slot is not None:
            self.slot.free()
            self.slot = None
        self.pending = list(self.ids)


def generate_until(
    model: Model,
    requests: Sequence[Generation],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Generate many texts; one that has ended makes room for the next at once.

    Args:
        batch, progress: as in loglikelihoods.

    Raises:
        LlmcError: no tokenizer, an empty prompt, or a pool too small for one sequence.
    """
    size = min(batch or model.manifest.limits.max_batch, model.manifest.limits.max_batch)
    out = [""] * len(requests)
    waiting = deque(_Run(i, request, model) for i, request in enumerate(requests))
    going: list[_Run] = []
    try:
        while waiting or going:
            while waiting and len(going) < size:
                going.append(waiting.popleft())
                going[-1].slot = model.new_sequence()
            rows = _step(model, going, waiting)
            still = []
            for run, row in zip(going, rows, strict=True):
                if run.push(row):
                    out[run.index] = "".join(run.text)
                    run.drop()
                    if progress is not None:
                        progress(1)
                else:
                    still.append(run)
            going = still
    finally:
        for run in going:
            run.drop()
    return out


def _step(model: Model, going: list[_Run], waiting: deque[_Run]) -> Any:
    """One step of all runs; where the cache is full the last ones go back to the queue."""
    while True:
        try:
            return model.step([(run.slot, run.pending) for run in going if run.slot is not None])
        except LlmcError as e:
            if e.ref != "kv-pool-exhausted" or len(going) == 1:
                raise
            last = going.pop()
            last.drop()
            waiting.appendleft(last)
