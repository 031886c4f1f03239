"""Where a per-channel scale on the input of some linear layers can be moved into what produces that input.

Nothing here knows an architecture. A producer is scaled by random factors, the layer is run on one sequence, and the
inputs that come out multiplied by exactly those factors are the ones it may be folded into: norm -> q, k, v; up -> down
through a product; v -> o through attention with shared heads; fc1 -> fc2 through a ReLU. A fold counts only if scaling
the producer and unscaling the consumers leaves the layer's output as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llmc.quant.calibrate import LayerWork
from llmc.quant.recorder import InputTap

# float32 through a layer: sums over some thousand inputs
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Producer:
    """Something whose output channels can be scaled.

    Attributes:
        weight: name of a norm's weight [N] or of a matrix with N outputs.
        bias: name of its bias [N], if it has one.
        out_axis: the axis of `weight` that is the output.
        one_plus: the norm multiplies by 1 + weight (gemma).
    """

    weight: str
    bias: str | None
    out_axis: int
    one_plus: bool = False

    @property
    def is_norm(self) -> bool:
        return self.out_axis < 0

    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def scale(self, parameters: dict[str, torch.Tensor], factor: torch.Tensor) -> None:
        """Multiply the output by `factor` [N], in place."""
        weight = parameters[self.weight]
        if self.is_norm:
            weight.copy_((weight + 1) * factor - 1 if self.one_plus else weight * factor)
        else:
            weight *= factor[:, None] if self.out_axis == 0 else factor[None]
        if self.bias is not None:
            parameters[self.bias] *= factor


@dataclass(frozen=True, eq=False)
class Fold:
    """Scaling the producer's channel c scales the consumers' inputs i with channel[i] == c.

    Attributes:
        producer: what can be scaled.
        consumers: names of the matrices with this input.
        channel: int64 [K].
        width: number of the producer's channels.
    """

    producer: Producer
    consumers: tuple[str, ...]
    channel: torch.Tensor
    width: int

    def apply(self, work: LayerWork, scale: torch.Tensor) -> None:
        """Multiply the consumers' columns by scale[channel] and divide the producer by scale [width], in place."""
        self.producer.scale(work.layer.parameters, 1 / scale)
        spread = scale[self.channel]
        for name in self.consumers:
            weight = work.layer.parameters[name]
            weight *= spread[:, None] if work.usages[name].transposed else spread[None]


def find_folds(work: LayerWork) -> list[Fold]:
    """The folds that leave the layer as it is, at most one per input; what has none is noted in `work`."""
    groups = _groups(work)
    shared = work.runner.shared_names()
    base, inputs = _run(work)
    found: dict[str, Fold] = {}
    for producer in _producers(work):
        if shared & set(producer.names()):
            continue
        saved = {n: work.layer.parameters[n].clone() for n in producer.names()}
        width = saved[producer.weight].shape[max(producer.out_axis, 0)]
        factor = _random_factors(width)
        producer.scale(work.layer.parameters, factor)
        _, scaled = _run(work)
        _restore(work, saved)
        for leader, members in groups.items():
            if leader in found or producer.weight in members or shared & set(members):
                continue
            channel = _channels(inputs[leader], scaled.get(leader), factor)
            if channel is None:
                continue
            fold = Fold(producer, members, channel, width)
            if _is_exact(work, fold, factor, base):
                found[leader] = fold
    for leader, members in groups.items():
        if leader not in found:
            names = ", ".join(m.removeprefix(work.layer.path + ".") for m in members)
            work.notes.append(
                f"{work.layer.path}: {names}: not scaled, because nothing before it can take the scale"
            )
    return list(found.values())


def _groups(work: LayerWork) -> dict[str, tuple[str, ...]]:
    """First name -> names of the matrices with one input, where at least one is to be quantized."""
    groups: dict[int, list[str]] = {}
    for name, usage in work.usages.items():
        if work.layer.parameters[name].ndim == 2:
            groups.setdefault(usage.group, []).append(name)
    return {names[0]: tuple(names) for names in groups.values() if any(n in work.plan for n in names)}


def _producers(work: LayerWork) -> list[Producer]:
    """Norms first: they cost nothing to change."""
    parameters = work.layer.parameters

    def bias_of(name: str) -> str | None:
        bias = name.removesuffix("weight") + "bias"
        return bias if name.endswith("weight") and bias in parameters else None

    out = []
    for name, tensor in parameters.items():
        if tensor.ndim == 1 and name.endswith("weight"):
            out += [Producer(name, bias_of(name), -1), Producer(name, bias_of(name), -1, one_plus=True)]
    for name, usage in work.usages.items():
        if parameters[name].ndim == 2:
            out.append(Producer(name, bias_of(name), 1 if usage.transposed else 0))
    return out


def _run(work: LayerWork) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tap = InputTap(work.layer.parameters)
    out = work.runner.probe(work.layer, tap.watch)
    return out, tap.inputs


def _random_factors(width: int) -> torch.Tensor:
    """Different for every channel, so that they tell which channel it was; between a half and two."""
    steps = torch.randperm(width, generator=torch.Generator().manual_seed(width))
    return torch.exp2((steps.float() + 0.5) / width * 2 - 1)


def _channels(before: torch.Tensor, after: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor | None:
    """For every input channel the producer's channel whose factor it was multiplied by; None if it is not so."""
    if after is None or after.shape != before.shape:
        return None
    k, width = before.shape[1], len(factor)
    if k == width and _close(after, before * factor):
        return torch.arange(k)
    if k % width and width % k:
        return None
    energy = (before * before).sum(dim=0)
    if float(energy.min()) <= 0:
        return None
    ratio = (after * before).sum(dim=0) / energy
    sorted_factor, order = factor.sort()
    at = torch.bucketize(ratio, (sorted_factor[1:] + sorted_factor[:-1]) / 2)
    channel = order[at]
    return channel if _close(after, before * factor[channel]) else None


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding, channel by channel."""
    size = b.abs().amax(dim=0).clamp(min=1e-30)
    return bool(((a - b).abs().amax(dim=0) <= _TOLERANCE * 0.1 * size).all())


def _is_exact(work: LayerWork, fold: Fold, factor: torch.Tensor, base: torch.Tensor) -> bool:
    names = {*fold.producer.names(), *fold.consumers}
    saved = {n: work.layer.parameters[n].clone() for n in names}
    fold.apply(work, factor)
    out = work.runner.probe(work.layer, lambda: InputTap({}).watch())
    _restore(work, saved)
    return float((out - base).abs().max()) <= _TOLERANCE * float(base.abs().max())


def _restore(work: LayerWork, saved: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in saved.items():
        work.layer.parameters[name].copy_(tensor)
