"""What the tuner feeds kernels with: random arrays, random weights of every scheme, and products in numpy to compare with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llmc import kv_plan
from llmc.quant.schemes import Code, Scheme
from llmc.quant.weight import FIELDS, TABLES, QuantizedWeight
from llmc.schedules.qlayout import QuantLayout

Array = np.ndarray[Any, Any]

NUMPY_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
ITEM_BYTES = dict(kv_plan.ITEM_BYTES)  # of weights, activations and cache pages
_PERIOD = 1_000_003  # random numbers repeat after a prime, so that no two rows of a weight are alike
_SHARED = ("order", "outlier_columns")  # arrays of a quantized weight without a row per output


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Standard normal numbers; large arrays repeat a piece of them."""
    size = int(np.prod(shape))
    piece = rng.standard_normal(min(size, _PERIOD), np.float32).astype(NUMPY_TYPES[dtype])
    return np.resize(piece, shape) if size > _PERIOD else piece.reshape(shape)


def random_rows(rng: np.random.Generator, rows: int, k: int, dtype: str) -> Array:
    """[rows, k] whose products with standard normal rows are about one: activations are then tested where they bend."""
    x = random_array(rng, (rows, k), dtype)
    return np.asarray((x.astype(np.float32) / math.sqrt(k)).astype(x.dtype))


def rows_for(rng: np.random.Generator, rows: int, layout: QuantLayout, dtype: str) -> Array:
    """random_rows for a quantized weight; those that it wants rounded are so without a loss, as the reference does not."""
    k, rounded = layout.k, layout.of.activations
    if rounded is None:
        return random_rows(rng, rows, k, dtype)
    if rounded is Code.INT:
        x, bits = rng.integers(-127, 128, (rows, k)).astype(np.float32), 7
        x[:, 0] = 127
    else:
        codes = rng.integers(0, 256, (rows, k), np.uint8)
        x, bits = np.nan_to_num(TABLES[Code.E4M3][codes], nan=1.0), 8
        x[:, :: layout.of.group_size or k] = 448
    return np.asarray((x / 2 ** (bits + math.ceil(math.log2(k) / 2))).astype(NUMPY_TYPES[dtype]))


def empty_result(shape: tuple[int, ...], dtype: str) -> Array:
    """An output full of NaN, so that what a kernel does not write shows."""
    return np.full(shape, np.nan, NUMPY_TYPES[dtype])


def multiply(x: Array, weight: Array) -> Array:
    """x[rows, k] @ weight[n, k].T in float32, a piece of the weight at a time."""
    left = x.astype(np.float32)
    out = np.empty((x.shape[0], weight.shape[0]), np.float32)
    step = max(1, (32 << 20) // max(1, weight.shape[1]))
    for i in range(0, weight.shape[0], step):
        out[:, i : i + step] = left @ weight[i : i + step].astype(np.float32).T
    return out


def multiply_quantized(x: Array, weight: QuantizedWeight) -> Array:
    """x[rows, k] @ weight[n, k].T in float32, a piece of the weight dequantized at a time."""
    n, k = weight.codes.shape
    out = np.empty((x.shape[0], n), np.float32)
    step = max(1, (8 << 20) // k)
    for i in range(0, n, step):
        out[:, i : i + step] = multiply(x, weight.map(lambda a, i=i: a[i : i + step]).dequantize())
    return out


def random_quantized(rng: np.random.Generator, layout: QuantLayout, *shape: int) -> dict[str, Array]:
    """The arrays of a QuantizedWeight [..., n, k] of the layout's scheme, by name; its rows have about unit variance.

    Args:
        shape: experts, if there are several, and n.
    """
    scheme, k = layout.of, layout.k
    groups = -(-k // scheme.group_size) if scheme.group_size else 1
    codes = np.resize(rng.integers(0, 1 << scheme.bits, _PERIOD, np.uint8), (*shape, k))
    if scheme.code is Code.E4M3:
        codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)  # the codes of NaN
    made = {"codes": codes, **_scales(rng, scheme, shape, groups, k)}
    if layout.outliers:  # the last columns, so that the first one still sets the scale
        made["outlier_weights"] = random_array(rng, (*shape, layout.outliers), "bfloat16").astype(np.float32)
        made["outlier_columns"] = np.arange(k - layout.outliers, k, dtype=np.int32)
    if not scheme.symmetric and not scheme.offsets:
        made["zeros"] = rng.integers(0, 1 << scheme.bits, (*shape, groups), np.uint8)
    if scheme.order:
        orders = [rng.permutation(k) for _ in range(math.prod(shape[:-1]))]
        made["order"] = np.array(orders, np.int32).reshape(*shape[:-1], k)
    return made


def _scales(
    rng: np.random.Generator, scheme: Scheme, shape: tuple[int, ...], groups: int, k: int
) -> dict[str, Array]:
    """Scales [*shape, groups], offsets that take the codes' mean away, and those of super-groups."""
    largest = 1 << (scheme.bits - 1)
    if scheme.code is not Code.INT:
        largest = np.nanmax(np.abs(TABLES[scheme.code]))
    if not scheme.super_group:
        scales = _stored(rng.uniform(0.5, 1.5, (*shape, groups)) / largest, scheme.scale_dtype)
        made = {"scales": scales}
        if scheme.offsets:
            made["offsets"] = _stored(-scales * (largest - 0.5), scheme.scale_dtype)
        return made
    tops = _stored(rng.uniform(0.5, 1.5, (*shape, -(-k // scheme.super_group))) / 96, scheme.scale_dtype)
    spread = np.repeat(tops, scheme.super_group // scheme.group_size, axis=-1)[..., :groups]
    each = rng.integers(64, 128, (*shape, groups)).astype(np.float32)
    # times a power of two: still exact in scale_dtype
    unit = np.float32(1 / largest)
    made = {"scales": each * spread * unit, "super_scales": tops * unit}
    if scheme.offsets:
        made |= {"offsets": -each * spread, "super_offsets": -tops}
    return made


def _stored(values: Array, dtype: str) -> Array:
    """float32 as a scale of that type holds it."""
    if dtype == "e8m0":
        return np.exp2(np.round(np.log2(values))).astype(np.float32)
    return np.asarray(values, NUMPY_TYPES[dtype]).astype(np.float32)


def quantized_of(layout: QuantLayout, case: Mapping[str, Array]) -> QuantizedWeight:
    """The weight whose arrays random_quantized has made."""
    arrays: dict[str, Any] = {name: case[name] for name in (*FIELDS, *_SHARED) if name in case}
    return QuantizedWeight(layout.of, **arrays)
