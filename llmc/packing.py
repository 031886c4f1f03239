"""Weights on their way from the checkpoint to the artifact, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from llmc.quant.quantizer import RoundToNearest, WeightQuantizer
from llmc.quant.weight import QuantizedWeight
from llmc.schedules.layout import BlockedLayout
from llmc.schedules.qlayout import QuantLayout, in_turns

if TYPE_CHECKING:
    from llmc.frontend.graph import WeightSource
    from llmc.passes.fold_weights import WeightExpression
    from llmc.passes.step_module import PackedParam


def packed_tensors(
    params: tuple[PackedParam, ...], weights: WeightSource, quantizer: WeightQuantizer | None = None
) -> Iterator[tuple[PackedParam, np.ndarray]]:
    """The artifact's tensors in order; peak memory is that of one source tensor and a packed tensor.

    bfloat16 comes as uint16 (numpy has no such type); the bytes are what counts.
    """
    quantizer = quantizer or RoundToNearest()
    for param in params:
        if QuantLayout.is_layout(param.layout):
            yield param, quantize_sources(param, weights.load, quantizer)
        else:
            yield param, pack_sources(param, weights.load)


def quantize_sources(
    param: PackedParam, load: Callable[[str], Any], quantizer: WeightQuantizer
) -> np.ndarray:
    """The packed bytes of a quantized parameter of one source or several; each is quantized by itself."""
    layout = QuantLayout.parse(param.layout)
    parts = []
    for name in param.sources:
        array = to_numpy(load(name), "float32")
        array = np.ascontiguousarray(np.swapaxes(array, -1, -2)) if param.transposed else array
        parts.append(quantizer.quantize(name, array, layout.of))
        if parts[-1].codes.shape != array.shape or parts[-1].scheme != layout.of:
            raise AssertionError(f"{name}: quantized to {parts[-1].scheme.name} {parts[-1].codes.shape}")
    columns = {None if p.outlier_columns is None else p.outlier_columns.tobytes() for p in parts}
    if len(columns) > 1:
        raise AssertionError(f"{param.name}: its parts differ in their outlier columns")
    whole = parts[0] if len(parts) == 1 else QuantizedWeight.join(parts, partial(np.concatenate, axis=-2))
    packed = layout.pack(in_turns(whole, layout.n_block) if param.gated else whole)
    if packed.shape != param.shape:
        raise AssertionError(f"{param.name}: packed to {packed.shape}, planned {param.shape}")
    return packed


def pack_sources(param: PackedParam, load: Callable[[str], Any]) -> np.ndarray:
    """A parameter of one source or several, laid out as `param` says; `load` gives a source's torch tensor.

    Sources are loaded one after another, each into its place.
    """
    if param.expression is not None:
        return _computed(param, param.expression, load)
    if not param.more and not param.gated:
        return pack_tensor(param, load(param.source))
    first_dtype = np.dtype("uint16" if param.dtype == "bfloat16" else param.dtype)
    out = np.zeros(param.shape, first_dtype)
    row = 0
    for name in param.sources:
        array = to_numpy(load(name), param.dtype)
        array = np.swapaxes(array, -1, -2) if param.transposed else array
        halves = np.split(array, 2) if param.gated and not param.more else [array]
        for half in halves:
            _place(param, out, row, half)
            row += half.shape[0]
    return out


def _computed(param: PackedParam, expression: WeightExpression, load: Callable[[str], Any]) -> np.ndarray:
    """A parameter that is computed from its sources."""
    arrays = []
    for name, dtype in zip(param.sources, expression.dtypes, strict=True):
        array = to_numpy(load(name), dtype)
        arrays.append(array.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else array)
    made = expression.evaluate(arrays)
    if str(made.dtype) != param.dtype:
        raise AssertionError(f"{param.name}: computed {made.dtype}, planned {param.dtype}")
    return _laid_out(param, made.view(np.uint16) if param.dtype == "bfloat16" else made)


def _place(param: PackedParam, out: np.ndarray, row: int, rows: np.ndarray) -> None:
    """Write weight rows [n, ...] as rows [row, row + n) of the parameter."""
    if param.layout == "rows":
        out[row : row + rows.shape[0]] = rows
        return
    layout = BlockedLayout.parse(param.layout)
    if param.gated:
        half = BlockedLayout(layout.n_block // 2, layout.k_pack)
        blocks, steps, _, pack = out.shape
        turns = out.reshape(blocks, steps, 2, half.n_block, pack)
        turns[:, :, 1 if row else 0] = half.pack(rows)
    else:
        layout.pack_into(out, row, rows)


def pack_tensor(param: PackedParam, tensor: Any) -> np.ndarray:
    """One torch tensor, cast and laid out as `param` says: an array of shape ``param.shape``, C order."""
    array = to_numpy(tensor, param.dtype)
    return _laid_out(param, np.swapaxes(array, -1, -2) if param.transposed else array)


def _laid_out(param: PackedParam, array: np.ndarray) -> np.ndarray:
    """A whole parameter in its layout."""
    if param.layout != "rows":
        layout = BlockedLayout.parse(param.layout)
        array = np.stack([layout.pack(a) for a in array]) if array.ndim == 3 else layout.pack(array)
    array = np.asarray(array, order="C")  # ascontiguousarray would give a number a dimension
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
