"""Weights that are rotated when they are read: nothing is stored, and one tensor is in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llmc.frontend.graph import ParamInfo, WeightSource
from llmc.quant.orthogonal import Rotation


@dataclass(frozen=True, eq=False)
class Change:
    """What is done to one parameter.

    Attributes:
        scale: float64, multiplied along `in_axis` first: a norm's weight that moves into the matrices behind it.
        inputs: rotates along `in_axis`; a vector or a table has its only or last axis there.
        outputs: rotates along `out_axis`.
        in_axis, out_axis: of the parameter as the source model holds it.
        constant: every element becomes this, whatever it was.
    """

    scale: torch.Tensor | None = None
    inputs: Rotation | None = None
    outputs: Rotation | None = None
    in_axis: int = -1
    out_axis: int = -2
    constant: float | None = None

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The changed tensor, float32."""
        if self.constant is not None:
            return torch.full_like(tensor, self.constant, dtype=torch.float32)
        out = tensor.float()
        if self.scale is not None:
            shape = [1] * out.ndim
            shape[self.in_axis] = -1
            out = out * self.scale.view(shape).to(out.dtype)
        if self.inputs is not None:
            out = self.inputs.apply(out, self.in_axis)
        if self.outputs is not None:
            out = self.outputs.apply(out, self.out_axis)
        return out.float()


class RotatedWeights:
    """`base` with some weights changed as they are read; a WeightSource.

    Args:
        base: where they come from.
        changes: name -> what is done to it.
    """

    def __init__(self, base: WeightSource, changes: Mapping[str, Change]) -> None:
        self._base = base
        self._changes = dict(changes)

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def info(self, name: str) -> ParamInfo:
        info = self._base.info(name)
        return ParamInfo(name, info.shape, "float32") if name in self._changes else info

    def load(self, name: str) -> torch.Tensor:
        tensor = self._base.load(name)
        return self._changes[name].apply(tensor) if name in self._changes else tensor
