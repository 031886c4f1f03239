"""The quality gate of a compile: the artifact's figures on a text, and whether they are within the bounds asked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmc.artifact import LayerQuality, TextQuality
from llmc.errors import LlmcError
from llmc.evaluate import Progress, Window, evaluate
from llmc.evaluate_text import source_reference, text_windows
from llmc.spec import CompileSpec
from llmc.verify_compare import LayerError

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel
    from llmc.runtime.model import Model

TapsRunner = Callable[[Sequence[int]], Mapping[str, np.ndarray]]

# tokens on which layers are compared: their figures need few
_LAYER_TOKENS = 128
# layers that a failure names
_WORST = 3


def text_quality(
    model: Model,
    source: SourceModel,
    spec: CompileSpec,
    *,
    taps_runner: TapsRunner | None,
    progress: Progress | None = None,
) -> TextQuality:
    """Evaluate an artifact on the spec's text against its source model in float32.

    Args:
        model: the loaded artifact.
        source: its opened source model, with weights.
        taps_runner: gives hidden states after each layer of the compiled graph; None = leave the layers out.

    Raises:
        LlmcError: the text is unreadable or too short, there is no tokenizer, or logits are not finite.
    """
    assert spec.eval_text is not None
    windows = text_windows(model, Path(spec.eval_text), max_tokens=spec.eval_tokens)
    result = evaluate(model.logits, windows, against=source_reference(source).logits, progress=progress)
    assert result.against is not None
    layers: tuple[LayerQuality, ...] = ()
    note = ""
    if taps_runner is not None:
        try:
            layers = layer_qualities(layer_errors(source, spec, windows[0], taps_runner))
        except LlmcError as e:  # e.g. a model whose layers cannot be told apart
            note = f"the layers could not be compared ({e.ref})"
    figures = result.against
    return TextQuality(
        text=tokens_hash(windows),
        tokens=result.tokens,
        window=len(windows[0].ids),
        perplexity=rounded(result.perplexity),
        source_perplexity=rounded(figures.perplexity),
        increase_percent=rounded(figures.increase_percent),
        increase_error=rounded(figures.increase_error),
        kl_mean=rounded(figures.kl_mean),
        kl_p99=rounded(figures.kl_p99),
        top1_agreement=rounded(figures.top1_agreement),
        layers=layers,
        note=note,
    )


def layer_errors(
    source: SourceModel, spec: CompileSpec, window: Window, taps_runner: TapsRunner
) -> list[LayerError]:
    """Errors of each layer's output on the beginning of a window, first layer first."""
    from llmc.verify import compare_layers

    ids = window.ids[:_LAYER_TOKENS]
    dtype = spec.dtype.value if spec.dtype else source.dtype
    kv_dtype = spec.kv_dtype.value if spec.kv_dtype else None
    return compare_layers(source, ids, taps_runner(ids), dtype=dtype, kv_dtype=kv_dtype)


def layer_qualities(errors: Sequence[LayerError]) -> tuple[LayerQuality, ...]:
    """The errors as the manifest holds them."""
    return tuple(LayerQuality(e.path, rounded(e.error), rounded(e.noise)) for e in errors)


def check_gate(text: TextQuality, *, max_kl: float | None, max_ppl_increase: float | None) -> None:
    """Raises:
    LlmcError: a figure is beyond its bound; names the figures and the layers that add most of the error.
    """
    failures = []
    if max_ppl_increase is not None and not text.increase_percent <= max_ppl_increase:
        failures.append(
            f"the perplexity grows by {text.increase_percent:.3g} % ± {text.increase_error:.2g} (from "
            f"{text.source_perplexity:.4f} to {text.perplexity:.4f}), allowed {max_ppl_increase:g} %"
        )
    if max_kl is not None and not text.kl_mean <= max_kl:
        failures.append(f"the mean KL divergence is {text.kl_mean:.3g} nats, allowed {max_kl:g}")
    if not failures:
        return
    where = ""
    if text.layers:
        named = (
            f"{layer.path} ({own:.2g}, to {layer.error:.2g})" for layer, own in worst_layers(text.layers)
        )
        where = f" Most error is added by {', '.join(named)}."
    raise LlmcError(
        "quality-gate",
        f"The artifact is worse than allowed on {text.tokens} tokens: {'; '.join(failures)}.{where}",
        hint="Use a finer --quant scheme (or --dtype f32), for the whole model or for these layers.",
        context={layer.path: layer.error for layer in text.layers},
    )


def worst_layers(layers: Sequence[LayerQuality], most: int = _WORST) -> list[tuple[LayerQuality, float]]:
    """The layers that add most to the error, with what each adds; a layer inherits the error of those before it.

    Errors are taken as independent of each other: their squares add up.
    """
    added = []
    before = 0.0
    for layer in layers:
        added.append((layer, math.sqrt(max(layer.error**2 - before**2, 0.0))))
        before = layer.error
    return sorted(added, key=lambda pair: -pair[1])[:most]


def tokens_hash(windows: Sequence[Window]) -> str:
    """sha256 (hex) of the tokens of all windows."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.array([len(window.ids), window.scored, *window.ids], "<i8").tobytes())
    return digest.hexdigest()


def rounded(value: float) -> float:
    """Six significant digits: the rest may depend on the number of threads."""
    return float(f"{value:.6g}")
