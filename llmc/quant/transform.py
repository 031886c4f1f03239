"""Pruning and low-rank factors: weight transforms of a whole model, one decoder layer at a time, before quantization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmc.frontend.graph import SourceModel
from llmc.frontend.low_rank import FIRST, SECOND, FactoredWeights, low_rank
from llmc.quant.low_rank import factors
from llmc.quant.overlay import FloatStore, OverlayWeights
from llmc.quant.prune import pruned
from llmc.quant.recorder import Moments, Recorder, Usage
from llmc.quant.runner import LayerRunner
from llmc.quant.shrink import PruneRule, RankRule

# narrower weights gain nothing, as in QuantizeWeights
_SMALLEST = 32

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Transformed:
    """What a transform has made.

    Attributes:
        source: the model with the new weights, and with the structure that they need.
        errors: name -> relative error of the outputs on the calibration text, of every changed matrix.
        notes: what was not done as asked, and why.
    """

    source: SourceModel
    errors: dict[str, float]
    notes: tuple[str, ...] = ()


def prune(
    source: SourceModel,
    sequences: torch.Tensor,
    rule: PruneRule,
    *,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Transformed:
    """Set weights of all linear layers and experts inside of the decoder layers to zero; routers are left alone.

    Args:
        source: an opened model with weights.
        sequences: int64 [n, length]; of no matter for `magnitude`.
        progress: called with (layers done, layers).
        folder: for the temporary files: float32, as large as the pruned weights.

    Raises:
        LlmcError: the pattern does not fit a weight.
    """
    store = FloatStore(folder)
    notes: list[str] = []

    def change(name: str, weight: torch.Tensor, usage: Usage) -> torch.Tensor:
        parts = list(weight) if weight.ndim == 3 else [weight]
        unseen = sum(m is None for m in usage.moments)
        if unseen and rule.needs_text:
            notes.append(
                f"{unseen} of {len(parts)} experts of {name}: pruned by magnitude, because the calibration text did not"
                " reach them"
            )
        made = [
            pruned(name, part.contiguous(), known, rule)
            for part, known in zip(parts, usage.moments, strict=True)
        ]
        result = torch.stack(made) if weight.ndim == 3 else made[0]
        store.put(name, result.transpose(-1, -2).contiguous() if usage.transposed else result)
        return result

    errors = _each_layer(source, sequences, lambda name: True, store, change, progress)
    assert source.weights is not None
    made = replace(source, weights=OverlayWeights(source.weights, store))
    return Transformed(made, errors, tuple(notes))


def factor(
    source: SourceModel,
    sequences: torch.Tensor,
    rule: RankRule,
    *,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Transformed:
    """Replace linear layers inside of the decoder layers by two of low rank; see llmc.frontend.low_rank.

    Args and errors as of `prune`.
    """
    made, ranks = low_rank(source, rule)
    store = FloatStore(folder)

    def change(name: str, weight: torch.Tensor, usage: Usage) -> torch.Tensor:
        path = name.removesuffix(".weight")
        first, second = factors(weight, usage.moments[0], ranks[path])
        store.put(f"{path}.{FIRST}", first)
        store.put(f"{path}.{SECOND}", second)
        return second @ first

    wanted = {f"{path}.weight" for path in ranks}
    errors = _each_layer(source, sequences, wanted.__contains__, store, change, progress)
    assert source.weights is not None
    made = replace(made, weights=FactoredWeights(source.weights, ranks, store))
    return Transformed(made, errors)


def _each_layer(
    source: SourceModel,
    sequences: torch.Tensor,
    wanted: Callable[[str], bool],
    store: FloatStore,
    change: Callable[[str, torch.Tensor, Usage], torch.Tensor],
    progress: Progress | None,
) -> dict[str, float]:
    """Change the matrices of every layer; each layer's inputs are those that the changed layers before it give.

    Returns:
        name -> relative error of its outputs.
    """
    assert source.weights is not None
    runner = LayerRunner(source, source.weights, sequences)
    runner.start()
    shared = runner.shared_names()
    errors: dict[str, float] = {}
    for i, path in enumerate(runner.layers):
        with runner.held(path) as layer:
            recorder = Recorder(layer.parameters)
            runner.feed(layer, recorder.watch)
            usages = recorder.finish()
            experts = {len(layer.parameters[n]) for n in usages if layer.parameters[n].ndim == 3}
            for name, usage in usages.items():
                tensor = layer.parameters[name]
                router = tensor.ndim == 2 and bool(experts & set(tensor.shape))
                if not wanted(name) or router or min(tensor.shape[-2:]) < _SMALLEST:
                    continue
                if name in shared and name in store:
                    tensor.copy_(store[name])
                    continue
                weight = tensor.transpose(-1, -2) if usage.transposed else tensor
                result = change(name, weight.contiguous(), usage)
                errors[name] = _error(weight, result, usage)
                weight.copy_(result)
            runner.advance(layer)
        if progress is not None:
            progress(i + 1, len(runner.layers))
    return errors


def _error(before: torch.Tensor, after: torch.Tensor, usage: Usage) -> float:
    """Of the outputs for the inputs of the calibration text, relative to their size."""
    pairs = zip(before, after, strict=True) if before.ndim == 3 else [(before, after)]
    error, norm = 0.0, 0.0
    for (old, new), known in zip(pairs, usage.moments, strict=True):
        if known is not None:
            error += _energy(new - old, known)
            norm += _energy(old, known)
    return (max(error, 0.0) / norm) ** 0.5 if norm > 0 else 0.0


def _energy(weight: torch.Tensor, moments: Moments) -> float:
    return float(((weight @ moments.second) * weight).sum())
