"""What 8-bit cache pages make of keys and values, in numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np

RANGE = {"int8": 127.0, "float8_e4m3fn": 448.0}


def scales_and_codes(x: np.ndarray, kv_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(bfloat16 scales [...], codes [..., d] in kv_dtype) of rows [..., d]."""
    x = x.astype(np.float32)
    scales = (np.abs(x).max(-1) / np.float32(RANGE[kv_dtype])).astype(ml_dtypes.bfloat16)
    divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))[..., None]
    quotient = x / divisor
    if kv_dtype == "int8":
        return scales, np.rint(quotient).astype(np.int8)
    return scales, quotient.astype(ml_dtypes.float8_e4m3fn)


def rounded(x: np.ndarray, kv_dtype: str) -> np.ndarray:
    """float64 of what is read back from pages of any type."""
    if kv_dtype not in RANGE:
        kinds = {"bfloat16": ml_dtypes.bfloat16}
        return x.astype(kinds.get(kv_dtype, kv_dtype)).astype(np.float64)
    scales, codes = scales_and_codes(x, kv_dtype)
    return codes.astype(np.float64) * scales.astype(np.float64)[..., None]


def empty_pool(shape: tuple[int, ...], kv_dtype: str) -> np.ndarray:
    """A pool of NaN, so that reading anything but written entries shows; scales of bytes 0xff are NaN, too."""
    if kv_dtype in RANGE:
        return np.full(shape, 0xFF, np.uint8)
    return np.full(shape, np.nan, ml_dtypes.bfloat16 if kv_dtype == "bfloat16" else kv_dtype)
