"""What turns a source weight into a QuantizedWeight: the hook between the packer and the methods."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from llmc.quant.rtn import quantize
from llmc.quant.schemes import Scheme
from llmc.quant.weight import QuantizedWeight


class WeightQuantizer(Protocol):
    """A method (round to nearest, GPTQ, AWQ) or a reader of an already quantized checkpoint."""

    def quantize(self, source: str, weight: np.ndarray, scheme: Scheme) -> QuantizedWeight:
        """The weight `source` in `scheme`.

        Args:
            source: name of the tensor in the source model.
            weight: float32 [N, K] (out, in), or [E, N, K] for experts; also for a source stored as [in, out].
            scheme: what the rules ask for.

        Returns:
            codes of the same shape as `weight`; its scheme must be `scheme`.

        Raises:
            LlmcError: the weight cannot be quantized (NaN, infinity, too large for the scales).
        """


class RoundToNearest:
    """The default: no data needed.

    Args:
        search: choose each group's scale by mean square error; see llmc.quant.rtn.quantize.
    """

    def __init__(self, *, search: bool = False) -> None:
        self.search = search

    def quantize(self, source: str, weight: np.ndarray, scheme: Scheme) -> QuantizedWeight:
        return quantize(weight, scheme, search=self.search, name=source)
