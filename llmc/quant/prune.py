"""Pruning: which weights of a matrix become zero, and what the others make of it. They stay dense matrices."""

from __future__ import annotations

import torch

from llmc.errors import LlmcError
from llmc.quant.gptq import inverse_factor
from llmc.quant.recorder import Moments
from llmc.quant.shrink import MAGNITUDE, PruneRule

_BLOCK = 128  # columns whose mask SparseGPT chooses together
_DAMPING = 0.01


def pruned(name: str, weight: torch.Tensor, moments: Moments | None, rule: PruneRule) -> torch.Tensor:
    """Weight float32 [N, K] with zeros.

    magnitude: the smallest weights of the whole matrix. wanda: of every row, those with the smallest
    |w| times the norm of their input (Sun et al. 2023, arXiv 2306.11695). sparsegpt: one column after the other, the
    error passed on to the columns that follow by the second-order statistics of the inputs (Frantar and Alistarh 2023,
    arXiv 2301.00774). With a pattern N:M every method keeps the N with the largest score of every M.

    Args:
        name: for messages.
        moments: of the inputs; None: nothing is known of them, and magnitudes decide.

    Raises:
        LlmcError: the pattern does not divide K.
    """
    if rule.of and weight.shape[1] % rule.of:
        raise LlmcError(
            "prune-width",
            f"The pattern {rule.kept}:{rule.of} needs a number of inputs that {rule.of} divides; {name} has"
            f" {weight.shape[1]}.",
            hint=f"Give a share instead, such as --prune {rule.method}:{rule.share:g}.",
        )
    if moments is None or rule.method == MAGNITUDE:
        return weight * _mask(weight.abs(), rule, whole=rule.method == MAGNITUDE)
    if rule.method == "wanda":
        return weight * _mask(weight.abs() * moments.second.diagonal().sqrt(), rule, whole=False)
    return _sparsegpt(weight, moments.second, rule)


def _mask(score: torch.Tensor, rule: PruneRule, *, whole: bool) -> torch.Tensor:
    """1 where a weight stays, [N, K]; without a pattern by rank in the whole matrix or in each row."""
    n, k = score.shape
    if rule.of:
        groups = score.reshape(n, k // rule.of, rule.of)
        kept = groups.topk(rule.kept, dim=2).indices
        return torch.zeros_like(groups).scatter_(2, kept, 1.0).reshape(n, k)
    flat = score.reshape(1, -1) if whole else score
    gone = flat.topk(round(rule.share * flat.shape[1]), dim=1, largest=False).indices
    return torch.ones_like(flat).scatter_(1, gone, 0.0).reshape(n, k)


def _sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, rule: PruneRule) -> torch.Tensor:
    k = weight.shape[1]
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal <= 0] = 1.0  # an input that is never used
    inverse = inverse_factor(hessian, _DAMPING)
    saliency = inverse.diagonal() ** 2
    rest = weight.clone()
    out = torch.empty_like(rest)
    # a pattern's groups must not be cut in two
    size = _BLOCK // rule.of * rule.of if rule.of else _BLOCK
    for start in range(0, k, size):
        end = min(start + size, k)
        errors = torch.empty(weight.shape[0], end - start)
        if not rule.of:
            mask = _mask(rest[:, start:end] ** 2 / saliency[start:end], rule, whole=True)
        for j in range(start, end):
            if rule.of and j % rule.of == 0:
                group = slice(j, j + rule.of)
                part = _mask(rest[:, group] ** 2 / saliency[group], rule, whole=False)
            keep = part[:, j % rule.of] if rule.of else mask[:, j - start]
            out[:, j] = rest[:, j] * keep
            error = (rest[:, j] - out[:, j]) / inverse[j, j]
            rest[:, j:end] -= error[:, None] * inverse[j, j:end][None]
            errors[:, j - start] = error
        rest[:, end:] -= errors @ inverse[start:end, end:]
    return out
