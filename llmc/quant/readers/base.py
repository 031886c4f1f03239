"""What the readers of quantized checkpoints share: tensors that are made of several stored ones, and bit fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmc.errors import LlmcError
from llmc.frontend.tensor_files import StoredTensor, TensorFiles
from llmc.quant.schemes import SCHEMES, STORED_ONLY, Code, Scheme
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
    bits: int, group_size: int, symmetric: bool, scale_dtype: str, activation_bits: int = 0
) -> Scheme:
    """The scheme with these properties; one that users can name if there is one."""
    for scheme in (*SCHEMES.values(), *STORED_ONLY.values()):
        same = (scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype, scheme.activation_bits)
        if (
            scheme.code is Code.INT
            and not scheme.offsets
            and same == (bits, group_size, symmetric, scale_dtype, activation_bits)
        ):
            return scheme
    name = f"q{bits}" + (f"g{group_size}" if group_size else "") + ("" if symmetric else "a")
    if scale_dtype != "float16":
        name += "f"
    if activation_bits:
        name += f"i{activation_bits}"
    return Scheme(name, bits, Code.INT, group_size, symmetric, activation_bits, scale_dtype)


def scale_dtype_of(tensor: StoredTensor) -> str:
    """What holds the values of stored scales exactly."""
    return "float16" if tensor.dtype == torch.float16 else "float32"


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
