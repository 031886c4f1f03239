"""Weights with some of them replaced: by changed floating-point tensors, or by quantized ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from llmc.errors import LlmcError
from llmc.frontend.graph import ParamInfo, WeightSource
from llmc.quant.schemes import Scheme
from llmc.quant.weight import QuantizedWeight


class QuantizedSource(WeightSource, Protocol):
    """A WeightSource of which some weights are quantized already; load() gives those dequantized."""

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The weight in canonical form, output rows first ([N, K], [E, N, K]); None if it is not quantized."""

    def scheme_of(self, name: str) -> Scheme | None:
        """Its scheme, without reading it."""


# arrays of a QuantizedWeight that methods make
_KEPT = ("codes", "scales", "zeros", "outlier_weights", "outlier_columns")


class QuantizedStore:
    """Quantized weights in files of a temporary folder, so that a large model's need not fit into memory.

    Args:
        folder: where to put the temporary folder; None = the system's place.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmc-quant-", dir=folder)
        self._schemes: dict[str, tuple[Scheme, bool]] = {}
        self._files: dict[str, Path] = {}
        self._arrays: dict[str, tuple[str, ...]] = {}  # which arrays a file has, in order

    def put(self, name: str, weight: QuantizedWeight, *, transposed: bool = False) -> None:
        """Keep a weight; `transposed`: the source model holds it [..., in, out]."""
        path = Path(self._folder.name) / f"{len(self._files)}.npy"
        there = tuple(field for field in _KEPT if getattr(weight, field) is not None)
        with path.open("wb") as f:
            for field in there:
                np.save(f, getattr(weight, field), allow_pickle=False)
        self._files[name] = path
        self._schemes[name] = (weight.scheme, transposed)
        self._arrays[name] = there

    def get(self, name: str) -> QuantizedWeight | None:
        if name not in self._files:
            return None
        with self._files[name].open("rb") as f:
            arrays = {field: np.load(f) for field in self._arrays[name]}
        return QuantizedWeight(self._schemes[name][0], **arrays)

    def scheme(self, name: str) -> Scheme | None:
        return self._schemes[name][0] if name in self._schemes else None

    def transposed(self, name: str) -> bool:
        return self._schemes[name][1]

    def names(self) -> tuple[str, ...]:
        return tuple(self._files)


class FloatStore(Mapping[str, torch.Tensor]):
    """Changed floating-point weights in files of a temporary folder, read when they are asked for.

    Args:
        folder: where to put the temporary folder; None = the system's place.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmc-weights-", dir=folder)
        self._files: dict[str, Path] = {}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a float32 tensor."""
        path = self._files.get(name) or Path(self._folder.name) / f"{len(self._files)}.npy"
        np.save(path, tensor.numpy(), allow_pickle=False)
        self._files[name] = path

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self._files[name]))

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class OverlayWeights:
    """`base` with some weights replaced; a QuantizedSource.

    Args:
        base: where all other weights come from.
        floats: name -> changed tensor, in the source model's own orientation.
        store: quantized weights.
    """

    def __init__(
        self, base: WeightSource, floats: Mapping[str, torch.Tensor], store: QuantizedStore | None = None
    ) -> None:
        self._base = base
        self._floats = floats
        self._store = store

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def info(self, name: str) -> ParamInfo:
        info = self._base.info(name)
        if name in self._floats or (self._store is not None and self._store.scheme(name)):
            return ParamInfo(name, info.shape, "float32")
        return info

    def load(self, name: str) -> torch.Tensor:
        weight = self.quantized(name)
        if weight is not None and self._store is not None:
            values = torch.from_numpy(weight.dequantize())
            return values.transpose(-1, -2).contiguous() if self._store.transposed(name) else values
        if name in self._floats:
            return self._floats[name]
        return self._base.load(name)

    def quantized(self, name: str) -> QuantizedWeight | None:
        return self._store.get(name) if self._store is not None else None

    def scheme_of(self, name: str) -> Scheme | None:
        return self._store.scheme(name) if self._store is not None else None


class StoredQuantizer:
    """A quantizer whose work is done: hands out what a calibration has found.

    Args:
        store: the weights.
        otherwise: what to do for a weight that was not calibrated; None = refuse.
    """

    def __init__(self, store: QuantizedStore) -> None:
        self._store = store

    def quantize(self, source: str, weight: np.ndarray, scheme: Scheme) -> QuantizedWeight:
        """The calibrated weight of that name; `weight` [..., N, K] only tells the shape.

        Raises:
            LlmcError: it was not calibrated, or for another scheme.
        """
        found = self._store.get(source)
        if found is None or found.scheme != scheme or found.codes.shape != weight.shape:
            what = "was not calibrated" if found is None else f"was calibrated for {found.scheme.name}"
            raise LlmcError(
                "not-calibrated",
                f"{source} of shape {'×'.join(map(str, weight.shape))} is to be quantized to {scheme.name}; it {what}.",
                hint="Calibrate with the same quantization rules.",
            )
        return found
