"""What a scheme that rounds activations does to the outputs of a matrix, on a sample of its inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmc.products import InputRounding
from llmc.quant.recorder import Recorder, Usage
from llmc.quant.rounding import decode, encode, plain_grid
from llmc.quant.schemes import Scheme


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


def rounded_product(x: torch.Tensor, weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """x [n, K] @ weight [N, K].T with both rounded as the scheme says; outlier columns are those of x."""
    kept = None
    if scheme.outlier_share:
        kept = torch.topk(x.abs().amax(dim=0), scheme.outliers(x.shape[1])).indices
    if scheme.activation_bits:
        x = InputRounding.of(scheme, kept)(x)
    rest = weight if kept is None else weight.index_fill(1, kept, 0)
    grid = plain_grid(rest, scheme)
    values = decode(encode(rest, grid), grid)
    if kept is not None:
        values[:, kept] = weight[:, kept]
    return x @ values.T
