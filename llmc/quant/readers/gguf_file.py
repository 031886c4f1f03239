"""The container of GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import LlmcError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# type -> (name, values per block, bytes per block); those with a name of ours are read
TYPES = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    30: ("bf16", 1, 2),
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in the file.

    Attributes:
        name: llama.cpp's.
        shape: rows first.
        kind: see TYPES.
        offset: of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int

    @property
    def row_bytes(self) -> int:
        _, values, size = next(t for t in TYPES.values() if t[0] == self.kind)
        return self.shape[-1] // values * size


class GGUFFile:
    """Metadata and tensors of one file.

    Attributes:
        metadata: key -> number, bool, text or list.
        tensors: by name.

    Raises:
        LlmcError: not a GGUF file, truncated, big-endian, split into several, or of an unknown version or tensor type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as f:
                self._data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            reason = e.strerror if isinstance(e, OSError) else "it is empty"
            raise LlmcError(
                "gguf-unreadable", f"{path} cannot be read: {reason}.", hint="Check the path."
            ) from None
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, MemoryError, OverflowError) as e:
            raise self._damaged(f"its header ends early or is not readable ({type(e).__name__})") from None
        if int(self.metadata.get("split.count", 1)) > 1:
            raise LlmcError(
                "gguf-split",
                f"{path} is one of {self.metadata['split.count']} files of a split model; one whole file is required.",
                hint="Merge them with llama-gguf-split --merge.",
            )

    def _parse(self) -> None:
        self._at = 0
        if self._data[:4] != b"GGUF":
            raise self._damaged(f"it begins with {bytes(self._data[:4])!r} instead of b'GGUF'")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise LlmcError(
                "gguf-version",
                f"{self.path} has GGUF version {version}; 2 or 3, little-endian, is required.",
                hint="Convert the model again with a current llama.cpp.",
            )
        count, pairs = self._number("Q"), self._number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._number("I"))
        found = []
        for _ in range(count):
            name = self._string()
            dims = [self._number("Q") for _ in range(self._number("I"))]
            kind, offset = self._number("I"), self._number("Q")
            if kind not in TYPES:
                raise LlmcError(
                    "gguf-type",
                    f"Tensor {name!r} in {self.path} has the GGUF type number {kind}, which llmc does not know.",
                    hint="Use a q8_0, q4_0, q4_k_m, q6_k, f16 or f32 file.",
                )
            found.append(GGUFTensor(name, tuple(reversed(dims)), TYPES[kind][0], offset))
        alignment = int(self.metadata.get("general.alignment", 32))
        start = -(-self._at // alignment) * alignment
        self.tensors = {}
        for t in found:
            tensor = GGUFTensor(t.name, t.shape, t.kind, start + t.offset)
            end = tensor.offset + int(np.prod(t.shape[:-1], dtype=np.int64)) * tensor.row_bytes
            if end > len(self._data):
                raise self._damaged(f"tensor {t.name!r} needs {end} bytes, the file has {len(self._data)}")
            self.tensors[t.name] = tensor

    def rows(self, tensor: GGUFTensor) -> np.ndarray:
        """The bytes of a tensor, uint8 [rows, row_bytes] (one row for a vector); a copy."""
        rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        flat = np.frombuffer(self._data, np.uint8, rows * tensor.row_bytes, tensor.offset)
        return flat.reshape(rows, tensor.row_bytes).copy()

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        size = self._number("Q")
        if size > len(self._data) - self._at:
            raise self._damaged("a text in its header ends after the file")
        text = self._data[self._at : self._at + size].decode("utf-8", errors="surrogateescape")
        self._at += size
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, size = self._number("I"), self._number("Q")
            if inner in _NUMBERS:
                code = f"<{size}{_NUMBERS[inner]}"
                values = list(struct.unpack_from(code, self._data, self._at))
                self._at += struct.calcsize(code)
                return values
            return [self._value(inner) for _ in range(size)]
        if kind not in _NUMBERS:
            raise self._damaged(f"its header has a value of unknown type {kind}")
        return self._number(_NUMBERS[kind])

    def _damaged(self, reason: str) -> LlmcError:
        return LlmcError(
            "gguf-damaged",
            f"{self.path} is not a whole GGUF file: {reason}.",
            hint="Download the file again.",
        )
