"""The block formats of GGUF in canonical form, exactly (ggml's ggml-common.h describes them)."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmc.quant.schemes import SCHEMES, STORED_ONLY, Scheme, by_name
from llmc.quant.weight import QuantizedWeight

KINDS: dict[str, Scheme] = {
    "q8_0": SCHEMES["q8g32"],
    "q4_0": SCHEMES["q4g32"],
    "q4_1": by_name("q4g32o"),
    "q5_0": by_name("q5g32"),
    "q5_1": by_name("q5g32o"),
    "q4_k": STORED_ONLY["q4k"],
    "q5_k": STORED_ONLY["q5k"],
    "q6_k": STORED_ONLY["q6k"],
}
FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def blocks_to_weight(rows: np.ndarray, kind: str) -> QuantizedWeight:
    """uint8 [N, row bytes] -> [N, K]."""
    if kind in ("q4_k", "q5_k"):
        return _q45_k(rows, kind)
    if kind in _HALVES:
        return _halves(rows, kind)
    return {"q8_0": _q8_0, "q6_k": _q6_k}[kind](rows)


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


# kinds of 32 values in halves of bytes: whether there is an offset, and a fifth bit of each value
_HALVES = {"q4_0": (False, False), "q4_1": (True, False), "q5_0": (False, True), "q5_1": (True, True)}


def _halves(rows: np.ndarray, kind: str) -> QuantizedWeight:
    """A float16 scale, perhaps a float16 offset, perhaps 32 fifth bits, and 16 bytes: their low halves, then their high ones."""
    offset, fifth = _HALVES[kind]
    head = 4 if offset else 2
    body = head + 4 * fifth
    blocks = _blocks(rows, body + 16)
    packed = blocks[..., body:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
    if fifth:
        codes |= np.unpackbits(blocks[..., head:body], axis=-1, bitorder="little") << 4
    offsets = _half(blocks[..., 2:4]) if offset else None
    n = len(rows)
    return QuantizedWeight(KINDS[kind], codes.reshape(n, -1), _half(blocks[..., :2]), offsets=offsets)


def _q45_k(rows: np.ndarray, kind: str) -> QuantizedWeight:
    """Eight groups of 32 in a block: two float16 factors d and dmin, 12 bytes of 6-bit scales and minima, in q5_k 32 bytes of
    fifth bits, 128 bytes of halves.

    value = (d * scale) * code - (dmin * minimum)
    """
    fifth = kind == "q5_k"
    blocks = _blocks(rows, 176 if fifth else 144)
    d, dmin = _half(blocks[..., 0:2])[..., None], _half(blocks[..., 2:4])[..., None]
    first, second, third = (blocks[..., i : i + 4] for i in (4, 8, 12))
    scale = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=-1)
    minimum = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=-1)
    packed = blocks[..., 48 if fifth else 16 :].reshape(*blocks.shape[:2], 4, 1, 32)
    codes = np.concatenate([packed & 15, packed >> 4], axis=-2).reshape(*blocks.shape[:2], 8, 32)
    if fifth:  # bit g of a byte belongs to group g
        bits = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]
        codes = codes | ((bits & 1) << 4)
    n = len(rows)
    return QuantizedWeight(
        KINDS[kind],
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
