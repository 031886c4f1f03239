"""Layouts of packed weights that are decided already, so that other code reads the same file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from llmc.schedules.layout import BlockedLayout
from llmc.schedules.qlayout import QuantLayout

_GATED = ", gate and up in turns"


class StoredWeight(Protocol):
    """What PackedParam and ParamEntry have in common."""

    @property
    def sources(self) -> tuple[str, ...]: ...
    @property
    def dtype(self) -> str: ...


class WeightLayouts:
    """Layouts by weight; a weight that is not in it gets the one that suits the machine.

    Several levels of an artifact read one file of weights: the best one decides. Passes that pack weights ask here first.

    Args:
        texts: (weight, text of its layout as a manifest has it); rows as in the source are no decision.
    """

    def __init__(self, texts: Iterable[tuple[StoredWeight, str]] = ()) -> None:
        self._texts = {
            (weight.sources, weight.dtype, text.endswith(_GATED)): text.removesuffix(_GATED)
            for weight, text in texts
            if text != "rows"
        }

    def blocked(self, sources: tuple[str, ...], dtype: str, *, gated: bool = False) -> BlockedLayout | None:
        """Of a weight in its own dtype."""
        text = self._texts.get((sources, dtype, gated))
        return None if text is None else BlockedLayout.parse(text)

    def quantized(self, sources: tuple[str, ...], *, gated: bool = False) -> QuantLayout | None:
        """Of a weight in codes."""
        text = self._texts.get((sources, "uint8", gated))
        return None if text is None else QuantLayout.parse(text)
