"""Low-rank factors of a matrix that change its outputs least (SVD-LLM: Wang et al. 2024, arXiv 2403.07378)."""

from __future__ import annotations

import torch

from llmc.quant.recorder import Moments

_DAMPING = 1e-4  # of the mean diagonal


def factors(weight: torch.Tensor, moments: Moments | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(first [rank, K], second [N, rank]) with second @ first the best approximation of weight [N, K] on the inputs.

    The error |(W - W') X| is |(W - W') L| with L Lᵀ the sum of x xᵀ: a truncated singular value decomposition of W L,
    computed by the eigenvectors of the smaller of its two Gram matrices, in float64. Without statistics L = 1.
    """
    wide = weight.double()
    n, k = wide.shape
    lower = torch.eye(k, dtype=torch.float64) if moments is None else _root(moments.second.double())
    whitened = wide @ lower
    if n <= k:
        _, vectors = torch.linalg.eigh(whitened @ whitened.T)
        second = vectors[:, -rank:]
        first = second.T @ wide
    else:
        _, vectors = torch.linalg.eigh(whitened.T @ whitened)
        top = vectors[:, -rank:]
        second = whitened @ top
        first = torch.linalg.solve_triangular(lower.T, top, upper=True).T
    # both of one size, component by component: neither is harder to round than the other
    size = (second.norm(dim=0) / first.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return (first * size[:, None]).float().contiguous(), (second / size).float().contiguous()


def _root(second: torch.Tensor) -> torch.Tensor:
    """Lower triangular L with L Lᵀ = second, damped as much as it needs."""
    eye = torch.eye(len(second), dtype=torch.float64)
    mean = float(second.diagonal().mean()) or 1.0
    for attempt in range(8):
        lower, failed = torch.linalg.cholesky_ex(second + eye * (mean * _DAMPING * 10**attempt))
        if int(failed) == 0:
            return lower
    return eye
