"""Weights that the checkpoint holds quantized go into the artifact as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmc.errors import LlmcError
from llmc.frontend.graph import WeightSource
from llmc.quant.quantizer import RoundToNearest, WeightQuantizer
from llmc.quant.schemes import Scheme, by_name, stored_scheme
from llmc.quant.weight import QuantizedWeight


def stored_schemes(weights: WeightSource | None) -> dict[str, str]:
    """Parameter -> scheme of every weight that the source has quantized and the kernels can take as it is.

    Others (groups of a size that no layout has) are dequantized when they are read.
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
    if scheme.activation_bits and not scheme.outlier_share:
        scheme = stored_scheme(
            scheme.code,
            scheme.bits,
            scheme.group_size,
            symmetric=scheme.symmetric,
            scale_dtype=scheme.scale_dtype,
            order=scheme.order,
        )
    try:
        known = by_name(scheme.name)
    except KeyError:
        return None
    return scheme if known == scheme else None


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
        self._scheme_of = getattr(weights, "scheme_of", None)
        self._otherwise = otherwise or RoundToNearest()

    def quantize(self, source: str, weight: np.ndarray, scheme: Scheme) -> QuantizedWeight:
        """As WeightQuantizer.

        Raises:
            LlmcError: the source has the weight in this scheme, but in parts that cannot be joined as they are.
        """
        claimed: Scheme | None = self._scheme_of(source) if self._scheme_of is not None else None
        stored = None if claimed is None else packed_as(claimed)
        if self._quantized is not None and stored is not None and same_weights(stored.any_order, scheme):
            found: QuantizedWeight | None = self._quantized(source)
            if found is not None and found.codes.shape == weight.shape:
                return replace(found, scheme=scheme)
            raise LlmcError(
                "quantized-weight",
                f"{source} is stored in several parts, whose {scheme.name} codes cannot be put together as they are.",
                hint=f'Keep it in the model\'s dtype: a quantization rule "{source.removesuffix(".weight")}" = "none".',
            )
        return self._otherwise.quantize(source, weight, scheme)
