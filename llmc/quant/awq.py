"""AWQ: per-channel scales that protect the weights of large activations (Lin et al. 2023, arXiv 2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llmc.quant.activations import RowSample, rounded_product
from llmc.quant.calibrate import LayerWork, Rounding
from llmc.quant.fold import Fold, find_folds
from llmc.quant.recorder import Moments
from llmc.quant.rounding import Grid, best_grid, decode, encode, plain_grid
from llmc.quant.schemes import Scheme

# groups up to this size are clipped by the error of their outputs, larger ones by that of their weights
_LARGEST_BLOCK = 256


@dataclass(frozen=True)
class AWQOptions:
    """How scales are searched.

    Attributes:
        steps: exponents between 0 and 1 that are tried.
        clip: search the range of every group for the least error of its outputs.
        rows: inputs of every group that the error is measured on where the scheme rounds activations too.
    """

    steps: int = 20
    clip: bool = True
    rows: int = 512


class AWQ:
    """The method for llmc.quant.calibrate.

    The paper's error is that of rounded weights, which second moments of the inputs give. A scheme that rounds activations
    too is judged by the outputs for a sample of inputs: a scale that evens out the mean magnitudes of channels may make
    the peaks of some of them the largest values of their tokens.

    Args:
        options: see there.
        rounding: how the scaled matrices are rounded; None = to the nearest with the clip search.
    """

    def __init__(self, options: AWQOptions | None = None, rounding: Rounding | None = None) -> None:
        self._options = options or AWQOptions()
        self._rounding = rounding

    def prepare(self, work: LayerWork) -> None:
        """Scale the inputs of every group of matrices that a producer can be found for."""
        folds = find_folds(work)
        sampled: dict[str, torch.Tensor] = {}
        if any(work.plan[n].activation_bits for fold in folds for n in fold.consumers if n in work.plan):
            tap = RowSample(work.layer.parameters, max(1, self._options.rows // work.runner.batches))
            work.runner.feed(work.layer, tap.watch)
            sampled = tap.sampled()
        for fold in folds:
            scale = self._search(work, fold, sampled.get(fold.consumers[0]))
            if scale is not None:
                apply_scale(work, fold, scale)

    def round(
        self, weight: torch.Tensor, moments: Moments | None, scheme: Scheme
    ) -> tuple[torch.Tensor, Grid]:
        if self._rounding is not None:
            return self._rounding.round(weight, moments, scheme)
        assert moments is not None
        if not self._options.clip:
            grid = plain_grid(weight, scheme)
        else:
            size = scheme.group_size or weight.shape[1]
            blocks = size <= _LARGEST_BLOCK
            grid = best_grid(weight, scheme, moments.second if blocks else moments.second.diagonal())
        return encode(weight, grid), grid

    def _search(self, work: LayerWork, fold: Fold, rows: torch.Tensor | None) -> torch.Tensor | None:
        """The scale [width] with the least output error of the matrices that are quantized; None = no scale is best.

        Args:
            rows: a sample of the inputs [n, K], if a scheme rounds activations.
        """
        moments = work.usages[fold.consumers[0]].moments[0]
        planned = [n for n in fold.consumers if n in work.plan]
        if moments is None:
            return None
        weights = [oriented(work, n) for n in planned]
        schemes = [work.plan[n] for n in planned]
        inputs = per_channel(fold, moments.magnitude / max(moments.rows, 1))
        outputs = per_channel(
            fold, torch.stack([_share(w, s) for w, s in zip(weights, schemes, strict=True)]).mean(0)
        )
        best, least = None, self._loss(weights, schemes, moments, None, rows)
        for step in range(1, self._options.steps + 1):
            alpha = step / self._options.steps
            for scale in (inputs**alpha, inputs**alpha / outputs ** (1 - alpha)):
                scale = scale.clamp(min=1e-4)
                scale = scale / (scale.max() * scale.min()).sqrt()
                loss = self._loss(weights, schemes, moments, scale[fold.channel], rows)
                if loss < least:
                    best, least = scale, loss
        return best

    def _loss(
        self,
        weights: list[torch.Tensor],
        schemes: list[Scheme],
        moments: Moments,
        scale: torch.Tensor | None,
        rows: torch.Tensor | None,
    ) -> float:
        total = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            scaled = weight if scale is None else weight * scale
            if scheme.activation_bits and rows is not None:
                got = rounded_product(rows if scale is None else rows / scale, scaled, scheme)
                share = moments.rows / len(rows)
                total += share * float(((got - rows @ weight.T) ** 2).sum())
                continue
            grid = plain_grid(scaled, scheme)
            rounded = decode(encode(scaled, grid), grid)
            error = (rounded if scale is None else rounded / scale) - weight
            total += float(((error @ moments.second) * error).sum())
        return total


def apply_scale(work: LayerWork, fold: Fold, scale: torch.Tensor) -> None:
    """Fold a scale and bring the statistics up to date."""
    fold.apply(work, scale)
    work.changed.update(fold.producer.names())
    work.changed.update(fold.consumers)
    old = work.usages[fold.consumers[0]].moments[0]
    moments = None if old is None else old.scaled(1 / scale[fold.channel])
    for name in fold.consumers:
        work.usages[name] = replace(work.usages[name], moments=[moments])


def oriented(work: LayerWork, name: str) -> torch.Tensor:
    """A matrix as [N, K]."""
    weight = work.layer.parameters[name]
    return weight.T.contiguous() if work.usages[name].transposed else weight


def per_channel(fold: Fold, values: torch.Tensor) -> torch.Tensor:
    """Positive values [K] of inputs as geometric means over those that one channel of the producer feeds, [width].

    Channels that feed none get 1."""
    logs = values.clamp(min=1e-8).log()
    total = torch.zeros(fold.width).index_add_(0, fold.channel, logs)
    count = torch.zeros(fold.width).index_add_(0, fold.channel, torch.ones_like(logs))
    return torch.where(count > 0, (total / count.clamp(min=1)).exp(), torch.ones(fold.width))


def _share(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Mean over rows of |w| relative to the largest of its group, [K]."""
    size = scheme.group_size or weight.shape[1]
    magnitude = weight.abs()
    parts = [p / p.amax(dim=1, keepdim=True).clamp(min=1e-12) for p in magnitude.split(size, dim=1)]
    return torch.cat(parts, dim=1).mean(dim=0)
