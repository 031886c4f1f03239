"""Outlier columns: which inputs of a weight stay in floating point (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339).

The paper splits off, at run time, the columns of the activations with a value above a threshold. Here they are a fixed
number, and known beforehand: activations of large models have their outliers in the same few channels for every token
(its section 4), so that those with the largest values on a calibration text are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmc.quant.recorder import Moments, Usage
from llmc.quant.schemes import Scheme


def choose_columns(scheme: Scheme, weights: Sequence[tuple[torch.Tensor, Usage | None]]) -> torch.Tensor:
    """The outlier columns of weights that are packed as one, int64 [outliers], ascending.

    Those with the largest inputs; for weights whose inputs are not known (an expert that no token reached, an embedding
    that nothing is multiplied with) those with the largest weights.

    Args:
        scheme: says how many.
        weights: parameters as the source stores them, and how they are used, if that is known.
    """
    peaks = [m.peak for _, usage in weights if usage for m in usage.moments if m is not None]
    if not peaks:
        for tensor, usage in weights:
            matrix = tensor.transpose(-1, -2) if usage is not None and usage.transposed else tensor
            peaks.append(matrix.abs().flatten(0, -2).amax(dim=0))
    peak = torch.stack(peaks).amax(dim=0)
    found = torch.topk(peak, scheme.outliers(len(peak))).indices
    return found.sort().values


def without_columns(
    matrix: torch.Tensor, moments: Moments | None, columns: torch.Tensor
) -> tuple[torch.Tensor, Moments | None]:
    """A matrix [N, K] with these columns zero, and the statistics of inputs that are never used there."""
    used = torch.ones(matrix.shape[1])
    used[columns] = 0
    return matrix * used, None if moments is None else moments.scaled(used)
