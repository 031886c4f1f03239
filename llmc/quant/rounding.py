"""Scales and codes of a weight matrix in a scheme, in torch: what GPTQ, AWQ and SmoothQuant round with."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from llmc.errors import LlmcError
from llmc.quant.schemes import Code, Scheme
from llmc.quant.weight import TABLES, QuantizedWeight

_E4M3_MAX, _E2M1_MAX_EXPONENT = 448.0, 2
# smallest positive float16, so that the scale of a group of tiny weights is not rounded to zero
_TINY = {"float32": 1.2e-38, "float16": 2.0**-24, "e8m0": 2.0**-126}
_LARGEST_F16 = 65504.0
# fractions of the largest magnitude that a scale is tried with; below about a half, clipping always costs more
SHRINKS = tuple(1.0 - 0.025 * i for i in range(20))


@dataclass(frozen=True, eq=False)
class Grid:
    """What a weight [N, K] is rounded to.

    Attributes:
        scheme: the scheme.
        scales: float32 [N, G].
        zeros: float32 [N, G], whole numbers; None if the scheme is symmetric.
    """

    scheme: Scheme
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def spread(self, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point per element [N, K]."""
        size = self.scheme.group_size or k
        scales = self.scales.repeat_interleave(size, dim=1)[:, :k]
        return scales, None if self.zeros is None else self.zeros.repeat_interleave(size, dim=1)[:, :k]


def codes_of(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """Nearest codes (float32 for INT, int64 indices otherwise), element by element; the arguments broadcast."""
    ratio = weight / scale
    if scheme.code is Code.INT:
        offset = float(1 << (scheme.bits - 1)) if zero is None else zero
        return torch.clamp(torch.round(ratio) + offset, 0, (1 << scheme.bits) - 1)
    if scheme.code is Code.E4M3:
        clipped = ratio.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
        return clipped.view(torch.uint8).to(torch.int64)
    table = torch.from_numpy(TABLES[scheme.code])
    order = torch.argsort(table, stable=True)
    levels = table[order]
    middles = (levels[1:] + levels[:-1]) / 2
    return order[torch.bucketize(ratio.contiguous(), middles)]


def values_of(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """What codes stand for; the same arithmetic as QuantizedWeight.dequantize."""
    if scheme.code is Code.INT:
        offset = float(1 << (scheme.bits - 1)) if zero is None else zero
        return (codes - offset) * scale
    return torch.from_numpy(TABLES[scheme.code])[codes] * scale


def plain_grid(weight: torch.Tensor, scheme: Scheme, shrink: float = 1.0) -> Grid:
    """Scales that just cover `shrink` times the range of each group of weight [N, K]."""
    low, high = _extremes(weight, scheme)
    low, high = low * shrink, high * shrink
    top = torch.maximum(-low, high)
    if scheme.code is Code.INT and not scheme.symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
        levels = (1 << scheme.bits) - 1
        scales = _stored((high - low) / levels, scheme)
        zeros = torch.round(-low / scales).clamp(0, levels)
        return Grid(scheme, scales, zeros)
    if scheme.code is Code.INT and scheme.bits <= 4:
        # as llmc.quant.rtn: the largest magnitude, with its sign, becomes the code 0, which has no counterpart
        raw = torch.where(high > -low, -high, -low) / (1 << (scheme.bits - 1))
        return Grid(scheme, torch.where(raw < 0, -_stored(-raw, scheme), _stored(raw, scheme)), None)
    if scheme.code is Code.INT:
        raw = top / ((1 << (scheme.bits - 1)) - 1)
    elif scheme.code is Code.E4M3:
        raw = top / _E4M3_MAX
    elif scheme.code in (Code.NF4, Code.NF4_BF16):
        raw = top
    else:
        # OCP microscaling: the largest power of two not above the largest element, over the format's own
        exponent = torch.floor(torch.log2(top.clamp(min=_TINY["e8m0"]))) - _E2M1_MAX_EXPONENT
        raw = torch.exp2(exponent)
    return Grid(scheme, _stored(raw, scheme), None)


def best_grid(weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None) -> Grid:
    """Scales with the least squared rounding error of every group, among shrunken ranges.

    Args:
        weight: float32 [N, K].
        scheme: the scheme.
        importance: of the columns' errors: [K], the sum of squares of each input, or [K, K], the sum of x xᵀ over the
            inputs, of which the blocks of the groups count; None = all equal.

    Symmetric integers of up to four bits may get negative scales: codes reach one step further to one side.
    """
    grids = [plain_grid(weight, scheme, shrink) for shrink in SHRINKS]
    if scheme.code is Code.INT and scheme.symmetric and scheme.bits <= 4:
        grids += _two_sided(weight, scheme)
    if scheme.scale_dtype == "e8m0":
        first = grids[0]
        grids = [Grid(scheme, first.scales * f, None) for f in (0.5, 1.0, 2.0)]
    best, least = grids[0], _group_errors(weight, grids[0], importance)
    scales = best.scales.clone()
    zeros = None if best.zeros is None else best.zeros.clone()
    for grid in grids[1:]:
        error = _group_errors(weight, grid, importance)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, grid.scales, scales)
        if zeros is not None and grid.zeros is not None:
            zeros = torch.where(better, grid.zeros, zeros)
    return Grid(scheme, scales, zeros)


def encode(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes of weight [N, K], each to the nearest value."""
    scale, zero = grid.spread(weight.shape[1])
    return codes_of(weight, scale, zero, grid.scheme)


def decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """float32 [N, K]."""
    scale, zero = grid.spread(codes.shape[1])
    return values_of(codes, scale, zero, grid.scheme)


def packed(codes: torch.Tensor, grid: Grid) -> QuantizedWeight:
    """The canonical form."""
    zeros = None if grid.zeros is None else grid.zeros.to(torch.uint8).numpy()
    return QuantizedWeight(grid.scheme, codes.to(torch.uint8).numpy(), grid.scales.numpy(), zeros)


def stack(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Weights of the experts of one layer, [E, N, K]."""
    return QuantizedWeight.join(weights, np.stack)


def _grouped(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[N, G, size], the last group filled up with zeros."""
    n, k = weight.shape
    size = scheme.group_size or k
    short = -k % size
    if short:
        weight = torch.nn.functional.pad(weight, (0, short))
    return weight.reshape(n, -1, size)


def _extremes(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    groups = _grouped(weight, scheme)
    return groups.amin(dim=2), groups.amax(dim=2)


def _two_sided(weight: torch.Tensor, scheme: Scheme) -> list[Grid]:
    """Scales that treat both signs alike and leave the code 0 to clipping."""
    low, high = _extremes(weight, scheme)
    most = torch.maximum(-low, high) / ((1 << (scheme.bits - 1)) - 1)
    return [Grid(scheme, _stored(most * shrink, scheme), None) for shrink in SHRINKS[::2]]


def _group_errors(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> torch.Tensor:
    """Squared error of every group, [N, G]."""
    error = _grouped(decode(encode(weight, grid), grid) - weight, grid.scheme)
    if importance is None:
        return (error**2).sum(dim=2)
    if importance.ndim == 1:
        return (error**2 * _grouped(importance[None], grid.scheme)).sum(dim=2)
    size = error.shape[2]
    short = -importance.shape[0] % size
    padded = torch.nn.functional.pad(importance, (0, short, 0, short))
    blocks = torch.stack([b[:, i * size : (i + 1) * size] for i, b in enumerate(padded.split(size))])
    by_group = error.transpose(0, 1)  # [G, N, size]
    return (torch.bmm(by_group, blocks) * by_group).sum(dim=2).T


def _stored(scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Positive scales as they will be stored; those of all-zero groups are 1."""
    if not bool(torch.isfinite(scales).all()):
        raise LlmcError(
            "quant-not-finite",
            f"A weight to be quantized to {scheme.name} has values that are NaN or infinite.",
            hint="The checkpoint is damaged or its training diverged; use another one.",
        )
    out = torch.where(scales > 0, scales.clamp(min=_TINY[scheme.scale_dtype]), torch.ones_like(scales))
    if scheme.scale_dtype == "float16":
        if float(out.max()) > _LARGEST_F16:
            raise LlmcError(
                "quant-scale-overflow",
                f"A group of weights needs the scale {float(out.max()):.3g}; {scheme.name} stores scales in float16,"
                f" which ends at {_LARGEST_F16:.0f}.",
                hint="Use a scheme with float32 scales, such as q8.",
            )
        out = out.to(torch.float16).float()
    elif scheme.scale_dtype == "e8m0":
        out = torch.from_numpy(out.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    return out
