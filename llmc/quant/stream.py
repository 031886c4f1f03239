"""What in a layer reads a norm, and which channels stay together: found by trying, for llmc.quant.rotate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from llmc.quant.fold import Fold
from llmc.quant.orthogonal import Rotation
from llmc.quant.recorder import Usage
from llmc.quant.rotated import Change

# smaller blocks of values gain nothing
_SMALLEST_HEAD = 8


@dataclass(frozen=True)
class Norm:
    """A norm and the matrices that it feeds."""

    weight: str
    bias: str | None
    one_plus: bool
    consumers: tuple[str, ...]

    def factor(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What it multiplies with, float64 [d]."""
        return parameters[self.weight].double() + (1.0 if self.one_plus else 0.0)


def find_norms(
    parameters: Mapping[str, torch.Tensor], vectors: list[str], run: Callable[[], dict[str, Usage]]
) -> list[Norm]:
    """Norms whose output goes into matrices: with one channel left open, only that channel comes through."""
    found = []
    for name in vectors:
        if not name.endswith("weight"):
            continue
        bias = name.removesuffix("weight") + "bias"
        names = [name, bias] if bias in vectors else [name]
        saved = {n: parameters[n].clone() for n in names}
        channel = len(parameters[name]) // 3
        for one_plus in (False, True):
            if bias in vectors:
                parameters[bias].zero_()
            parameters[name].fill_(-1.0 if one_plus else 0.0)
            parameters[name][channel] = 0.0 if one_plus else 1.0
            consumers = tuple(n for n, u in run().items() if _only(u, channel))
            for n, tensor in saved.items():
                parameters[n].copy_(tensor)
            if consumers:
                found.append(Norm(name, bias if bias in vectors else None, one_plus, consumers))
                break
    return found


def _only(usage: Usage, channel: int) -> bool:
    """Whether the inputs were zero but for one channel."""
    peaks = [m.peak for m in usage.moments if m is not None]
    if not peaks:
        return False
    peak = torch.stack(peaks).amax(dim=0)
    return len(peak) > channel and float(peak[channel]) > 0 and int((peak > 0).sum()) == 1


def head_changes(fold: Fold, rotation: Rotation, usages: Mapping[str, Usage]) -> dict[str, Change]:
    changes = {
        fold.producer.weight: Change(outputs=rotation, out_axis=out_axis(usages[fold.producer.weight]))
    }
    if fold.producer.bias is not None:
        changes[fold.producer.bias] = Change(outputs=rotation, out_axis=-1)
    for name in fold.consumers:
        changes[name] = Change(inputs=rotation, in_axis=in_axis(usages[name]))
    return changes


def blocks_of(fold: Fold) -> Iterator[int]:
    """Sizes of blocks of channels that stay together on their way to the consumers, largest first."""
    for block in range(fold.width, _SMALLEST_HEAD - 1, -1):
        if fold.width % block or len(fold.channel) % block:
            continue
        grouped = fold.channel.reshape(-1, block)
        first = grouped[:, :1]
        if bool((first % block == 0).all()) and bool((grouped == first + torch.arange(block)).all()):
            yield block


def in_axis(usage: Usage) -> int:
    return -2 if usage.transposed else -1


def out_axis(usage: Usage) -> int:
    return -1 if usage.transposed else -2


def inputs_of(tensor: torch.Tensor, usage: Usage) -> int:
    return tensor.shape[in_axis(usage)]
