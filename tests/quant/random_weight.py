"""Random weights of any scheme, also of those that only readers make."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmc.quant.rtn import quantize
from llmc.quant.schemes import SCHEMES, Code, Scheme, by_name
from llmc.quant.weight import E4M3_TABLE, QuantizedWeight


def random_columns(rng: np.random.Generator, scheme: Scheme, k: int) -> np.ndarray | None:
    """Outlier columns, if the scheme has some."""
    count = scheme.outliers(k)
    return np.sort(rng.permutation(k)[:count]).astype(np.int32) if count else None


def random_weight(name: str, *shape: int, seed: int = 0) -> QuantizedWeight:
    """[..., N, K], with a row of zeros; rounded normal numbers if the scheme is one to quantize to, else random codes."""
    rng = np.random.default_rng(seed)
    scheme = by_name(name)
    if name in SCHEMES:
        weight = rng.standard_normal(shape).astype(np.float32)
        weight[..., 1, :] = 0
        return quantize(weight, scheme, outliers=random_columns(rng, scheme, shape[-1]))
    *lead, n, k = shape
    groups = -(-k // (scheme.group_size or k))
    codes = rng.integers(0, 1 << scheme.bits, shape, dtype=np.uint8)
    if scheme.code is Code.E4M3:
        codes[~np.isfinite(E4M3_TABLE[codes])] = 0

    def numbers(columns: int) -> np.ndarray:
        values = rng.standard_normal((*lead, n, columns)).astype(np.float32) / (1 << scheme.bits)
        dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
        return values.astype(dtype[scheme.scale_dtype]).astype(np.float32)

    def levels() -> tuple[np.ndarray, np.ndarray | None]:
        if not scheme.super_group:
            return numbers(groups), None
        tops = numbers(-(-k // scheme.super_group))
        each = rng.integers(-128, 128, (*lead, n, groups))
        spread = np.repeat(tops, scheme.super_group // scheme.group_size, axis=-1)[..., :groups]
        return (each * spread).astype(np.float32), tops

    scales, super_scales = levels()
    offsets, super_offsets = levels() if scheme.offsets else (None, None)
    zeros = None
    if not scheme.symmetric and not scheme.offsets:
        zeros = rng.integers(0, 1 << scheme.bits, scales.shape, dtype=np.uint8)
    order = None
    if scheme.order:
        orders = [rng.permutation(k) for _ in range(int(np.prod(lead)))]
        order = np.array(orders, np.int32).reshape(*lead, k)
    return QuantizedWeight(scheme, codes, scales, zeros, offsets, super_scales, super_offsets, order)
