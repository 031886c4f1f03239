"""Weights on their way from the checkpoint to the artifact, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llmc.frontend.graph import WeightSource
from llmc.passes.step_module import PackedParam
from llmc.schedules.layout import BlockedLayout


def packed_tensors(
    params: tuple[PackedParam, ...], weights: WeightSource
) -> Iterator[tuple[PackedParam, np.ndarray]]:
    """The artifact's tensors in order; peak memory is that of one source tensor and its packed copy.

    bfloat16 comes as uint16 (numpy has no such type); the bytes are what counts.
    """
    for param in params:
        yield param, pack_tensor(param, weights.load(param.source))


def pack_tensor(param: PackedParam, tensor: Any) -> np.ndarray:
    """One torch tensor, cast and laid out as `param` says: an array of shape ``param.shape``, C order."""
    array = to_numpy(tensor, param.dtype)
    if param.transposed:
        array = np.swapaxes(array, -1, -2)
    if param.layout != "rows":
        layout = BlockedLayout.parse(param.layout)
        array = np.stack([layout.pack(a) for a in array]) if array.ndim == 3 else layout.pack(array)
    array = np.ascontiguousarray(array)
    if array.shape != param.shape:
        raise AssertionError(f"{param.name}: packed to {array.shape}, planned {param.shape}")
    return array


def to_numpy(tensor: Any, dtype: str) -> np.ndarray:
    """A torch tensor as numpy in the given TVM dtype; bfloat16 as its bits in uint16."""
    import torch

    tensor = tensor.detach().to(getattr(torch, dtype)).contiguous()
    if dtype == "bfloat16":
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
