"""The block formats of GGUF in canonical form, exactly (ggml's ggml-common.h describes them)."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmc.quant.schemes import SCHEMES, STORED_ONLY, Scheme
from llmc.quant.weight import QuantizedWeight

KINDS: dict[str, Scheme] = {
    "q8_0": SCHEMES["q8g32"],
    "q4_0": SCHEMES["q4g32"],
    "q4_k": STORED_ONLY["q4k"],
    "q6_k": STORED_ONLY["q6k"],
}
FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def blocks_to_weight(rows: np.ndarray, kind: str) -> QuantizedWeight:
    """uint8 [N, row bytes] -> [N, K]."""
    unpack = {"q8_0": _q8_0, "q4_0": _q4_0, "q4_k": _q4_k, "q6_k": _q6_k}[kind]
    return unpack(rows)


def _blocks(rows: np.ndarray, size: int) -> np.ndarray:
    return rows.reshape(len(rows), -1, size)


def _half(raw: np.ndarray) -> np.ndarray:
    """float32 of two bytes along the last axis: [...]."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)


def _q8_0(rows: np.ndarray) -> QuantizedWeight:
    """A float16 scale and 32 signed bytes."""
    blocks = _blocks(rows, 34)
    codes = blocks[..., 2:] ^ np.uint8(0x80)  # two's complement to offset 128
    return QuantizedWeight(KINDS["q8_0"], codes.reshape(len(rows), -1), _half(blocks[..., :2]))


def _q4_0(rows: np.ndarray) -> QuantizedWeight:
    """A float16 scale and 16 bytes: their low halves, then their high halves."""
    blocks = _blocks(rows, 18)
    packed = blocks[..., 2:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
    return QuantizedWeight(KINDS["q4_0"], codes.reshape(len(rows), -1), _half(blocks[..., :2]))


def _q4_k(rows: np.ndarray) -> QuantizedWeight:
    """Eight groups of 32 in a block: two float16 factors d and dmin, 12 bytes of 6-bit scales and minima, 128 bytes.

    value = (d * scale) * code - (dmin * minimum)
    """
    blocks = _blocks(rows, 144)
    d, dmin = _half(blocks[..., 0:2])[..., None], _half(blocks[..., 2:4])[..., None]
    first, second, third = (blocks[..., i : i + 4] for i in (4, 8, 12))
    scale = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=-1)
    minimum = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=-1)
    packed = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 1, 32)
    codes = np.concatenate([packed & 15, packed >> 4], axis=-2)
    n = len(rows)
    return QuantizedWeight(
        KINDS["q4_k"],
        codes.reshape(n, -1),
        (d * scale.astype(np.float32)).reshape(n, -1),
        None,
        -(dmin * minimum.astype(np.float32)).reshape(n, -1),
        d[..., 0],
        -dmin[..., 0],
    )


def _q6_k(rows: np.ndarray) -> QuantizedWeight:
    """Sixteen groups of 16 in a block: 128 bytes of low halves, 64 bytes of two high bits, 16 signed scales, a float16.

    value = (d * scale) * (code - 32)
    """
    blocks = _blocks(rows, 210)
    low = blocks[..., :128].reshape(*blocks.shape[:2], 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(*blocks.shape[:2], 8, 32)
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    high = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-2)
    codes = low | (high.reshape(*blocks.shape[:2], 8, 32) << 4)
    scale = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    d = _half(blocks[..., 208:210])[..., None]
    n = len(rows)
    scales = (d * scale).reshape(n, -1)
    return QuantizedWeight(
        KINDS["q6_k"], codes.reshape(n, -1).astype(np.uint8), scales, super_scales=d[..., 0]
    )
