"""The canonical form of a quantized weight, which every method and reader makes and every packer takes."""

from __future__ import annotations

from dataclasses import dataclass
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
# OCP microscaling formats: sign, two exponent bits, one mantissa bit
E2M1_TABLE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# all 256 codes of float8_e4m3fn; the two NaN codes are never written
E4M3_TABLE = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] (or [E, N, K] for experts) in `scheme`.

    Attributes:
        scheme: how to read it.
        codes: uint8 [..., N, K], one code per element, unpacked. INT: 0 .. 2**bits - 1.
        scales: float32 [..., N, G] with G = ceil(K / group_size) (1 for a whole row); the values as they will be stored
            (already rounded to the scheme's scale_dtype). The last group may be shorter than group_size.
        zeros: uint8 [..., N, G] for asymmetric INT; None for symmetric (then the zero point is 2**(bits-1)).
    """

    scheme: Scheme
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8] | None = None

    def dequantize(self) -> npt.NDArray[np.float32]:
        """float32 [..., N, K]: what the kernels multiply with (up to their own accumulation order)."""
        k = self.codes.shape[-1]
        size = self.scheme.group_size or k

        def spread(per_group: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.repeat(per_group, size, axis=-1)[..., :k]

        values: npt.NDArray[Any]
        if self.scheme.code is Code.INT:
            values = self.codes.astype(np.float32)
            if self.zeros is None:
                values -= float(1 << (self.scheme.bits - 1))
            else:
                values -= spread(self.zeros).astype(np.float32)
        else:
            table = {Code.NF4: NF4_TABLE, Code.E4M3: E4M3_TABLE, Code.E2M1: E2M1_TABLE}[self.scheme.code]
            values = table[self.codes]
        return np.asarray(values * spread(self.scales), np.float32)
