"""Weights that the checkpoint holds quantized go into the artifact as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmc.frontend.graph import WeightSource
from llmc.quant.quantizer import RoundToNearest, WeightQuantizer
from llmc.quant.schemes import SCHEMES, STORED_ONLY, Scheme
from llmc.quant.weight import QuantizedWeight

_SMALLEST_GROUP = 32  # of the packed layouts


def stored_schemes(weights: WeightSource | None) -> dict[str, str]:
    """Parameter -> scheme of every weight that the source has quantized and the kernels can take as it is.

    Others (groups of 16, offsets in place of zero points) are dequantized when they are read.
    """
    scheme_of = getattr(weights, "scheme_of", None)
    if weights is None or scheme_of is None:
        return {}
    found = {}
    for name in weights.names():
        scheme = scheme_of(name)
        if scheme is not None:
            kept = packed_as(scheme)
            if kept is not None:
                found[name] = kept.name
    return found


def packed_as(scheme: Scheme) -> Scheme | None:
    """The scheme that a weight is packed in; None if there is no layout for it.

    Weights made for 8-bit activations (w8a8) are used with floating-point ones, the same weights and more exact, unless
    the rules name their own scheme.
    """
    if scheme.activation_bits:
        same = [s for s in SCHEMES.values() if not s.activation_bits and same_weights(s, scheme)]
        return same[0] if same else None
    known = scheme.name in SCHEMES or scheme.name in STORED_ONLY
    too_small = 0 < scheme.group_size < _SMALLEST_GROUP
    return scheme if known and not scheme.offsets and not too_small else None


def same_weights(a: Scheme, b: Scheme) -> bool:
    """Whether both store a weight in the same codes and scales: they differ at most in what is done to activations."""
    return replace(a, activation_bits=0, name="") == replace(b, activation_bits=0, name="")


class SourceQuantizer:
    """A WeightQuantizer that takes what the source has in the scheme asked for, and quantizes the rest.

    Args:
        weights: a source, perhaps with ``quantized``.
        otherwise: for weights that are floating-point, or in another scheme; None = to the nearest.
    """

    def __init__(self, weights: WeightSource, otherwise: WeightQuantizer | None = None) -> None:
        self._quantized = getattr(weights, "quantized", None)
        self._otherwise = otherwise or RoundToNearest()

    def quantize(self, source: str, weight: np.ndarray, scheme: Scheme) -> QuantizedWeight:
        found: QuantizedWeight | None = self._quantized(source) if self._quantized is not None else None
        if found is not None and found.codes.shape == weight.shape and same_weights(found.scheme, scheme):
            return replace(found, scheme=scheme)
        return self._otherwise.quantize(source, weight, scheme)
