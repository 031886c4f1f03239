"""From generate()'s arguments and the checkpoint's generation_config.json to a checked Request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.artifact import Limits
from llmc.errors import LlmcError
from llmc.runtime.generate import Request
from llmc.runtime.sampler import SamplingParams

Stop = str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint says about its own generation.

    Attributes:
        sampling: parameters to use where the caller gives none; greedy unless the checkpoint asks for sampling.
        end_ids: tokens that end a text.
    """

    sampling: SamplingParams
    end_ids: frozenset[int]

    @staticmethod
    def read(config: Mapping[str, Any], end_ids: Sequence[int]) -> Defaults:
        """From generation_config.json (may be empty) and the manifest's end tokens.

        Values of a wrong kind are passed over: the file is the checkpoint's, not the user's.
        """
        more = config.get("eos_token_id")
        ids = {*end_ids, *(more if isinstance(more, list) else [more])}
        ends = frozenset(i for i in ids if isinstance(i, int))
        if config.get("do_sample") is not True:
            return Defaults(SamplingParams(), ends)
        values: dict[str, Any] = {"temperature": 1.0}
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            value = config.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                values[name] = value
        try:
            return Defaults(SamplingParams(**values), ends)
        except LlmcError:
            return Defaults(SamplingParams(temperature=1.0), ends)


def make_request(
    prompt: Sequence[int],
    *,
    limits: Limits,
    defaults: Defaults,
    has_tokenizer: bool,
    max_tokens: int,
    sampling: Mapping[str, float | int | None],
    stop: Stop,
    logprobs: int | None,
    ignore_eos: bool,
) -> Request:
    """Check the arguments of Model.generate.

    Raises:
        LlmcError: says which argument, what it may be and what it is.
    """
    if max_tokens < 1:
        raise LlmcError("max-tokens", f"max_tokens must be at least 1, found {max_tokens}.")
    if not prompt:
        raise LlmcError(
            "empty-prompt",
            "The prompt has no tokens.",
            hint="Give at least one character or token; this model's tokenizer adds none by itself.",
        )
    if len(prompt) > limits.max_seq_len:
        raise LlmcError(
            "prompt-too-long",
            f"The prompt has {len(prompt)} tokens; the artifact takes {limits.max_seq_len} with the new ones.",
            hint="Shorten the prompt, or compile with a larger max_seq_len.",
        )
    if logprobs is not None and logprobs < 0:
        raise LlmcError("logprobs", f"logprobs must be None or at least 0, found {logprobs}.")
    strings, ids = _stops(stop)
    if strings and not has_tokenizer:
        raise LlmcError(
            "no-tokenizer",
            "The artifact has no tokenizer, so a stop string cannot be found.",
            hint="Give token ids as stop.",
        )
    ends = frozenset() if ignore_eos else defaults.end_ids
    return Request(
        tuple(int(i) for i in prompt),
        max_tokens,
        _sampling(defaults.sampling, sampling),
        strings,
        ends | ids,
        logprobs,
    )


def _sampling(defaults: SamplingParams, given: Mapping[str, float | int | None]) -> SamplingParams:
    """The caller's values over the checkpoint's; a filter without a temperature asks for sampling."""
    values: dict[str, Any] = {
        name: getattr(defaults, name) if value is None else value for name, value in given.items()
    }
    filters = any(given.get(name) is not None for name in ("top_k", "top_p", "min_p"))
    if given.get("temperature") is None and values["temperature"] == 0 and filters:
        values["temperature"] = 1.0
    return SamplingParams(**values)


def _stops(stop: Stop) -> tuple[tuple[str, ...], frozenset[int]]:
    items = () if stop is None else (stop,) if isinstance(stop, (str, int)) else tuple(stop)
    strings = tuple(s for s in items if isinstance(s, str))
    ids = frozenset(int(i) for i in items if not isinstance(i, str))
    if "" in strings:
        raise LlmcError("stop", "A stop string must not be empty.")
    return strings, ids
