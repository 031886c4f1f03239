"""The check at the end of a compile: the artifact's logits against the source model's in float32.

A tolerance that is fixed beforehand is either too tight for bfloat16 or hides a wrong mask. So the error of the
artifact is compared with the error that the source model itself makes in the artifact's dtype.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from llmc.artifact import QualityReport
from llmc.errors import LlmcError
from llmc.frontend.graph import SourceModel
from llmc.kv_plan import is_coded
from llmc.reference import ReferenceResult, reference_logits
from llmc.spec import Verify
from llmc.verify_compare import (
    EPSILON,
    LayerError,
    LogitsComparison,
    compare_logits,
    distance,
    first_divergence,
    layer_errors,
)

TapsRunner = Callable[[Sequence[int]], Mapping[str, np.ndarray]]
Reference = Callable[..., ReferenceResult]

# three quarters are prefilled: decoding crosses the end of a page of 16 or 32 tokens
_SAMPLE = 40
_SAMPLE_MOST = 96
_FULL = 256
_RAGGED = ((45, 33), (29, 7))
# logits of a long prompt over a large vocabulary are held several times over
_MOST_LOGITS = 1 << 27
# Activations that are rounded to int8 fall on the other side of a tie after any change, however small. What a float32
# artifact may differ by is measured by changing them by this share: some of a layer's inputs then do.
_JITTER = 2.0**-13


class LogitsModel(Protocol):
    """What verify needs of a loaded artifact; llmc.runtime.model.Model has it."""

    def logits(self, token_ids: Sequence[int], *, prefill: int | None = None) -> np.ndarray:
        """f32 [n, V]: the first `prefill` tokens in one go, the others one by one through `decode`."""

    def logits_batch(
        self, batch: Sequence[Sequence[int]], *, prefill: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """The same for several sequences that run side by side."""


@dataclass(frozen=True)
class Prompt:
    """Tokens, of which the first `prefill` are given in one go."""

    ids: tuple[int, ...]
    prefill: int


@dataclass(frozen=True)
class _Rows:
    """One run of the artifact and what the source says to it; arrays [n, V]."""

    prompt: Prompt
    artifact: np.ndarray
    exact: np.ndarray
    rounded: np.ndarray | None


def verify(
    model: LogitsModel,
    source: SourceModel,
    *,
    mode: Verify,
    dtype: str,
    kv_dtype: str | None = None,
    max_seq_len: int | None = None,
    seed: int = 0,
    taps_runner: TapsRunner | None = None,
    unquantized: SourceModel | None = None,
    reference: Reference | None = None,
) -> QualityReport:
    """Compare an artifact with the model that it was compiled from.

    Args:
        model: the loaded artifact.
        source: the opened model with its weights.
        mode: sample: one prompt of 40 tokens, bounded time even for large checkpoints; full: a prompt that goes past
            the windows and over several pages, and two ragged sequences in one batch.
        dtype: of the artifact's weights and activations (TVM's name).
        kv_dtype: of its cache; None = what the artifact's manifest says, else dtype.
        max_seq_len: the artifact's limit; None = what its manifest says, else the model's.
        seed: of the random tokens.
        taps_runner: gives the artifact's hidden states after each layer, to find the first one that is off.
        unquantized: the model before its weights were quantized; the distance to it is reported, without a bound.
        reference: what runs the source model; None = reference_logits.

    Raises:
        LlmcError: "verify-failed" with the first diverging layer; "source-not-finite" if the source itself gives NaN;
            "kv-dtype-unchecked" if the source's cache cannot be rounded to 8 bits.
    """
    if mode is Verify.OFF:
        return QualityReport(mode=mode.value, note="not checked against the source model")
    if source.program is not None and source.dtype != "float32":
        # its dtypes are part of the graph: it cannot be run in float32
        note = f"not checked: an exported program in {source.dtype} has no float32 reference"
        return QualityReport(mode=Verify.OFF.value, note=note)
    start = time.perf_counter()
    manifest = getattr(model, "manifest", None)
    if manifest is not None:
        kv_dtype = kv_dtype or _coarsest([g.dtype for g in manifest.kv_plan.groups] or [dtype])
        max_seq_len = max_seq_len or manifest.limits.max_seq_len
    coarse = _coarsest([dtype, kv_dtype or dtype])
    prompts, note = plan_prompts(
        source, mode, min(max_seq_len or source.max_seq_len, source.max_seq_len), seed
    )
    artifact = [model.logits(prompts[0].ids, prefill=prompts[0].prefill)]
    if len(prompts) > 1:
        artifact += model.logits_batch([p.ids for p in prompts[1:]], prefill=[p.prefill for p in prompts[1:]])
    run = reference or reference_logits
    runs = []
    for prompt, logits in zip(prompts, artifact, strict=True):
        exact = _finite(run(source, prompt.ids, "float32").logits, source, "float32")
        rounded = None
        if coarse != "float32":
            result = run(source, prompt.ids, dtype, kv_dtype=kv_dtype)
            if is_coded(kv_dtype or dtype) and not result.cache_rounded:
                raise _no_yardstick(source, kv_dtype or dtype)
            rounded = _finite(result.logits, source, coarse)
        elif getattr(source.weights, "rounded_inputs", None):
            rounded = run(source, prompt.ids, dtype, jitter=_JITTER).logits
        runs.append(_Rows(prompt, np.asarray(logits, np.float32), exact, rounded))
    comparison = _compare(runs, source, coarse)
    if comparison.findings:
        where = _locate(comparison, prompts[0], source, dtype, kv_dtype, coarse, taps_runner)
        raise _failure(comparison, source, coarse, where)
    report = QualityReport(
        mode=mode.value,
        tokens=sum(len(p.ids) for p in prompts),
        prefill_max_abs_error=comparison.max_abs["prefill"],
        decode_max_abs_error=comparison.max_abs.get("decode"),
        relative_error=comparison.relative_error,
        kl_mean=comparison.kl_mean,
        top1_agreement=comparison.top1_agreement,
        reference_noise=comparison.reference_noise,
        tolerance=comparison.tolerance,
        note=note,
    )
    if unquantized is not None:
        report = _with_distance(report, runs, unquantized, run)
    return replace(report, seconds=round(time.perf_counter() - start, 3))


def _no_yardstick(source: SourceModel, kv_dtype: str) -> LlmcError:
    return LlmcError(
        "kv-dtype-unchecked",
        f"A KV cache in {kv_dtype} cannot be checked for {source.name}: what rounding keys and values costs is measured on "
        "the source model, and this one does its attention without transformers' AttentionInterface.",
        hint="Use a cache of 16 bits, or --verify off.",
    )


def _with_distance(
    report: QualityReport, runs: Sequence[_Rows], unquantized: SourceModel, run: Reference
) -> QualityReport:
    """The report with what quantizing the weights has changed."""
    exact = [_finite(run(unquantized, r.prompt.ids, "float32").logits, unquantized, "float32") for r in runs]
    change = distance(np.concatenate([r.artifact for r in runs]), np.concatenate(exact))
    return replace(
        report, quant_relative_error=change[0], quant_kl_mean=change[1], quant_top1_agreement=change[2]
    )


def plan_prompts(source: SourceModel, mode: Verify, limit: int, seed: int) -> tuple[list[Prompt], str]:
    """Random prompts, and a note on what they do not cover.

    Args:
        limit: most tokens of a sequence.
    """
    rng = np.random.default_rng(seed)
    vocab = vocab_size(source)
    windows = attention_windows(source)
    small = [w for w in windows if w + 16 <= _SAMPLE_MOST]
    length = max([_SAMPLE, *(w + 16 for w in small)])
    if mode is Verify.FULL:
        length = max([_FULL, *(2 * w + 16 if w <= _FULL else w + 64 for w in windows)])
    length = min(length, limit, max(_SAMPLE, _MOST_LOGITS // vocab))

    def prompt(n: int, prefill: int) -> Prompt:
        n = min(n, limit)
        return Prompt(tuple(rng.integers(0, vocab, n).tolist()), max(1, min(prefill, n - 1)))

    prompts = [prompt(length, length * 3 // 4)]
    if mode is Verify.FULL:
        # decoding is slow to check: enough tokens to cross pages and windows
        prompts = [Prompt(prompts[0].ids, max(prompts[0].prefill, length - 80))]
        prompts += [prompt(n, prefill) for n, prefill in _RAGGED]
    unseen = [w for w in windows if w >= length]
    note = f"the window of {max(unseen)} tokens was not exceeded" if unseen else ""
    return prompts, note


def attention_windows(source: SourceModel) -> tuple[int, ...]:
    """Windows and chunks of attention that the config names, smallest first."""
    config: Any = getattr(source.module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = set()
    for name in ("sliding_window", "attention_chunk_size", "window_size", "local_attention"):
        value = getattr(config, name, None)
        if isinstance(value, int) and 0 < value < 1 << 30:
            found.add(value)
    return tuple(sorted(found))


def vocab_size(source: SourceModel) -> int:
    """Number of token ids that the model's embedding takes."""
    get = getattr(source.module, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    if isinstance(embedding, torch.nn.Embedding):
        return embedding.num_embeddings
    sizes = [m.num_embeddings for m in source.module.modules() if isinstance(m, torch.nn.Embedding)]
    if sizes:
        return max(sizes)
    config: Any = getattr(source.module, "config", None)
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int):
        return size
    two_dimensional = [p.shape[0] for p in source.module.parameters() if p.ndim == 2]
    return int(max(two_dimensional, default=1))


def is_routed(source: SourceModel) -> bool:
    """Whether the model picks experts: only they stack weights along a third axis."""
    return any(p.ndim == 3 for p in source.module.parameters())


def _coarsest(dtypes: Sequence[str]) -> str:
    return max(dtypes, key=lambda d: EPSILON[d])


def _finite(logits: np.ndarray, source: SourceModel, dtype: str) -> np.ndarray:
    if not np.isfinite(logits).all():
        hint = (
            "Compile with --dtype bf16 or f32."
            if dtype == "float16"
            else "The checkpoint is damaged; use another one."
        )
        raise LlmcError(
            "source-not-finite",
            f"{source.name} itself gives NaN or infinite logits in {dtype} under torch.",
            hint=hint,
        )
    return logits


def _compare(runs: Sequence[_Rows], source: SourceModel, coarse: str) -> LogitsComparison:
    """All runs laid end to end, their rows in groups that a defect is likely to hit as a whole."""
    groups: dict[str, list[int]] = {}
    windows = attention_windows(source)
    at = 0
    for i, run in enumerate(runs):
        for row in range(len(run.exact)):
            part = "prefill" if row < run.prompt.prefill else "decode"
            names = [part, *(f"past window {w}" for w in windows if row >= w)]
            if i > 0:
                names.append(f"ragged {part}")
            for name in names:
                groups.setdefault(name, []).append(at + row)
        at += len(run.exact)
    shapes = [(r.artifact.shape, r.exact.shape) for r in runs]
    if any(a != e for a, e in shapes):
        raise LlmcError(
            "verify-failed",
            f"The artifact's logits have the shape {shapes[0][0]}, the source model's {shapes[0][1]}.",
            hint="This is a bug in llmc; please report it.",
        )
    rounded = [r.rounded for r in runs if r.rounded is not None]
    return compare_logits(
        np.concatenate([r.artifact for r in runs]),
        np.concatenate([r.exact for r in runs]),
        np.concatenate(rounded) if rounded else None,
        {name: np.array(rows) for name, rows in groups.items()},
        dtype=coarse,
        routed=is_routed(source),
    )


def compare_layers(
    source: SourceModel,
    token_ids: Sequence[int],
    taps: Mapping[str, np.ndarray],
    *,
    dtype: str,
    kv_dtype: str | None = None,
) -> list[LayerError]:
    """Errors of the artifact's hidden states, layer by layer.

    Args:
        taps: path of a layer -> the artifact's output f32 [n, d], in the order of the layers.
    """
    paths = tuple(taps)
    coarse = _coarsest([dtype, kv_dtype or dtype])
    exact = reference_logits(source, token_ids, "float32", taps=paths).taps
    rounded = None
    if coarse != "float32":
        rounded = reference_logits(source, token_ids, dtype, kv_dtype=kv_dtype, taps=paths).taps
    elif getattr(source.weights, "rounded_inputs", None):
        rounded = reference_logits(source, token_ids, dtype, jitter=_JITTER, taps=paths).taps
    return layer_errors(paths, taps, exact, rounded, dtype=coarse, routed=is_routed(source))


def _locate(
    comparison: LogitsComparison,
    prompt: Prompt,
    source: SourceModel,
    dtype: str,
    kv_dtype: str | None,
    coarse: str,
    taps_runner: TapsRunner | None,
) -> str:
    """A sentence on where the error begins."""
    if taps_runner is None:
        return "The first diverging layer is not known."
    try:
        taps = taps_runner(prompt.ids)
    except LlmcError as e:
        return f"The first diverging layer could not be found ({e.ref}: {e.message})"
    errors = compare_layers(source, prompt.ids, taps, dtype=dtype, kv_dtype=kv_dtype)
    first = first_divergence(errors)
    if first is not None:
        noise = f"; the source's own in {coarse}: {first.noise:.3g}" if first.noise else ""
        return (
            f"The first diverging layer is {first.path}: relative error {first.error:.3g}, allowed"
            f" {first.limit:.3g}{noise}."
        )
    if all(f.rows in ("decode", "ragged decode") for f in comparison.findings):
        return "All layers agree when the prompt is prefilled: the error is in decoding through the cache."
    last = errors[-1].path if errors else "the layers"
    return f"All layers agree up to {last}: the error is in what follows it (final norm, output projection)."


def _failure(comparison: LogitsComparison, source: SourceModel, coarse: str, where: str) -> LlmcError:
    worst = max(comparison.findings, key=lambda f: f.error / f.limit if f.limit else math.inf)
    noise = ""
    if comparison.reference_noise is not None:
        noise = f" (the source model itself has {comparison.reference_noise:.3g} in {coarse})"
    return LlmcError(
        "verify-failed",
        f"The compiled artifact does not compute what {source.name} does: {worst.text()}{noise}. {where}",
        hint="This is a bug in llmc: please report it with the output of tools/bisect_layers.py.",
        context={
            "findings": [f.text() for f in comparison.findings],
            "relative_error": comparison.relative_error,
            "kl_mean": comparison.kl_mean,
        },
    )
