"""What a scheme with integer activations does to the inputs of a matrix, in torch: rounded per token, on the fly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llmc.products import Product
from llmc.quant.recorder import Recorder, Usage


def round_activations(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x [..., K] rounded per token to 2**bits - 1 levels; the scale is the largest magnitude over the largest code."""
    top = (1 << (bits - 1)) - 1
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / top
    return torch.round(x / scale) * scale


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


class RoundedInputs(TorchFunctionMode):
    """Inside of this context the inputs of some weights are rounded to integers before they are multiplied.

    Args:
        parameters: name -> the tensor that the modules hold, as of Recorder.
        bits: name -> bits of its inputs.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], bits: Mapping[str, int]) -> None:
        super().__init__()
        self._bits = {parameters[n].untyped_storage().data_ptr(): b for n, b in bits.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        found = Product.of(func, args, kwargs)
        if found is not None:
            bits = self._bits.get(found.weight.untyped_storage().data_ptr())
            if bits is not None:
                args, kwargs = found.with_input(round_activations(found.x, bits))
        return func(*args, **kwargs)
