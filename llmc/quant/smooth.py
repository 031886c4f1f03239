"""SmoothQuant: moves the outliers of activations into the weights (Xiao et al. 2022, arXiv 2211.10438)."""

from __future__ import annotations

import torch

from llmc.quant.awq import apply_scale, oriented, per_channel
from llmc.quant.calibrate import LayerWork, Nearest, Rounding
from llmc.quant.fold import find_folds
from llmc.quant.recorder import Moments
from llmc.quant.rounding import Grid
from llmc.quant.schemes import Scheme


class SmoothQuant:
    """The method for llmc.quant.calibrate, for schemes with 8-bit activations.

    Args:
        alpha: how much of the difficulty goes to the weights: scale = max|x|**alpha / max|w|**(1 - alpha).
        rounding: how the scaled matrices are rounded; None = to the nearest.
    """

    def __init__(self, alpha: float = 0.5, rounding: Rounding | None = None) -> None:
        self._alpha = alpha
        self._rounding = rounding or Nearest()

    def prepare(self, work: LayerWork) -> None:
        """Scale the inputs of every group that a norm or another layer produces."""
        for fold in find_folds(work):
            moments = work.usages[fold.consumers[0]].moments[0]
            if moments is None:
                continue
            weights = torch.stack([oriented(work, n).abs().amax(dim=0) for n in fold.consumers])
            inputs = per_channel(fold, moments.peak.clamp(min=1e-5))
            outputs = per_channel(fold, weights.amax(dim=0).clamp(min=1e-5))
            apply_scale(work, fold, (inputs**self._alpha / outputs ** (1 - self._alpha)).clamp(min=1e-5))

    def round(
        self, weight: torch.Tensor, moments: Moments | None, scheme: Scheme
    ) -> tuple[torch.Tensor, Grid]:
        return self._rounding.round(weight, moments, scheme)
