"""What 8-bit cache pages make of keys and values, in numpy."""

from __future__ import annotations

from typing import Any

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


def check_pages(kv_dtype: str, page_size: int, cache: Any) -> None:
    """The bytes of every slot of layer 1 that was written, and that all others are as empty_pool made them."""
    pools = (cache.k_pool.numpy(), cache.v_pool.numpy())
    rows = [np.concatenate(x, 1) for x in (cache.keys, cache.values)]
    touched = 0
    for pool, x, key in zip(pools, rows, (True, False), strict=True):
        scales, codes = scales_and_codes(x, kv_dtype)
        stored = codes.view(np.uint8) ^ (0x80 if kv_dtype == "int8" else 0)
        dim, ps = x.shape[2], page_size
        words = -(-dim // 4)
        for token, slot in enumerate(cache.slots()):
            page, offset = divmod(int(slot), ps)
            part = pool[page, 1]
            d = np.arange(dim)
            places = (d // 4 * ps + offset) * 4 + d % 4
            if not key:
                places = (offset // 4 * (words * 4) + d) * 4 + offset % 4
            assert (part[:, places] == stored[:, token]).all()
            at = ps * words * 4 + 2 * offset
            found = np.ascontiguousarray(part[:, at : at + 2]).view(np.uint16)[:, 0]
            assert (found == scales.view(np.uint16)[:, token]).all()
            part[:, places], part[:, at : at + 2] = 0xFF, 0xFF
            touched += 1
        pool[pool == (0x80 if kv_dtype == "int8" else 0)] = 0xFF  # what fills words up is a code of zero
        assert (pool == 0xFF).all()
    assert touched == 2 * rows[0].shape[1]
