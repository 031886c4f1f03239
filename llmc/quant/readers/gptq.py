"""Checkpoints of AutoGPTQ and GPTQModel: qweight, qzeros, scales, g_idx."""

from __future__ import annotations

import numpy as np
import torch

from llmc.errors import LlmcError
from llmc.frontend.tensor_files import TensorFiles
from llmc.quant.readers.base import (
    Config,
    Entry,
    QuantizedFiles,
    Tensors,
    floats,
    integer_scheme,
    prefixes,
    require,
    scale_dtype_of,
    unpack,
)
from llmc.quant.schemes import Scheme
from llmc.quant.weight import QuantizedWeight


def read_gptq(config: Config, files: TensorFiles) -> QuantizedFiles:
    """Weights as ``(code - zero) * scale``; in format version 1 the stored zero points are one less than the real ones.

    Layout: qweight int32 [K * bits / 32, N] packed along K, qzeros int32 [G, N * bits / 32], scales [G, N], g_idx [K].

    Raises:
        LlmcError: an unsupported field; desc_act with groups that are not neighbouring inputs.
    """
    bits = config.one_of("bits", (2, 3, 4, 8))
    size = config.group_size()
    config.must_be_empty("dynamic")
    config.one_of("pack_dtype", ("int32",), "int32")
    # GPTQModel calls the field `format`
    name = "checkpoint_format" if "checkpoint_format" in config.values else "format"
    one_less = config.one_of(name, ("gptq", "gptq_v2"), "gptq") == "gptq"
    symmetric = config.one_of("sym", (True, False), True)
    entries, dropped = [], []
    for prefix in prefixes(files, "qweight"):
        parts = tuple(f"{prefix}.{leaf}" for leaf in ("qweight", "qzeros", "scales"))
        words, _, scales = (require(files, part) for part in parts)
        n, k = words.shape[1], words.shape[0] * 32 // bits
        _check_order(config, files, f"{prefix}.g_idx", size or k)
        # symmetric ones keep their zero points too: some writers round them
        scheme = integer_scheme(bits, size if size < k else 0, symmetric, scale_dtype_of(scales))
        build = _Build(scheme, parts, n, k, one_less)
        entries.append(Entry(f"{prefix}.weight", (n, k), scheme, parts, build))
        dropped.append(f"{prefix}.g_idx")
    return QuantizedFiles(files, entries, dropped)


def _check_order(config: Config, files: TensorFiles, key: str, size: int) -> None:
    if key not in files.index():
        return
    groups = files.read([key])[key].long()
    if not torch.equal(groups, torch.arange(len(groups)) // size):
        raise LlmcError(
            "quantization-config",
            f"{config.where}.desc_act is {config.values.get('desc_act')!r} and {key} gives neighbouring inputs to different"
            " groups; llmc reads groups of neighbouring inputs.",
            hint="Use a checkpoint made with desc_act=false or with static groups.",
        )


class _Build:
    def __init__(self, scheme: Scheme, parts: tuple[str, ...], n: int, k: int, one_less: bool) -> None:
        self._scheme, self._parts, self._n, self._k = scheme, parts, n, k
        self._one_less = one_less

    def __call__(self, tensors: Tensors) -> QuantizedWeight:
        words, packed_zeros, scales = (tensors[part] for part in self._parts)
        bits = self._scheme.bits
        codes = np.ascontiguousarray(unpack(words, bits, 0, self._k).T)
        zeros = unpack(packed_zeros, bits, 1, self._n).T + np.uint8(self._one_less)
        if self._scheme.symmetric:
            middle = 1 << (bits - 1)
            if not (zeros == middle).all():
                raise LlmcError(
                    "quantization-config",
                    f"quantization_config.sym is true; {self._parts[1]} holds zero points from {zeros.min()} to"
                    f" {zeros.max()} instead of {middle}.",
                    hint="Set sym to false in config.json if the weights are asymmetric, or correct checkpoint_format"
                    " (gptq or gptq_v2).",
                )
            return QuantizedWeight(self._scheme, codes, floats(scales.T))
        return QuantizedWeight(self._scheme, codes, floats(scales.T), np.ascontiguousarray(zeros))
