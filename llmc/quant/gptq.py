"""GPTQ: second-order rounding of a weight matrix (Frantar et al. 2022, arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmc.errors import LlmcError
from llmc.quant.calibrate import LayerWork
from llmc.quant.recorder import Moments
from llmc.quant.rounding import Grid, best_grid, codes_of, values_of
from llmc.quant.schemes import Scheme


@dataclass(frozen=True)
class GPTQOptions:
    """How GPTQ rounds.

    Attributes:
        act_order: round columns with large inputs first. Scales belong to the columns' natural groups and are fixed
            beforehand ("static groups"), so that the stored weight keeps its column order.
        damping: fraction of the mean diagonal of the Hessian that is added to the diagonal.
        block: columns that are rounded before the errors are passed on to the rest.
    """

    act_order: bool = True
    damping: float = 0.01
    block: int = 128


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, options: GPTQOptions | None = None
) -> tuple[torch.Tensor, Grid]:
    """Round weight [N, K] so that its outputs on the calibration inputs change least; zeros (pruned weights) stay zero.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], the sum of x xᵀ over inputs x (any positive factor does).
        scheme: to round to.
        options: see there.

    Returns:
        (codes [N, K] in natural order, grid).
    """
    options = options or GPTQOptions()
    k = weight.shape[1]
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0  # a column that is never used is rounded to the nearest
    grid = best_grid(weight, scheme, torch.where(dead, diagonal.mean(), diagonal))
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    if not options.act_order:
        order = torch.arange(k)
    inverse = inverse_factor(hessian[order][:, order], options.damping)
    scale, zero = grid.spread(k)
    scale = scale[:, order]
    zero = None if zero is None else zero[:, order]
    rest = weight[:, order].clone()
    kept = rest != 0
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, k, options.block):
        end = min(start + options.block, k)
        errors = torch.empty((weight.shape[0], end - start))
        for j in range(start, end):
            z = None if zero is None else zero[:, j]
            code = codes_of(rest[:, j] * kept[:, j], scale[:, j], z, scheme)
            codes[:, j] = code.to(torch.uint8)
            error = (rest[:, j] - values_of(code, scale[:, j], z, scheme)) / inverse[j, j]
            rest[:, j:end] -= error[:, None] * inverse[j, j:end][None]
            errors[:, j - start] = error
        rest[:, end:] -= errors @ inverse[start:end, end:]
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    return natural, grid


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, float32 [K, K]; more damping if it needs it."""
    wide = hessian.double()
    eye = torch.eye(len(wide), dtype=torch.float64)
    mean = float(wide.diagonal().mean())
    for attempt in range(6):
        damped = wide + eye * (mean * damping * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0:
                return upper.float()
    raise LlmcError(
        "gptq-hessian",
        f"The second-order statistics of {len(wide)} inputs are not positive definite even with damping"
        f" {damping * 10**5:g}.",
        hint="Calibrate with more or other text, or raise the damping.",
    )


class GPTQ:
    """The method for llmc.quant.calibrate."""

    def __init__(self, options: GPTQOptions | None = None) -> None:
        self._options = options or GPTQOptions()

    def prepare(self, work: LayerWork) -> None:
        """GPTQ changes nothing beforehand."""

    def round(
        self, weight: torch.Tensor, moments: Moments | None, scheme: Scheme
    ) -> tuple[torch.Tensor, Grid]:
        assert moments is not None
        return gptq(weight, moments.second, scheme, self._options)
