"""What the readers of quantized checkpoints share: tensors that are made of several stored ones, and bit fields."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llmc.errors import LlmcError
from llmc.frontend.tensor_files import StoredTensor, TensorFiles
from llmc.quant.schemes import Code, Scheme, stored_scheme
from llmc.quant.weight import QuantizedWeight

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """A weight of the source model that the checkpoint stores quantized.

    Attributes:
        key: name of the float tensor that an unquantized checkpoint would have.
        shape: of that tensor.
        scheme: how it is quantized.
        parts: keys of the stored tensors that it is made of.
        build: makes the canonical form out of them, [N, K] or [E, N, K].
        transposed: the float tensor is [..., K, N].
    """

    key: str
    shape: tuple[int, ...]
    scheme: Scheme
    parts: tuple[str, ...]
    build: Callable[[Tensors], QuantizedWeight]
    transposed: bool = False


class QuantizedFiles:
    """TensorFiles in which quantized weights look like float tensors; they can also be had as they are stored.

    Args:
        files: the checkpoint.
        entries: its quantized weights.
        drop: stored keys that belong to the quantization and are nobody's weight.
    """

    def __init__(self, files: TensorFiles, entries: Iterable[Entry], drop: Iterable[str] = ()) -> None:
        self._files = files
        self._entries = {e.key: e for e in entries}
        stored = files.index()
        hidden = {part for e in self._entries.values() for part in e.parts} | set(drop)
        self._index = {k: s for k, s in stored.items() if k not in hidden}
        for entry in self._entries.values():
            file = stored[entry.parts[0]].file
            self._index[entry.key] = StoredTensor(entry.key, file, entry.shape, torch.float32)

    def index(self) -> Mapping[str, StoredTensor]:
        return self._index

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Quantized weights come dequantized, in float32."""
        keys = list(keys)
        out = self._files.read([k for k in keys if k not in self._entries])
        for key in keys:
            if key in self._entries:
                dense = torch.from_numpy(self.quantized(key).dequantize())
                out[key] = dense.transpose(-1, -2).contiguous() if self._entries[key].transposed else dense
        return out

    def transpose(self, keys: Iterable[str]) -> None:
        """Let the float tensors of these quantized weights be [K, N], as in transformers' Conv1D."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and not entry.transposed:
                shape = (*entry.shape[:-2], entry.shape[-1], entry.shape[-2])
                self._entries[key] = replace(entry, shape=shape, transposed=True)
                self._index[key] = replace(self._index[key], shape=shape)

    def quantized_keys(self) -> tuple[str, ...]:
        """Of the quantized weights, under which float tensors would be."""
        return tuple(self._entries)

    def entry(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def quantized(self, key: str) -> QuantizedWeight:
        """The weight exactly as stored."""
        entry = self._entries[key]
        weight = entry.build(self._files.read(entry.parts))
        expected = (*entry.shape[:-2], *entry.shape[:-3:-1]) if entry.transposed else entry.shape
        if weight.codes.shape != tuple(expected) or not np.isfinite(weight.scales).all():
            what = (
                "scales that are NaN or infinite"
                if weight.codes.shape == tuple(expected)
                else "another shape"
            )
            raise LlmcError(
                "quantized-weight",
                f"{key}: {'×'.join(map(str, expected))} finite weights are required, found {what}"
                f" ({'×'.join(map(str, weight.codes.shape))}).",
                hint="Download the checkpoint again.",
            )
        return weight


class Config:
    """The quantization_config of a checkpoint; what is not supported is refused by the field's name.

    Args:
        values: the mapping.
        where: file and section for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def refuse(self, field: str, found: object, required: str) -> LlmcError:
        return LlmcError(
            "quantization-config",
            f"{self.where}.{field} is {found!r}; llmc reads {required}.",
            hint="Use the unquantized checkpoint and llmc's own --quant, or another quantized one.",
        )

    def one_of(self, field: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """The value of a field, which must be one of `allowed`."""
        value = self.values.get(field, default)
        if value not in allowed or isinstance(value, bool) not in {isinstance(a, bool) for a in allowed}:
            raise self.refuse(field, value, " or ".join(map(repr, allowed)))
        return value

    def must_be_empty(self, field: str) -> None:
        if self.values.get(field):
            raise self.refuse(field, self.values[field], f"checkpoints without {field}")

    def group_size(self, field: str = "group_size") -> int:
        """Neighbouring inputs that share a scale; 0 = the whole row."""
        value = self.values.get(field)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or (value != -1 and value < 8)
            or value % 8 not in (0, 7)
        ):
            raise self.refuse(field, value, "-1 or a multiple of 8")
        return 0 if value == -1 else value

    def section(self, field: str) -> Config:
        value = self.values.get(field)
        if not isinstance(value, Mapping):
            raise self.refuse(field, value, "a mapping")
        return Config(value, f"{self.where}.{field}")


def integer_scheme(
    bits: int, group_size: int, symmetric: bool, scale_dtype: str, activation_bits: int = 0, order: str = ""
) -> Scheme:
    """stored_scheme of integers."""
    return stored_scheme(
        Code.INT,
        bits,
        group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        activation_bits=activation_bits,
        order=order,
    )


def scale_dtype_of(tensor: StoredTensor) -> str:
    """What holds the values of stored scales exactly."""
    return {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(tensor.dtype, "float32")


def order_of(groups: torch.Tensor, size: int) -> np.ndarray | None:
    """The order of inputs that makes those of a group neighbours.

    Args:
        groups: the group of each input, [K]; group g has `size` of them, the last one perhaps fewer. Numbers below
            zero stand for none, that is for neighbours.

    Returns:
        int32 [K]: the input at each place; None if they are neighbours already.

    Raises:
        ValueError: groups of other sizes.
    """
    numbers = groups.long().numpy()
    natural = np.arange(len(numbers)) // size
    if np.array_equal(numbers, natural) or (numbers < 0).any():
        return None
    order = np.argsort(numbers, kind="stable")
    if not np.array_equal(numbers[order], natural):
        raise ValueError(f"groups of other sizes than {size}")
    return order.astype(np.int32)


def digest(order: np.ndarray | None) -> str:
    """What a scheme says of an order of inputs."""
    return "" if order is None else f"{zlib.crc32(order.astype('<i4').tobytes()):08x}"


def unpack(words: torch.Tensor, bits: int, axis: int, count: int) -> np.ndarray:
    """Fields of `bits` bits, lowest first, of a stream of int32 words along `axis`; may straddle words.

    Returns:
        uint8, `count` long along `axis`.
    """
    moved = np.ascontiguousarray(np.moveaxis(words.to(torch.int32).numpy(), axis, -1))
    raw = moved.astype("<i4").view(np.uint8)
    if bits == 8:
        codes = raw
    elif bits in (2, 4):
        fields = [(raw >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        codes = np.stack(fields, axis=-1).reshape(*raw.shape[:-1], -1)
    else:
        stream = np.unpackbits(raw, axis=-1, bitorder="little")
        stream = stream[..., : stream.shape[-1] // bits * bits]
        stream = stream.reshape(*raw.shape[:-1], -1, bits)
        codes = (stream << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return np.ascontiguousarray(np.moveaxis(codes[..., :count], -1, axis))


def floats(tensor: torch.Tensor) -> np.ndarray:
    """float32, contiguous."""
    return np.ascontiguousarray(tensor.float().numpy())


def prefixes(files: TensorFiles, suffix: str) -> list[str]:
    """Modules that have a tensor of that name."""
    return [k.removesuffix("." + suffix) for k in files.index() if k.endswith("." + suffix)]


def require(files: TensorFiles, key: str) -> StoredTensor:
    """A stored tensor that must be there."""
    stored = files.index().get(key)
    if stored is None:
        raise LlmcError(
            "weight-missing",
            f"The quantized checkpoint lacks {key!r}.",
            hint="Download the checkpoint again.",
        )
    return stored
