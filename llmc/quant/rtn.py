"""Round to nearest: quantize a weight from its own values alone, in pieces of bounded size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from llmc.errors import LlmcError
from llmc.quant.schemes import Code, Scheme
from llmc.quant.weight import E2M1_TABLE, TABLES, QuantizedWeight

Array = np.ndarray[Any, Any]

# elements of a piece: its float32 copies stay in the caches
_PIECE = 1 << 18
# what `search` tries: shares of the range that is not clipped
_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8)
_LARGEST = {"float16": 65504.0, "float32": 3e38, "e8m0": 2.0**127}
# a value belongs to the table entry with as many of these below it
_NF4_BOUNDS = {c: (TABLES[c][1:] + TABLES[c][:-1]) / 2 for c in (Code.NF4, Code.NF4_BF16)}
_E2M1_BOUNDS = (E2M1_TABLE[1:8] + E2M1_TABLE[:7]) / 2
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0


def quantize(
    weight: Array,
    scheme: Scheme,
    *,
    search: bool = False,
    name: str = "the weight",
    outliers: Array | None = None,
) -> QuantizedWeight:
    """Quantize float32 [..., N, K]; groups run along K, and the last one may be shorter.

    Symmetric integers of up to four bits take the scale that puts a group's largest magnitude, with its sign, on the
    most negative code (such a scale may be negative): that end has one code more than the other. Groups of zeros get
    the scale 0.

    Args:
        search: try several scales per group and keep the one with the smallest mean square error.
        name: what to call the weight in errors.
        outliers: int32 [M], the outlier columns of a scheme that has them.

    Raises:
        LlmcError: NaN or infinite values; values too large for the scheme's scales; outlier columns that are not known.
    """
    if outliers is not None:
        return _beside_outliers(weight, scheme, search, name, outliers)
    if scheme.outlier_share:
        raise LlmcError(
            "outliers-without-text",
            f"{name} is to be quantized to {scheme.name}, whose outlier columns are found by calibration; it was not calibrated.",
            hint="Add --calib FILE.",
        )
    *lead, n, k = weight.shape
    size = scheme.group_size or k
    groups = -(-k // size)
    rows = weight.reshape(-1, k)
    codes = np.empty((len(rows), k), np.uint8)
    scales = np.empty((len(rows), groups), np.float32)
    zeros = None if scheme.symmetric else np.empty((len(rows), groups), np.uint8)
    step = max(1, _PIECE // max(1, groups * size))
    for at in range(0, len(rows), step):
        piece = np.asarray(rows[at : at + step], np.float32)
        if groups * size != k:
            piece = np.pad(piece, ((0, 0), (0, groups * size - k)))
        grouped = piece.reshape(len(piece), groups, size)
        low, high = grouped.min(-1), grouped.max(-1)
        _check(low, high, name)
        best = _quantize(grouped, low, high, scheme, 1.0)
        if search:
            best = _search(grouped, low, high, scheme, best)
        _check_scales(best[1], scheme, name)
        codes[at : at + step] = best[0].reshape(len(piece), -1)[:, :k]
        scales[at : at + step] = best[1]
        if zeros is not None:
            zeros[at : at + step] = best[2]
    shape = (*lead, n, groups)
    return QuantizedWeight(
        scheme,
        codes.reshape(weight.shape),
        scales.reshape(shape),
        None if zeros is None else zeros.reshape(shape),
    )


def _beside_outliers(
    weight: Array, scheme: Scheme, search: bool, name: str, columns: Array
) -> QuantizedWeight:
    kept = weight[..., columns]
    rest = np.array(weight, np.float32)
    rest[..., columns] = 0
    made = quantize(rest, replace(scheme, outlier_share=0), search=search, name=name)
    _check(kept, kept, name)
    return replace(
        made,
        scheme=scheme,
        outlier_weights=kept.astype(ml_dtypes.bfloat16).astype(np.float32),
        outlier_columns=columns.astype(np.int32),
    )


def round_scales(scales: Array, scheme: Scheme) -> Array:
    """Scales as the scheme's scale_dtype stores them, in float32."""
    if scheme.scale_dtype == "float16":
        with np.errstate(over="ignore"):  # reported by name
            return scales.astype(np.float16).astype(np.float32)
    if scheme.scale_dtype == "e8m0":
        with np.errstate(divide="ignore"):
            exponent = np.rint(np.log2(scales))
        return np.where(scales > 0, np.exp2(np.clip(exponent, -126, 127)), 0).astype(np.float32)
    return scales.astype(np.float32)


def _quantize(w: Array, low: Array, high: Array, scheme: Scheme, ratio: float) -> tuple[Array, Array, Array]:
    """(codes, scales, zeros) of groups w [R, G, size], whose range is cut to `ratio` of itself."""
    if scheme.code is Code.INT and not scheme.symmetric:
        return _asymmetric(w, low * ratio, high * ratio, scheme)
    most = np.maximum(-low, high)
    zero = np.zeros((), np.uint8)
    if scheme.code is Code.INT:
        half = 1 << (scheme.bits - 1)
        if scheme.bits <= 4:
            scales = np.where(high > -low, high, low) * np.float32(-ratio / half)
        else:
            scales = most * np.float32(ratio / (half - 1))
        scales = round_scales(scales, scheme)
        values = np.rint(w * _inverse(scales)[..., None])
        codes = np.clip(values, -half, half - 1).astype(np.int16) + half
        return codes.astype(np.uint8), scales, zero
    if scheme.code in (Code.NF4, Code.NF4_BF16):
        scales = round_scales(most * np.float32(ratio), scheme)
        bounds = _NF4_BOUNDS[scheme.code]
        return np.searchsorted(bounds, w * _inverse(scales)[..., None]).astype(np.uint8), scales, zero
    if scheme.code is Code.E4M3:
        scales = round_scales(most * np.float32(ratio / _E4M3_MAX), scheme)
        values = np.clip(w * _inverse(scales)[..., None], -_E4M3_MAX, _E4M3_MAX)
        return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scales, zero
    with np.errstate(
        divide="ignore"
    ):  # OCP MX 1.0, section 6.3: the exponent of the largest value less that of 4
        exponent = np.floor(np.log2(most * np.float32(ratio))) - 2
    scales = np.where(most > 0, np.exp2(np.clip(exponent, -126, 127)), 0).astype(np.float32)
    values = w * _inverse(scales)[..., None]
    codes = np.searchsorted(_E2M1_BOUNDS, np.abs(values)).astype(np.uint8)
    return codes | (np.signbit(values).astype(np.uint8) << 3), scales, zero


def _asymmetric(w: Array, low: Array, high: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
    """The range always holds zero, which is then exact."""
    top = (1 << scheme.bits) - 1
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = round_scales((high - low) * np.float32(1 / top), scheme)
    inverse = _inverse(scales)
    zeros = np.clip(np.rint(-low * inverse), 0, top)
    codes = np.clip(np.rint(w * inverse[..., None]) + zeros[..., None], 0, top)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8)


def _search(
    w: Array, low: Array, high: Array, scheme: Scheme, best: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    codes, scales, zeros = best
    least = _error(w, best, scheme)
    # a power of two changes only when the range is halved or doubled
    for ratio in (2.0, 0.5) if scheme.scale_dtype == "e8m0" else _RATIOS[1:]:
        other = _quantize(w, low, high, scheme, ratio)
        error = _error(w, other, scheme)
        better = error < least
        least = np.where(better, error, least)
        codes = np.where(better[..., None], other[0], codes)
        scales = np.where(better, other[1], scales)
        zeros = np.where(better, other[2], zeros)
    return codes, scales, zeros


def _error(w: Array, made: tuple[Array, Array, Array], scheme: Scheme) -> Array:
    codes, scales, zeros = made
    shape = (*codes.shape[:-2], -1)
    flat = QuantizedWeight(
        scheme,
        codes.reshape(-1, codes.shape[-1]),
        scales.reshape(-1, 1),
        None if scheme.symmetric else zeros.reshape(-1, 1),
    )
    difference = flat.dequantize().reshape(w.shape) - w
    return (difference * difference).sum(-1).reshape(shape)


def _inverse(scales: Array) -> Array:
    """1 / scale; 0 for groups whose scale is 0 (or so small that its inverse is infinite)."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _check(low: Array, high: Array, name: str) -> None:
    bad = ~(np.isfinite(low) & np.isfinite(high))
    if bad.any():
        raise LlmcError(
            "weight-not-finite",
            f"{name} has NaN or infinite values; it cannot be quantized.",
            hint="The checkpoint is damaged; use another one, or exclude the weight with a rule NAME = none.",
        )


def _check_scales(scales: Array, scheme: Scheme, name: str) -> None:
    if not (np.abs(scales) <= _LARGEST[scheme.scale_dtype]).all():
        raise LlmcError(
            "weight-too-large",
            f"{name} has values too large for the {scheme.scale_dtype} scales of {scheme.name}.",
            hint='Use a scheme with float32 scales (q8, fp8) for it, or exclude it with a rule (scheme "none").',
        )
