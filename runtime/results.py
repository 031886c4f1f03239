"""What a generation returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability under the model itself: before penalties, temperature and filters.

    Attributes:
        token_id: the token that was chosen.
        logprob: its log-probability.
        top: the likeliest tokens at this place with theirs, best first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timings:
    """Seconds of compiled code, sampling and bookkeeping; what a stream's consumer does in between is not counted.

    Attributes:
        prefill_seconds: the prompt, up to its logits.
        decode_seconds: everything after that.
        prompt_tokens: tokens in the prompt.
        decode_steps: single-token steps (one less than the new tokens: the first one comes out of the prompt).
    """

    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    decode_steps: int

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_steps / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class GenerateResult:
    """A finished generation.

    Attributes:
        text: the new text, without what a stop string cut off; "" without a tokenizer.
        token_ids: all new tokens, an end token or a stop string's tokens included.
        finish_reason: "stop" (end token or stop string) or "length" (max_tokens or the sequence's limit).
        logprobs: one per new token, if asked for.
        prompt_tokens: tokens in the prompt.
        timings: how long it took.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_tokens: int
    timings: Timings


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        weights, weights_resident: size of the mapped weights, and how much of them is in memory.
        kv_reserved: address space of the KV cache; costs nothing until it is used.
        kv_resident: how much of it has been touched.
        kv_in_use: what open sequences hold now.
        process, process_peak: resident set of the whole process, and its peak.
    """

    weights: int
    weights_resident: int
    kv_reserved: int
    kv_resident: int
    kv_in_use: int
    process: int
    process_peak: int
