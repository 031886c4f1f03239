"""Checkpoints of AutoAWQ ("gemm" layout): int32 words with interleaved columns."""

from __future__ import annotations

import numpy as np

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

# field i of a word holds the output ORDER[i] of its eight
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_awq(config: Config, files: TensorFiles) -> QuantizedFiles:
    """Weights as ``(code - zero) * scale``.

    Layout: qweight int32 [K, N / 8], qzeros int32 [G, N / 8], both packed along N; scales [G, N].
    """
    config.one_of("bits", (4,), config.values.get("w_bit", 4))
    size = config.group_size("group_size" if "group_size" in config.values else "q_group_size")
    config.one_of("version", ("gemm", "GEMM"), config.values.get("format", "gemm"))
    config.one_of("zero_point", (True,), True)
    entries = []
    for prefix in prefixes(files, "qweight"):
        parts = tuple(f"{prefix}.{leaf}" for leaf in ("qweight", "qzeros", "scales"))
        words, _, scales = (require(files, part) for part in parts)
        k, n = words.shape[0], words.shape[1] * 8
        scheme = integer_scheme(4, size if size < k else 0, False, scale_dtype_of(scales))
        entries.append(Entry(f"{prefix}.weight", (n, k), scheme, parts, _Build(scheme, parts, n)))
    return QuantizedFiles(files, entries)


class _Build:
    def __init__(self, scheme: Scheme, parts: tuple[str, ...], n: int) -> None:
        self._scheme, self._parts = scheme, parts
        place = np.argsort(ORDER)
        self._columns = (np.arange(n).reshape(-1, 8)[:, :1] + place[None]).reshape(-1)

    def __call__(self, tensors: Tensors) -> QuantizedWeight:
        words, packed_zeros, scales = (tensors[part] for part in self._parts)
        n = len(self._columns)
        codes = unpack(words, 4, 1, n)[:, self._columns].T
        zeros = unpack(packed_zeros, 4, 1, n)[:, self._columns].T
        return QuantizedWeight(
            self._scheme, np.ascontiguousarray(codes), floats(scales.T), np.ascontiguousarray(zeros)
        )
