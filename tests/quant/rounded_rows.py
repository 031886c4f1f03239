"""Rows of activations as kernels round them to e4m3, in numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmc.quant.schemes import Scheme


def e4m3_rows(x: np.ndarray, scheme: Scheme) -> np.ndarray:
    """float64 [..., K]: x rounded as the scheme says, one scale per row or per group of it, and multiplied with the scales."""
    k = x.shape[-1]
    size = scheme.group_size or k
    wide = np.pad(x.astype(np.float32), [(0, 0)] * (x.ndim - 1) + [(0, -k % size)])
    wide = wide.reshape(*x.shape[:-1], -1, size)
    most = np.abs(wide).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = np.where(most > 1e-30, np.float32(448) / most, np.float32(0))
        nearest = (wide * factor).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        scaled = nearest * (most / np.float32(448)).astype(np.float64)
    return np.asarray(scaled.reshape(*x.shape[:-1], -1)[..., :k])
