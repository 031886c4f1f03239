"""ShardWriter: streams packed weights into safetensors shards, one tensor in memory at a time.

The file format is safetensors' (https://github.com/huggingface/safetensors, "Format"): 8 bytes
little-endian header length, a JSON header, then the tensors without gaps. Names, shapes and dtypes are known
before the first byte of data, so the header is written first. Every tensor starts at a multiple of 64 bytes
from the start of the file, because the runtime hands out pointers into the mapped file: where a size is no
multiple of 64, a one-dimensional U8 tensor ``__pad.N`` fills the gap. The same input gives the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from llmc import knobs
from llmc.artifact import ParamEntry
from llmc.errors import LlmcError

ALIGN = 64
SHARD_BYTES = 2 << 30
PAD_PREFIX = "__pad."

# dtype (TVM's and numpy's name) -> (safetensors' name, bytes per element)
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


@dataclass(frozen=True)
class PackedTensor:
    """A weight as the artifact will hold it, before its data exists.

    Attributes:
        name: unique in the artifact.
        shape, dtype: of the packed data, C order; dtype is a key of DTYPES.
        layout: how the data is arranged, for ParamEntry.layout.
        sources: names in the source model that it was packed from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = "rows"
    sources: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing at `path` into a sentence.

    Raises:
        LlmcError: ``disk-full``, ``no-write-permission`` or ``write-failed``.
    """
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LlmcError(
                "disk-full",
                f"The disk is full: {path} could not be written.",
                hint="Free space there or choose another output folder; nothing was left behind.",
            ) from None
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise LlmcError(
                "no-write-permission",
                f"There is no permission to write {path} ({e.strerror}).",
                hint="Choose another output folder.",
            ) from None
        raise LlmcError("write-failed", f"{path} could not be written: {e.strerror or e}.") from None


class ShardWriter:
    """Writes `tensors` in order into ``weights-00001.safetensors``, ... in `folder`.

        with ShardWriter(folder, tensors) as shards:
            for tensor in tensors:
                shards.write(tensor.name, data)
        shards.entries, shards.files

    Args:
        folder: must exist.
        tensors: all of them, in the order in which `write` is called.
        shard_bytes: a shard is closed before it would grow beyond this; a larger tensor gets its own shard.

    Attributes:
        entries: where each tensor lies, in order; known from the start.
        files: shard name -> sha256 of the whole file; complete after close().

    Raises:
        LlmcError: see disk_errors.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[PackedTensor], *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._shards = _plan(tensors, shard_bytes)
        self._queue = [(shard, item) for shard in self._shards for item in shard.items]
        self._next = 0
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self.entries: tuple[ParamEntry, ...] = tuple(item.entry for _, item in self._queue)
        self.files: dict[str, str] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def write(self, name: str, data: np.ndarray | bytes | memoryview) -> None:
        """Write the next tensor; `data` holds exactly its bytes in C order, of any element type.

        Raises:
            ValueError: not the tensor whose turn it is, or not its size (a bug of the caller).
            LlmcError: see disk_errors.
        """
        if self._next == len(self._queue):
            raise ValueError(f"tensor {name!r} was not announced")
        shard, item = self._queue[self._next]
        raw = (
            np.ascontiguousarray(data).view(np.uint8).data
            if isinstance(data, np.ndarray)
            else memoryview(data)
        )
        raw = raw.cast("B") if raw.nbytes else memoryview(b"")
        if name != item.entry.name or raw.nbytes != item.entry.nbytes:
            wanted = f"{item.entry.name!r} of {item.entry.nbytes} bytes"
            raise ValueError(f"expected tensor {wanted}, found {name!r} of {raw.nbytes}")
        with disk_errors(self._folder / shard.name):
            if item is shard.items[0]:
                self._file = (self._folder / shard.name).open("xb")
                self._digest = hashlib.sha256()
                self._put(shard.header)
            if knobs.fault() == "disk-full":
                raise OSError(errno.ENOSPC, "No space left on device")
            self._put(raw)
            self._put(bytes(item.pad))
            self._next += 1
            if item is shard.items[-1]:
                assert self._file is not None
                self._file.close()
                self._file = None
                self.files[shard.name] = self._digest.hexdigest()

    def close(self) -> None:
        """All tensors are written.

        Raises:
            ValueError: some are missing (a bug of the caller).
        """
        if self._next != len(self._queue):
            raise ValueError(
                f"tensor {self._queue[self._next][1].entry.name!r} was announced and not written"
            )

    def _put(self, raw: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(raw)
        self._digest.update(raw)


@dataclass(frozen=True, eq=False)
class _Item:
    entry: ParamEntry
    pad: int  # zero bytes after the data


@dataclass(frozen=True, eq=False)
class _Shard:
    name: str
    header: bytes
    items: tuple[_Item, ...]


def _plan(tensors: Sequence[PackedTensor], shard_bytes: int) -> list[_Shard]:
    """Divide the tensors among shards and lay out each shard."""
    names = [t.name for t in tensors]
    twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) != len(names) else []
    if twice:
        raise ValueError(f"tensors announced twice: {', '.join(twice)}")
    groups: list[list[PackedTensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return [_layout(f"weights-{i:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _layout(name: str, tensors: Sequence[PackedTensor]) -> _Shard:
    header: dict[str, object] = {}
    spans: list[tuple[int, int]] = []  # (offset behind the header, padding behind the data)
    position = 0
    for number, tensor in enumerate(tensors):
        end = position + tensor.nbytes
        pad = -end % ALIGN
        kind = DTYPES[tensor.dtype][0]
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, end]}
        if pad:
            header[f"{PAD_PREFIX}{number}"] = {
                "dtype": "U8",
                "shape": [pad],
                "data_offsets": [end, end + pad],
            }
        spans.append((position, pad))
        position = end + pad
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    raw = len(text).to_bytes(8, "little") + text
    items = tuple(
        _Item(
            ParamEntry(t.name, t.shape, t.dtype, name, len(raw) + start, t.nbytes, t.layout, t.sources), pad
        )
        for t, (start, pad) in zip(tensors, spans, strict=True)
    )
    return _Shard(name, raw, items)
