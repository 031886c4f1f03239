"""Cache pages of codes made with numpy, for what measures and checks kernels."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from llmc.kv_plan import CODE_RANGE, SMALLEST_SCALE

Array = np.ndarray[Any, Any]


def encoded(rows: Array, dtype: str) -> tuple[Array, Array]:
    """(codes uint8 [..., d], scales bfloat16 [...]) of finite rows [..., d]; see schedules/kv_codes.py."""
    wide = rows.astype(np.float32)
    scales = (np.abs(wide).max(-1) / np.float32(CODE_RANGE[dtype])).astype(ml_dtypes.bfloat16)
    scales = np.where(scales < SMALLEST_SCALE, ml_dtypes.bfloat16(0), scales)
    divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))[..., None]
    quotient = np.where(scales[..., None] == 0, np.float32(0), wide) / divisor
    codes = np.rint(quotient).astype(np.int8) if dtype == "int8" else quotient.astype(ml_dtypes.float8_e4m3fn)
    return codes.view(np.uint8), scales


def decoded(rows: Array, dtype: str) -> Array:
    """float32 of rows as they are read back from such pages; doing it again changes nothing."""
    codes, scales = encoded(rows, dtype)
    values = codes.view(np.int8 if dtype == "int8" else ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values * scales.astype(np.float32)[..., None]


def coded_part(rows: Array, dtype: str, *, dims_first: bool) -> Array:
    """What heads have on pages, uint8 [..., bytes]: codes of rows [..., page_size, d], then their scales.

    Args:
        dims_first: as keys lie.
    """
    codes, scales = encoded(rows, dtype)
    ordered = codes.swapaxes(-1, -2) if dims_first else codes
    lead = rows.shape[:-2]
    scale_bytes = np.ascontiguousarray(scales).view(np.uint8).reshape(*lead, -1)
    return np.concatenate([ordered.reshape(*lead, -1), scale_bytes], -1)
