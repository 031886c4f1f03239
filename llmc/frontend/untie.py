"""A model whose output projection is its embedding, as one that has two tensors with equal values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from llmc.frontend.graph import ParamInfo, SourceModel, WeightSource


def untied(source: SourceModel) -> SourceModel:
    """`source` with a weight of its own in the output projection; `source` itself if it has one already.

    Weight transforms that treat the two differently (rotation) need it; the artifact then holds both.
    """
    pair = _tied(source.module)
    if pair is None:
        return source
    module = copy.deepcopy(source.module)
    config: Any = module.config
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    head: Any = module.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
    names = {id(p): n for n, p in module.named_parameters()}
    weights = None
    if source.weights is not None:
        weights = _UntiedWeights(source.weights, {names[id(head.weight)]: pair})
    return replace(source, module=module, weights=weights, untied=(pair, names[id(head.weight)]))


def _tied(module: torch.nn.Module) -> str | None:
    """Name of the one tensor that is embedding and output projection; None if they are two, or not to be found."""
    try:
        first: Any = module.get_input_embeddings()
        last: Any = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(first, "weight", None)
    if weight is None or getattr(last, "weight", None) is not weight:
        return None
    return next(n for n, p in module.named_parameters() if p is weight)


class _UntiedWeights:
    """`base` with some weights under a second name; a WeightSource."""

    def __init__(self, base: WeightSource, alias: Mapping[str, str]) -> None:
        self._base, self._alias = base, dict(alias)

    def names(self) -> tuple[str, ...]:
        return (*self._base.names(), *self._alias)

    def info(self, name: str) -> ParamInfo:
        info = self._base.info(self._alias.get(name, name))
        return ParamInfo(name, info.shape, info.dtype)

    def load(self, name: str) -> torch.Tensor:
        return self._base.load(self._alias.get(name, name))

    def __getattr__(self, attribute: str) -> Any:
        """What quantized checkpoints have beside: quantized(name), scheme_of(name)."""
        if attribute not in ("quantized", "scheme_of"):
            raise AttributeError(attribute)
        found = getattr(self._base, attribute)
        return lambda name: found(self._alias.get(name, name))
