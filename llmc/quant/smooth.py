"""SmoothQuant: moves the outliers of activations into the weights (Xiao et al. 2022, arXiv 2211.10438)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmc.quant.activations import RowSample, rounded_product
from llmc.quant.awq import apply_scale, oriented, per_channel
from llmc.quant.calibrate import LayerWork, Nearest, Rounding
from llmc.quant.fold import Fold, find_folds
from llmc.quant.recorder import Moments
from llmc.quant.rounding import Grid
from llmc.quant.schemes import Scheme

# a migration has to lower the error of the sample by this share: less is chance, and no migration is the safe choice
_WORTH = 0.01


@dataclass(frozen=True)
class SmoothOptions:
    """How the migration is searched.

    Attributes:
        steps: strengths between 0 and 1 that are tried, beside none at all.
        rows: inputs of every group that the error is measured on.
    """

    steps: int = 20
    rows: int = 1024


class SmoothQuant:
    """The method for llmc.quant.calibrate, for schemes with 8-bit activations.

    The paper takes one strength alpha for the whole model: scale = max|x|**alpha / max|w|**(1 - alpha). Here it is chosen
    for every group of matrices with one input, by the error of their outputs with weights and activations rounded as the
    scheme says; so is max|x|**alpha alone. No migration is one of the choices, so that none is worse than it on the
    calibration text.

    Args:
        options: see there.
        rounding: how the scaled matrices are rounded; None = to the nearest.
    """

    def __init__(self, options: SmoothOptions | None = None, rounding: Rounding | None = None) -> None:
        self._options = options or SmoothOptions()
        self._rounding = rounding or Nearest()

    def prepare(self, work: LayerWork) -> None:
        """Scale the inputs of every group that a norm or another layer produces."""
        folds = find_folds(work)
        if not folds:
            return
        tap = RowSample(work.layer.parameters, max(1, self._options.rows // work.runner.batches))
        work.runner.feed(work.layer, tap.watch)
        sampled = tap.sampled()
        for fold in folds:
            rows = sampled.get(fold.consumers[0])
            scale = None if rows is None else self._search(work, fold, rows)
            if scale is not None:
                apply_scale(work, fold, scale)

    def round(
        self, weight: torch.Tensor, moments: Moments | None, scheme: Scheme
    ) -> tuple[torch.Tensor, Grid]:
        return self._rounding.round(weight, moments, scheme)

    def _search(self, work: LayerWork, fold: Fold, rows: torch.Tensor) -> torch.Tensor | None:
        """The scale [width] with the least error of the outputs for inputs `rows` [n, K]; None = none is best."""
        moments = work.usages[fold.consumers[0]].moments[0]
        if moments is None:
            return None
        planned = [n for n in fold.consumers if n in work.plan]
        weights = [oriented(work, n) for n in planned]
        schemes = [work.plan[n] for n in planned]
        exact = [rows @ w.T for w in weights]

        def error(scale: torch.Tensor | None) -> float:
            total = 0.0
            for weight, scheme, out in zip(weights, schemes, exact, strict=True):
                x, w = (rows, weight) if scale is None else (rows / scale, weight * scale)
                got = rounded_product(x, w, scheme)
                total += float(((got - out) ** 2).sum())
            return total

        peaks = torch.stack([w.abs().amax(dim=0) for w in weights]).amax(dim=0)
        inputs = per_channel(fold, moments.peak.clamp(min=1e-5))
        outputs = per_channel(fold, peaks.clamp(min=1e-5))
        best, least = None, (1 - _WORTH) * error(None)
        for step in range(1, self._options.steps + 1):
            alpha = step / self._options.steps
            for scale in (inputs**alpha, inputs**alpha / outputs ** (1 - alpha)):
                scale = scale / (scale.max() * scale.min()).sqrt()
                loss = error(scale[fold.channel])
                if loss < least:
                    best, least = scale, loss
        return best
