"""The generation loop: prompt in, tokens out, pages given back whatever happens."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from llmc.errors import LlmcError
from llmc.runtime.results import FinishReason, GenerateResult, Timings, TokenLogprob
from llmc.runtime.sampler import Sampler, SamplingParams, token_logprob
from llmc.runtime.sequence import Sequence
from llmc.runtime.stepper import Stepper
from llmc.runtime.text import Detokenizer, StopFinder
from llmc.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """One generation, its arguments checked.

    Attributes:
        prompt: token ids.
        max_tokens: most new tokens.
        sampling: how to choose them.
        stop_strings: text that ends the generation; not part of the result's text.
        stop_ids: tokens that end it.
        logprobs: None = none; n = the chosen token's and those of the n likeliest.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop_strings: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None


@dataclass
class _Clock:
    """Seconds per phase; stopped while the consumer of a stream works."""

    prefill: float = 0.0
    decode: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        self._since = time.perf_counter()

    def end_prefill(self) -> None:
        self.prefill += time.perf_counter() - self._since
        self.start()

    def stop(self) -> None:
        self.decode += time.perf_counter() - self._since


def generate(
    stepper: Stepper, request: Request, tokenizer: Tokenizer | None
) -> Generator[str, None, GenerateResult]:
    """Yields one piece of text per token (empty while characters or a stop string are held back), then the rest.

    The sequence's pages are given back when the generator ends, fails or is closed.
    """
    sampler = Sampler(request.sampling, request.prompt)
    words = Detokenizer(tokenizer.decode, request.prompt) if tokenizer else None
    stops = StopFinder(request.stop_strings)
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    text: list[str] = []
    reason: FinishReason = "length"
    clock = _Clock()
    with Sequence(stepper.allocator) as seq:
        token, logprob = _next(stepper, seq, request.prompt, sampler, request.logprobs)
        clock.end_prefill()
        while True:
            tokens.append(token)
            if logprob is not None:
                logprobs.append(logprob)
            ended = token in request.stop_ids
            text.append(stops.push(words.push(token)) if words and not ended else "")
            clock.stop()
            yield text[-1]
            clock.start()
            if ended or stops.found:
                reason = "stop"
                break
            if len(tokens) == request.max_tokens or seq.length == stepper.limits.max_seq_len:
                break
            token, logprob = _next(stepper, seq, (token,), sampler, request.logprobs)
        if words and not stops.found:
            text.append(stops.push(words.flush()) + stops.flush())
            reason = "stop" if stops.found else reason
        clock.stop()
    if len(text) > len(tokens) and text[-1]:
        yield text[-1]
    timings = Timings(clock.prefill, clock.decode, len(request.prompt), len(tokens) - 1)
    return GenerateResult(
        "".join(text),
        tuple(tokens),
        reason,
        tuple(logprobs) if request.logprobs is not None else None,
        len(request.prompt),
        timings,
    )


def _next(
    stepper: Stepper, seq: Sequence, ids: tuple[int, ...], sampler: Sampler, logprobs: int | None
) -> tuple[int, TokenLogprob | None]:
    """Append tokens and choose the next one; logits come to the host only for the sake of log-probabilities."""
    if logprobs is None:
        return stepper.sample([(seq, ids)], [sampler])[0], None
    row = stepper.step([(seq, ids)])[0]
    token = sampler.sample(row)
    return token, token_logprob(row, token, logprobs)


class TextStream(Iterator[str]):
    """Pieces of text as they are generated; `result` once they are all out.

    There is a piece for each new token, "" while a character or what may become a stop string is incomplete (and
    always without a tokenizer); no piece holds half a character.

    Close it (or use it in a `with`) to end early; the cache pages are given back then, too.
    """

    def __init__(self, source: Generator[str, None, GenerateResult]) -> None:
        self._source = source
        self._result: GenerateResult | None = None

    def __next__(self) -> str:
        try:
            return next(self._source)
        except StopIteration as end:
            if end.value is not None:
                self._result = end.value
            raise StopIteration from None

    @property
    def result(self) -> GenerateResult:
        """The finished generation.

        Raises:
            LlmcError: the stream has not been read to its end.
        """
        if self._result is None:
            raise LlmcError(
                "stream-unfinished",
                "The stream has no result before its last piece has been read.",
                hint="Read it to its end: for piece in stream: ...",
            )
        return self._result

    def close(self) -> None:
        """End the generation; the rest is not generated."""
        self._source.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
