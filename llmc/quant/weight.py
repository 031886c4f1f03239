"""The canonical form of a quantized weight, which every method and reader makes and every packer takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llmc.quant.schemes import Code, Scheme

# quantiles of a standard normal, normalised to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E)
NF4_TABLE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
NF4_BF16_TABLE = NF4_TABLE.astype(ml_dtypes.bfloat16).astype(np.float32)
# OCP microscaling formats: sign, two exponent bits, one mantissa bit
E2M1_TABLE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# all 256 codes of float8_e4m3fn; the two NaN codes are never written
E4M3_TABLE = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
TABLES = {
    Code.NF4: NF4_TABLE,
    Code.NF4_BF16: NF4_BF16_TABLE,
    Code.E4M3: E4M3_TABLE,
    Code.E2M1: E2M1_TABLE,
}
# arrays of a QuantizedWeight with a row per output
FIELDS = ("codes", "scales", "zeros", "offsets", "super_scales", "super_offsets", "outlier_weights")

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] (or [E, N, K] for experts) in `scheme`.

    Attributes:
        scheme: how to read it.
        codes: uint8 [..., N, K], one code per element, unpacked. INT: 0 .. 2**bits - 1.
        scales: float32 [..., N, G] with G = ceil(K / group_size) (1 for a whole row); the values as they will be stored
            (already rounded to the scheme's scale_dtype). The last group may be shorter than group_size.
        zeros: uint8 [..., N, G] for asymmetric INT; None for symmetric (then the zero point is 2**(bits-1)).
        offsets: float32 [..., N, G] for schemes with ``offsets``, instead of zeros: value = code * scale + offset.
        super_scales, super_offsets: float32 [..., N, S] with S = ceil(K / super_group) for schemes with super-groups:
            scales (offsets) are multiples of these by -128 .. 127.
        outlier_weights: float32 [..., N, M], which bfloat16 holds exactly, for schemes with outliers: the columns
            outlier_columns, whose codes stand for 0.
        outlier_columns: int32 [M], ascending; of all experts.
        order: int32 [..., K] for schemes with an ``order``: stored column j is column order[j] of the weight; codes
            and groups are in the stored order.
    """

    scheme: Scheme
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8] | None = None
    offsets: npt.NDArray[np.float32] | None = None
    super_scales: npt.NDArray[np.float32] | None = None
    super_offsets: npt.NDArray[np.float32] | None = None
    order: npt.NDArray[np.int32] | None = None
    outlier_weights: npt.NDArray[np.float32] | None = None
    outlier_columns: npt.NDArray[np.int32] | None = None

    def map(self, change: Callable[[Array], Array]) -> QuantizedWeight:
        """The weight with every array that has a row per output changed, e.g. by picking rows."""
        changed: dict[str, Any] = {n: change(a) for n in FIELDS if (a := getattr(self, n)) is not None}
        return replace(self, **changed)

    def part(self, index: int) -> QuantizedWeight:
        """One of several experts."""
        order = None if self.order is None else self.order[index]
        return replace(self.map(lambda a: a[index]), order=order)

    @staticmethod
    def join(parts: Sequence[QuantizedWeight], join: Callable[[Sequence[Array]], Array]) -> QuantizedWeight:
        """One weight of several with equal schemes, each array made by `join`: of their rows, or of experts.

        The order of the inputs stays that of the first, and so do the columns of outliers.
        """
        first = parts[0]
        made: dict[str, Any] = {
            name: join([getattr(p, name) for p in parts])
            for name in FIELDS
            if getattr(first, name) is not None
        }
        return replace(first, **made)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """float32 [..., N, K]: what the kernels multiply with (up to their own accumulation order)."""
        k = self.codes.shape[-1]
        size = self.scheme.group_size or k

        def spread(per_group: Array) -> Array:
            return np.repeat(per_group, size, axis=-1)[..., :k]

        values: Array
        if self.scheme.code is not Code.INT:
            values = TABLES[self.scheme.code][self.codes]
        else:
            values = self.codes.astype(np.float32)
            if self.zeros is not None:
                values -= spread(self.zeros).astype(np.float32)
            elif self.offsets is None:
                values -= float(1 << (self.scheme.bits - 1))
        values = values * spread(self.scales)
        if self.offsets is not None:
            values = values + spread(self.offsets)
        values = np.asarray(values, np.float32)
        if self.outlier_columns is not None:
            values[..., self.outlier_columns] = self.outlier_weights
        if self.order is None:
            return values
        out = np.empty_like(values)
        index = self.order[..., None, :].astype(np.int64)
        np.put_along_axis(out, np.broadcast_to(index, values.shape), values, axis=-1)
        return out
