"""Cache pages of codes made with numpy, for what measures and checks kernels."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from llmc.kv_plan import CODE_RANGE, QUAD, SMALLEST_SCALE, padded

Array = np.ndarray[Any, Any]


def encoded(rows: Array, dtype: str) -> tuple[Array, Array]:
    """(stored codes uint8 [..., d], scales bfloat16 [...]) of finite rows [..., d]; see schedules/kv_codes.py."""
    wide = rows.astype(np.float32)
    scales = (np.abs(wide).max(-1) / np.float32(CODE_RANGE[dtype])).astype(ml_dtypes.bfloat16)
    scales = np.where(scales < SMALLEST_SCALE, ml_dtypes.bfloat16(0), scales)
    divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))[..., None]
    quotient = np.where(scales[..., None] == 0, np.float32(0), wide) / divisor
    if dtype == "int8":
        return (np.rint(quotient) + 128).astype(np.uint8), scales
    return quotient.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scales


def decoded(rows: Array, dtype: str) -> Array:
    """float32 of rows as they are read back from such pages; doing it again changes nothing."""
    codes, scales = encoded(rows, dtype)
    if dtype == "int8":
        return (codes.astype(np.float32) - 128) * scales.astype(np.float32)[..., None]
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values * scales.astype(np.float32)[..., None]


def coded_part(rows: Array, dtype: str, *, keys: bool) -> Array:
    """What heads have on pages (KVGroup says how it lies), uint8 [..., bytes], of rows [..., page_size, d]."""
    codes, scales = encoded(rows, dtype)
    *lead, tokens, dim = rows.shape
    filled = np.full((*lead, tokens, padded(dim)), 128 if dtype == "int8" else 0, np.uint8)
    filled[..., :dim] = codes
    if keys:
        words = filled.reshape(*lead, tokens, -1, QUAD).swapaxes(-2, -3)
    else:
        words = filled.reshape(*lead, -1, QUAD, padded(dim)).swapaxes(-1, -2)
    scale_bytes = np.ascontiguousarray(scales).view(np.uint8).reshape(*lead, -1)
    return np.concatenate([words.reshape(*lead, -1), scale_bytes], -1)
