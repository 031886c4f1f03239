"""The source model with the weights that an artifact really holds: what its kernels are checked against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmc.artifact import ParamEntry
from llmc.frontend.graph import ParamInfo, SourceModel, WeightSource
from llmc.passes.step_module import PackedParam
from llmc.quant.schemes import by_name
from llmc.quant.weight import QuantizedWeight
from llmc.schedules.qlayout import QuantLayout, turns

if TYPE_CHECKING:
    import torch

    from llmc.products import InputRounding


def quantized_source(
    source: SourceModel, params: Sequence[PackedParam], entries: Sequence[ParamEntry], folder: Path
) -> SourceModel:
    """`source` with every quantized weight replaced by what the artifact in `folder` stores, in float32.

    Returns:
        `source` itself if nothing is quantized.
    """
    if source.weights is None or not any(QuantLayout.is_layout(p.layout) for p in params):
        return source
    return replace(source, weights=ArtifactWeights(source.weights, params, entries, folder))


class ArtifactWeights:
    """A WeightSource: quantized weights from an artifact's shards, the others from the source model.

    Weights are read back, not quantized again: that is quick whatever method made them.

    Attributes:
        rounded_inputs: weights that the artifact multiplies with rounded activations -> how these are rounded.
    """

    def __init__(
        self,
        base: WeightSource,
        params: Sequence[PackedParam],
        entries: Sequence[ParamEntry],
        folder: Path,
    ) -> None:
        self._base, self._folder = base, folder
        by_name = {entry.name: entry for entry in entries}
        self._where: dict[str, tuple[PackedParam, ParamEntry, int]] = {}
        for param in params:
            if not QuantLayout.is_layout(param.layout):
                continue
            row = 0
            for name in param.sources:
                self._where[name] = (param, by_name[param.name], row)
                shape = base.info(name).shape
                row += shape[-1] if param.transposed else shape[-2]
        self.rounded_inputs = {
            name: self._rounding(param, entry)
            for name, (param, entry, _) in self._where.items()
            if rounds_inputs(param.scheme)
        }

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def info(self, name: str) -> ParamInfo:
        info = self._base.info(name)
        return ParamInfo(info.name, info.shape, "float32") if name in self._where else info

    def load(self, name: str) -> torch.Tensor:
        if name not in self._where:
            return self._base.load(name)
        import torch

        param, entry, row = self._where[name]
        shape = self._base.info(name).shape
        rows = shape[-1] if param.transposed else shape[-2]
        layout = QuantLayout.parse(param.layout)
        weight = layout.unpack(np.asarray(self._stored(entry)))
        if param.gated:
            total = sum(self._base.info(n).shape[-2] for n in param.sources)
            weight = _rows(weight, _inverse(turns(total, layout.n_block), total))
        if len(param.sources) > 1:
            weight = _rows(weight, np.arange(row, row + rows))
        values = weight.dequantize()
        return torch.from_numpy(
            np.ascontiguousarray(np.swapaxes(values, -1, -2) if param.transposed else values)
        )

    def _stored(self, entry: ParamEntry) -> np.ndarray:
        return np.memmap(self._folder / entry.shard, np.uint8, "r", entry.offset, entry.shape)

    def _rounding(self, param: PackedParam, entry: ParamEntry) -> InputRounding:
        import torch

        from llmc.products import InputRounding

        layout = QuantLayout.parse(param.layout)
        if not layout.outliers:
            return InputRounding.of(layout.of)
        kept = layout.columns_of(self._stored(entry)).astype(np.int64)
        return InputRounding.of(layout.of, torch.from_numpy(kept))


def rounds_inputs(scheme: str) -> bool:
    """Whether weights in a scheme are multiplied with activations that are rounded to few bits."""
    return bool(scheme) and by_name(scheme).activation_bits > 0


def _rows(weight: QuantizedWeight, index: np.ndarray) -> QuantizedWeight:
    return weight.map(lambda a: a[..., index, :])


def _inverse(order: np.ndarray, rows: int) -> np.ndarray:
    """Where each of `rows` rows went; `order` says which row is where, -1 for none."""
    out = np.empty(rows, np.int64)
    there = np.flatnonzero(order >= 0)
    out[order[there]] = there
    return out
