"""MXFP4 experts as in gpt_oss: blocks of 32 four-bit floats with a shared power of two (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

import numpy as np

from llmc.frontend.tensor_files import TensorFiles
from llmc.quant.readers.base import Config, Entry, QuantizedFiles, Tensors, require
from llmc.quant.schemes import SCHEMES
from llmc.quant.weight import QuantizedWeight

_BIAS = 127


def read_mxfp4(config: Config, files: TensorFiles) -> QuantizedFiles:
    """Experts [E, K, N] in the model.

    Layout: NAME_blocks uint8 [E, N, K / 32, 16], the first of two values in the low half of a byte; NAME_scales
    uint8 [E, N, K / 32], exponents with bias 127.
    """
    entries = []
    for key in files.index():
        if not key.endswith("_blocks"):
            continue
        name = key.removesuffix("_blocks")
        parts = (key, f"{name}_scales")
        shape = require(files, key).shape
        require(files, parts[1])
        *lead, n, groups, half = shape
        entries.append(
            Entry(
                name, (*lead, groups * half * 2, n), SCHEMES["mxfp4"], parts, _Build(parts), transposed=True
            )
        )
    return QuantizedFiles(files, entries)


class _Build:
    def __init__(self, parts: tuple[str, str]) -> None:
        self._parts = parts

    def __call__(self, tensors: Tensors) -> QuantizedWeight:
        blocks, exponents = (tensors[part].numpy() for part in self._parts)
        codes = np.stack([blocks & 15, blocks >> 4], axis=-1)
        *lead, groups, half, _ = codes.shape
        scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - _BIAS)
        return QuantizedWeight(
            SCHEMES["mxfp4"],
            np.ascontiguousarray(codes.reshape(*lead, groups * half * 2)),
            scales.astype(np.float32),
        )
