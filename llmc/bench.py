"""Speed of an artifact: seconds to read a prompt, seconds per generated token, and where they go."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmc.errors import LlmcError
from llmc.kernel_work import Workload
from llmc.limits import MachineLimits
from llmc.roofline import StepRoofline, step_roofline
from llmc.runtime.model import Model
from llmc.runtime.sequence import Sequence

Progress = Callable[[float, float, str], None]
# greedy steps of one profile; each is repeated three times, see Profiler.run
_DECODE_REPEATS = 15


@dataclass(frozen=True)
class Sizes:
    """What to measure.

    Attributes:
        prompt: tokens of the prompt of each sequence.
        tokens: to generate, of each sequence.
        rounds: how often both.
        batch: sequences that run side by side.
    """

    prompt: int
    tokens: int
    rounds: int
    batch: int = 1


@dataclass(frozen=True)
class Speed:
    """Times of all rounds, seconds.

    Attributes:
        sizes: what was measured.
        prefill: per round: the prompts of the whole batch, until the last tokens' logits.
        decode: per step of all rounds, the choice of the likeliest token included.
    """

    sizes: Sizes
    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of the median round."""
        return self.sizes.batch * self.sizes.prompt / statistics.median(self.prefill)

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the median step, all sequences together."""
        return self.sizes.batch / statistics.median(self.decode)


def choose_sizes(
    model: Model, prompt: int | None, tokens: int, rounds: int, batch: int, *, room: int = 0
) -> Sizes:
    """Check what is asked for against the artifact's limits; a prompt that is not given is up to 512 tokens.

    Args:
        room: further tokens that the sequence must be able to hold.

    Raises:
        LlmcError: numbers below one, more sequences or tokens than the artifact takes.
    """
    limits = model.manifest.limits
    given = {"--prompt": prompt, "--tokens": tokens, "--rounds": rounds, "--batch": batch}
    for name, value in given.items():
        if value is not None and value < 1:
            raise LlmcError("bench-sizes", f"{name} must be at least 1, found {value}.")
    if batch > limits.max_batch:
        raise LlmcError(
            "batch-too-large",
            f"The artifact takes at most {limits.max_batch} sequences per step, found --batch {batch}.",
            hint="Compile with a larger --max-batch.",
        )
    most = limits.max_seq_len - max(tokens, room)
    if prompt is None:
        prompt = max(1, min(512, most))
    if prompt > most:
        raise LlmcError(
            "sequence-too-long",
            f"A prompt of {prompt} tokens and {max(tokens, room)} more do not fit into the artifact's "
            f"{limits.max_seq_len}.",
            hint=f"Use --prompt {most} or less." if most >= 1 else "Compile with a larger --max-seq-len.",
        )
    return Sizes(prompt, tokens, rounds, batch)


def profile_room() -> int:
    """Tokens that measure_steps appends to the prompt."""
    return 3 * _DECODE_REPEATS + 2


def measure_speed(model: Model, sizes: Sizes, progress: Progress = lambda done, total, what: None) -> Speed:
    """Run all rounds, after a short one that touches weights, code and pools for the first time."""
    prompts = _prompts(model, sizes)
    prefill: list[float] = []
    decode: list[float] = []
    total = sizes.rounds * (sizes.tokens + 1)
    _round(model, prompts, min(2, sizes.tokens), [], [])
    for number in range(sizes.rounds):
        progress(number * (sizes.tokens + 1), total, f"round {number + 1} of {sizes.rounds}")
        _round(model, prompts, sizes.tokens, prefill, decode)
    return Speed(sizes, tuple(prefill), tuple(decode))


def measure_steps(
    model: Model,
    sizes: Sizes,
    limits: MachineLimits,
    progress: Progress = lambda done, total, what: None,
) -> tuple[StepRoofline, ...]:
    """Decode and prefill kernel by kernel.

    The prefill step takes as much of the prompt as one step of the artifact does.

    Raises:
        LlmcError: the artifact lists no kernels.
    """
    if not any(f.kernels for f in model.manifest.functions):
        raise LlmcError(
            "no-kernels",
            "The manifest lists no kernels: it was written before they were counted.",
            hint="Compile the model again.",
        )
    profiler = model.profiler()
    prompts = _prompts(model, sizes)
    progress(0, 2, "decode, kernel by kernel")
    sequences = [model.new_sequence() for _ in prompts]
    try:
        last = [model.step(list(zip(sequences, prompts, strict=True)))]

        def decode() -> None:
            last[0] = model.step(_chosen(sequences, last[0]))

        times = profiler.run(decode, _DECODE_REPEATS)
    finally:
        _free(sequences)
    context = sizes.prompt + profile_room() // 2
    steps = [
        step_roofline(
            model.manifest,
            times,
            Workload.decode(sizes.batch, context),
            f"{sizes.batch} sequence{'s' * (sizes.batch > 1)} of {context} tokens",
            limits,
        )
    ]
    progress(1, 2, "prefill, kernel by kernel")
    first = prompts[0][: model.manifest.limits.max_step_tokens]
    if len(first) > 1:  # a single token is a decode step

        def prefill() -> None:
            with model.new_sequence() as sequence:
                model.step([(sequence, first)])[0].argmax()

        times = profiler.run(prefill, max(5, sizes.rounds))
        work = Workload.prefill(len(first))
        steps.append(step_roofline(model.manifest, times, work, f"a prompt of {len(first)} tokens", limits))
    return tuple(steps)


def _prompts(model: Model, sizes: Sizes) -> list[list[int]]:
    """Fixed token ids, spread over the vocabulary, so that embedding rows are not all in the cache."""
    vocabulary = model.manifest.model.vocab_size
    return [
        [(7919 * (i + 1) + 104729 * b) % vocabulary for i in range(sizes.prompt)] for b in range(sizes.batch)
    ]


def _round(
    model: Model, prompts: list[list[int]], tokens: int, prefill: list[float], decode: list[float]
) -> None:
    sequences = [model.new_sequence() for _ in prompts]
    try:
        start = time.perf_counter()
        logits = model.step(list(zip(sequences, prompts, strict=True)))
        prefill.append(time.perf_counter() - start)
        for _ in range(tokens):
            start = time.perf_counter()
            logits = model.step(_chosen(sequences, logits))
            decode.append(time.perf_counter() - start)
    finally:
        _free(sequences)


def _chosen(sequences: list[Sequence], logits: object) -> list[tuple[Sequence, list[int]]]:
    """The likeliest next token of each sequence."""
    import numpy as np

    return [(s, [int(i)]) for s, i in zip(sequences, np.argmax(np.asarray(logits), -1), strict=True)]


def _free(sequences: list[Sequence]) -> None:
    for sequence in sequences:
        sequence.free()
