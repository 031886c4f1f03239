"""Checkpoints in e4m3 with plain scales: transformers' "fp8" (DeepSeek-V3, Qwen3-FP8, AutoFP8) and "fbgemm_fp8"."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from llmc.errors import LlmcError
from llmc.frontend.tensor_files import StoredTensor, TensorFiles
from llmc.quant.readers.base import Config, Entry, QuantizedFiles, Tensors, floats
from llmc.quant.schemes import Code, Scheme, stored_scheme
from llmc.quant.weight import QuantizedWeight

_SCALES = ("_scale_inv", "_scale")
# what activations were rounded with; llmc rounds them by their own magnitudes, or not at all
_INPUTS = ("activation_scale", "input_scale")


def read_fp8(config: Config, files: TensorFiles) -> QuantizedFiles:
    """Weights as ``value * scale``.

    Layouts: NAME float8_e4m3fn [N, K] (or [E, N, K] of experts); NAME_scale_inv or NAME_scale, float: one value, one per row
    [N, 1], or one per block of weight_block_size, [ceil(N / bn), ceil(K / bk)]. Blocks become groups of bk inputs, in which
    rows of a block have equal scales.

    Raises:
        LlmcError: an unsupported field (formats other than e4m3, 4-bit experts, a quantized cache), scales of another shape.
    """
    config.one_of("fmt", ("e4m3", None))
    config.one_of("expert_dtype", ("fp8", None))
    config.one_of("activation_scheme", ("dynamic", "static", None))
    config.must_be_empty("kv_cache_scheme")
    block = _block(config)
    index = files.index()
    entries = []
    for key, stored in index.items():
        if stored.dtype == torch.float8_e5m2:
            raise config.refuse(key, "float8_e5m2", "float8_e4m3fn")
        if stored.dtype == torch.float8_e4m3fn:
            scale = next((index[key + leaf] for leaf in _SCALES if key + leaf in index), None)
            if scale is None:
                raise LlmcError(
                    "weight-missing",
                    f"The quantized checkpoint lacks the scales of {key!r} ({key}_scale_inv or {key}_scale).",
                    hint="Download the checkpoint again.",
                )
            entries.append(_entry(config, stored, scale, block))
    dropped = [key for key in index if key.endswith(_INPUTS)]
    return QuantizedFiles(files, entries, dropped)


def _block(config: Config) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None = there are no blocks."""
    found = config.values.get("weight_block_size")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
        raise config.refuse("weight_block_size", found, "two positive numbers, or null")
    return found[0], found[1]


def _entry(config: Config, weight: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None) -> Entry:
    *lead, n, k = weight.shape
    single = math.prod(scale.shape) == 1 and not lead
    shape = (1, 1) if single else scale.shape[len(lead) :]
    columns = 0 if block is None or len(shape) != 2 or shape[1] == 1 else block[1]
    fits = len(shape) == 2 and scale.shape[: len(lead)] in ((), tuple(lead))
    if not fits or shape[1] != (-(-k // columns) if columns else 1) or not 1 <= shape[0] <= n:
        raise config.refuse(
            scale.key, "×".join(map(str, scale.shape)), f"scales of {weight.key} {weight.shape}"
        )
    rows = -(-n // shape[0])
    if block is not None and shape[0] == -(-n // block[0]):
        rows = block[0]
    scheme = stored_scheme(Code.E4M3, 8, columns, scale_dtype="float32", activation_bits=8)
    parts = (weight.key, scale.key)
    return Entry(weight.key, weight.shape, scheme, parts, _Build(scheme, parts, rows, shape))


class _Build:
    def __init__(self, scheme: Scheme, parts: tuple[str, str], rows: int, shape: tuple[int, ...]) -> None:
        self._scheme, self._parts, self._rows, self._shape = scheme, parts, rows, shape

    def __call__(self, tensors: Tensors) -> QuantizedWeight:
        weight, scale = (tensors[part] for part in self._parts)
        codes = weight.contiguous().view(torch.uint8).numpy()
        scales = floats(scale).reshape(*codes.shape[:-2], *self._shape)
        return QuantizedWeight(self._scheme, codes, spread_rows(scales, self._rows, codes.shape[-2]))


def spread_rows(scales: np.ndarray[Any, Any], rows: int, n: int) -> np.ndarray[Any, Any]:
    """Scales of blocks of `rows` rows, [..., ceil(n / rows), G], for each row: [..., n, G]."""
    return np.ascontiguousarray(np.repeat(scales, rows, axis=-2)[..., :n, :])
