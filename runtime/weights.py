"""The packed weights of an artifact, mapped into memory and handed to the compiled functions without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmc.artifact import ParamEntry
from llmc.errors import LlmcError
from llmc.runtime.library import tensor_view
from llmc.runtime.memory import Bytes, map_file, resident_bytes


class Weights:
    """All parameters, in the manifest's order, as tvm tensors over mapped files.

    Raises:
        LlmcError: a shard cannot be mapped or does not hold what the manifest says.
    """

    def __init__(self, folder: Path, params: Sequence[ParamEntry]) -> None:
        self._shards: dict[str, Bytes] = {}
        for name in sorted({entry.shard for entry in params}):
            try:
                self._shards[name] = map_file(folder / name)
            except OSError as e:
                raise LlmcError(
                    "file-unreadable", f"{folder / name} cannot be mapped: {e.strerror}."
                ) from None
        self.tensors: tuple[Any, ...] = tuple(self._tensor(entry) for entry in params)

    def _tensor(self, entry: ParamEntry) -> Any:
        raw = self._shards[entry.shard][entry.offset : entry.offset + entry.nbytes]
        try:
            return tensor_view(raw, entry.shape, entry.dtype)
        except ValueError as e:
            raise LlmcError(
                "manifest-corrupt",
                f"Parameter {entry.name!r} is misplaced: {e}.",
                hint="Compile the model again.",
            ) from None

    def raw(self, params: Sequence[ParamEntry]) -> list[Bytes]:
        """The bytes of parameters, in their order; views of the mapped files."""
        return [self._shards[p.shard][p.offset : p.offset + p.nbytes] for p in params]

    @property
    def nbytes(self) -> int:
        """Size of the mapped files."""
        return sum(shard.nbytes for shard in self._shards.values())

    def resident(self) -> int:
        """Bytes of them that are in memory."""
        return sum(resident_bytes(shard) for shard in self._shards.values())
