"""Reading single tensors out of checkpoint files: *.safetensors and pytorch_model*.bin, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from llmc.errors import LlmcError

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFiles(Protocol):
    """The tensors of a checkpoint by the keys that they have in its files."""

    def index(self) -> Mapping[str, StoredTensor]: ...

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors on the CPU, in their stored dtype. May be views of a memory map: do not write to them."""


def open_files(folder: Path) -> TensorFiles:
    """Find and open the weights in a checkpoint folder: safetensors if there are any, else pytorch_model*.bin.

    Raises:
        LlmcError: none there, a shard missing, a file truncated or damaged.
    """
    for index, kind in (
        ("model.safetensors.index.json", SafetensorsFiles),
        ("pytorch_model.bin.index.json", BinFiles),
    ):
        single = folder / index.removesuffix(".index.json")
        if single.is_file():
            return kind([single])
        if (folder / index).is_file():
            return kind(_shards(folder / index))
    # one file under another name, e.g. an export of a training framework
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return SafetensorsFiles(others)
    found = ", ".join(p.name for p in others[:4]) or "none"
    raise LlmcError(
        "weights-missing",
        f"{folder} has no weights: model.safetensors, model.safetensors.index.json or pytorch_model.bin is"
        f" required, found *.safetensors: {found}.",
        hint="Download the checkpoint again, or compile with --meta-weights for sizes only.",
    )


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise LlmcError(
            "weights-index",
            f"{index} is not a readable index of weight files: {type(e).__name__}: {e}.",
            hint="Download the checkpoint again.",
        ) from None
    files = [index.parent / name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise LlmcError(
            "weights-missing",
            f"{len(missing)} of {len(files)} weight files named in {index.name} are not in {index.parent}:"
            f" {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}.",
            hint="Download the checkpoint again.",
        )
    return files


class SafetensorsFiles:
    """Tensors in *.safetensors files (https://github.com/huggingface/safetensors, header of JSON)."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._index: dict[str, StoredTensor] = {}
        for file in files:
            for stored in _read_header(file):
                self._index[stored.key] = stored

    def index(self) -> Mapping[str, StoredTensor]:
        return self._index

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError, safe_open

        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._index[key].file, []).append(key)
        out = {}
        for file, wanted in by_file.items():
            # the map lives as long as the tensors: opened per call, so that what was read does not stay resident
            try:
                with safe_open(file, framework="pt") as f:
                    for key in wanted:
                        out[key] = f.get_tensor(key)
            except (SafetensorError, OSError) as e:
                raise _damaged(file, e) from None
        return out


def _read_header(file: Path) -> Iterable[StoredTensor]:
    size = file.stat().st_size
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"its header needs {length} bytes, the file has {max(size - 8, 0)}")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        if end != size:
            raise ValueError(f"its header describes {end} bytes, the file has {size}")
        stored = []
        for key, tensor in header.items():
            dtype = _SAFETENSORS_DTYPES.get(tensor["dtype"])
            if dtype is None:
                raise LlmcError(
                    "weights-dtype",
                    f"Tensor {key!r} in {file.name} has dtype {tensor['dtype']}, which llmc does not read.",
                    hint="Use a checkpoint in float32, float16 or bfloat16.",
                )
            stored.append(StoredTensor(key, file, tuple(tensor["shape"]), dtype))
        return stored
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise _damaged(file, e) from None


class BinFiles:
    """Tensors in pytorch_model*.bin, read with torch's restricted unpickler and memory-mapped where torch can."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._index: dict[str, StoredTensor] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            for key, tensor in _load_bin(file).items():
                self._index[key] = StoredTensor(key, file, tuple(tensor.shape), tensor.dtype)
                self._tensors[key] = tensor

    def index(self) -> Mapping[str, StoredTensor]:
        return self._index

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        return {key: self._tensors[key] for key in keys}


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    import pickle
    import zipfile

    try:
        # files from before torch 1.6 are plain pickles, which cannot be mapped
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as e:
        raise _damaged(file, e) from None
    if not isinstance(state, dict):
        raise _damaged(file, ValueError(f"a dictionary of tensors is required, found {type(state).__name__}"))
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def _damaged(file: Path, error: Exception) -> LlmcError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return LlmcError(
        "weights-damaged",
        f"{file} is truncated or damaged: {reason[:300].rstrip('.')}.",
        hint="Download the checkpoint again.",
    )
