"""Samples of what the weights of a layer are multiplied with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmc.quant.recorder import Recorder, Usage


class RowSample(Recorder):
    """Keeps some of the inputs of every matrix, evenly spread over all batches.

    Args:
        parameters: as of Recorder.
        rows: so many per batch. Experts are left out.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], rows: int) -> None:
        super().__init__(parameters)
        self._rows = rows
        self._kept: dict[str, list[torch.Tensor]] = {}

    def _add(self, name: str, usage: Usage, expert: int, x: torch.Tensor) -> None:
        if self.parameters[name].ndim != 2:
            return
        flat = x.detach().reshape(-1, x.shape[-1])
        step = max(1, len(flat) // self._rows)
        self._kept.setdefault(name, []).append(flat[::step][: self._rows].float().clone())

    def sampled(self) -> dict[str, torch.Tensor]:
        """Name of every matrix -> inputs; the members of a group share theirs."""
        leaders = {self.usages[name].group: name for name in self._kept}
        return {
            name: torch.cat(self._kept[leaders[usage.group]])
            for name, usage in self.usages.items()
            if usage.group in leaders
        }
