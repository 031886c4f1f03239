"""ModelGraph: what every frontend delivers and the passes take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    import tvm


@dataclass(frozen=True)
class ParamInfo:
    """A weight as the graph sees it: name in the source model, shape, dtype (TVM's name)."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ModelGraph:
    """One Relax function over tokens.

        main(input_ids i32[T], positions i32[T], *params) -> logits [T, V]
        main(...) -> (logits, tap_0 [T, d], tap_1, ...)            if captured with taps

    T is one symbolic variable. The function covers ONE sequence; everything but llmc.attention and
    is per token, so that the passes may run several sequences laid end to end.

    Attributes:
        module: the IRModule with ``main``; opaque ops as in llmc/ops.py; weights only as parameters, never constants.
        params: the remaining parameters of ``main``, in order. Tied weights appear once.
        taps: module path of each tapped output (one per decoder layer), empty without taps.
        vocab_size: V.
    """

    module: tvm.IRModule
    params: tuple[ParamInfo, ...]
    vocab_size: int
    taps: tuple[str, ...] = ()

    def as_text(self) -> str:
        return self.module.script()


class WeightSource(Protocol):
    """Where weights come from, one tensor at a time; peak memory stays at one tensor (or one fused group)."""

    def names(self) -> tuple[str, ...]:
        """Names of all parameters (and persistent buffers) of the source model, tied ones once."""

    def info(self, name: str) -> ParamInfo:
        """Shape and dtype, without reading the data."""

    def load(self, name: str) -> torch.Tensor:
        """The tensor on the CPU in the checkpoint's dtype. Raises LlmcError if missing, truncated or misshapen."""


@dataclass(frozen=True)
class SourceModel:
    """An opened model: its structure on the meta device, and its weights behind a WeightSource.

    Attributes:
        module: the unmodified nn.Module; parameters on the meta device;
            non-persistent buffers always hold real values.
        weights: None when compiled with meta weights.
        config: the checkpoint's config.json as a mapping (empty for a plain nn.Module).
        folder: local folder with tokenizer files, or None.
        name: what to call it in messages and the manifest.
        untied: embedding and output projection that the checkpoint holds as one tensor and the module as two
            (llmc/frontend/untie.py); empty if nothing was untied.
        restructure: makes a module that was built again from the config like `module`, in place; None = it is already.
    """

    module: torch.nn.Module
    weights: WeightSource | None
    config: Mapping[str, object]
    folder: str | None
    name: str
    dtype: str  # the checkpoint's dtype, TVM's name
    model_type: str
    max_seq_len: int  # the model's own limit; 2**31 - 1 if it has none
    program: torch.export.ExportedProgram | None = None  # what a .pt2 file or exported program held
    untied: tuple[str, ...] = ()
    restructure: Callable[[torch.nn.Module], None] | None = None
