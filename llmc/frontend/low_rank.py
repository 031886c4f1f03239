"""A model whose linear layers are two of low rank each, one after the other."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from llmc.errors import LlmcError
from llmc.frontend.capture import decoder_layers
from llmc.frontend.graph import ParamInfo, SourceModel, WeightSource
from llmc.quant.shrink import RankRule

FIRST, SECOND = "first.weight", "second.weight"


class LowRankLinear(torch.nn.Module):
    """x -> second(first(x)) with first [rank, K] and second [N, rank] (and the bias).

    Args:
        linear: what it stands for; its bias becomes second's.
        rank: of the product.
    """

    def __init__(self, linear: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        weight = linear.weight
        self.first = _linear(linear.in_features, rank, weight)
        self.second = _linear(rank, linear.out_features, weight)
        if linear.bias is not None:
            self.second.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x))
        return out


def _linear(inputs: int, outputs: int, like: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(inputs, outputs, bias=False, device=like.device, dtype=like.dtype)
    linear.weight.requires_grad_(False)
    return linear


@dataclass(frozen=True)
class Restructure:
    """Replaces linear layers, in place.

    Attributes:
        ranks: module path -> rank.
    """

    ranks: Mapping[str, int]

    def __call__(self, module: torch.nn.Module) -> None:
        for path, rank in self.ranks.items():
            linear = module.get_submodule(path)
            assert isinstance(linear, torch.nn.Linear)
            parent, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(parent), leaf, LowRankLinear(linear, rank))


def low_rank(source: SourceModel, rule: RankRule) -> tuple[SourceModel, dict[str, int]]:
    """The structure of `source` with the linear layers of its decoder layers factored, and the rank of each by path.

    Layers stay as they are where two factors would not be smaller, and where they choose among experts. The weights are
    still those of `source`; see llmc/quant/transform.py for the new ones.

    Raises:
        LlmcError: no layer can be factored with that rank.
    """
    ranks: dict[str, int] = {}
    largest = 0
    for path, layer in decoder_layers(source.module).items():
        experts = {p.shape[0] for p in layer.parameters() if p.ndim == 3}
        for name, module in layer.named_modules():
            if not isinstance(module, torch.nn.Linear) or experts & set(module.weight.shape):
                continue
            n, k = module.weight.shape
            largest = max(largest, (n * k - 1) // (n + k))
            rank = rule.of(n, k)
            if rank is not None:
                ranks[f"{path}.{name}"] = rank
    if not ranks:
        raise LlmcError(
            "svd-rank",
            f"No linear layer of {source.name} becomes smaller with rank {rule.rank}; the largest rank that makes one"
            f" smaller is {largest}."
            if largest
            else f"{source.name} has no linear layers in its decoder layers that could be factored.",
            hint="Give a lower rank, or a ratio such as --svd 0.5." if largest else "Leave --svd away.",
        )
    module = copy.deepcopy(source.module)
    restructure = Restructure(ranks)
    restructure(module)
    return replace(source, module=module, restructure=restructure), ranks


class FactoredWeights:
    """A WeightSource: the factors in place of the weights of `ranks`, everything else from `base`.

    Args:
        base: weights of the model that was factored.
        ranks: module path -> rank.
        factors: name of a factor -> float32.
    """

    def __init__(
        self, base: WeightSource, ranks: Mapping[str, int], factors: Mapping[str, torch.Tensor]
    ) -> None:
        self._base, self._factors = base, factors
        self._names: list[str] = []
        self._bias: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in base.names():
            path, _, leaf = name.rpartition(".")
            if path not in ranks:
                self._names.append(name)
            elif leaf == "weight":
                n, k = base.info(name).shape
                self._shapes[f"{path}.{FIRST}"] = (ranks[path], k)
                self._shapes[f"{path}.{SECOND}"] = (n, ranks[path])
            else:
                self._bias[f"{path}.second.{leaf}"] = name

    def names(self) -> tuple[str, ...]:
        return (*self._names, *self._shapes, *self._bias)

    def info(self, name: str) -> ParamInfo:
        if name in self._shapes:
            return ParamInfo(name, self._shapes[name], "float32")
        info = self._base.info(self._bias.get(name, name))
        return ParamInfo(name, info.shape, info.dtype)

    def load(self, name: str) -> torch.Tensor:
        if name in self._shapes:
            return self._factors[name]
        return self._base.load(self._bias.get(name, name))
