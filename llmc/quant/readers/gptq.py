"""Checkpoints of AutoGPTQ and GPTQModel: qweight, qzeros, scales, g_idx."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from llmc.errors import LlmcError
from llmc.frontend.tensor_files import TensorFiles
from llmc.quant.readers.base import (
    Config,
    Entry,
    QuantizedFiles,
    Tensors,
    digest,
    floats,
    integer_scheme,
    order_of,
    prefixes,
    require,
    scale_dtype_of,
    unpack,
)
from llmc.quant.schemes import Scheme
from llmc.quant.weight import QuantizedWeight

# what a rule of `dynamic` may not change, because it changes how words are read
_FIXED = ("format", "checkpoint_format", "pack_dtype", "quant_method", "method")


def read_gptq(config: Config, files: TensorFiles) -> QuantizedFiles:
    """Weights as ``(code - zero) * scale``; in format version 1 the stored zero points are one less than the real ones.

    Layout: qweight int32 [K * bits / 32, N] packed along K, qzeros int32 [G, N * bits / 32], scales [G, N], g_idx [K],
    the group of each input (desc_act spreads a group over all inputs). GPTQModel's `dynamic` has other bits and groups
    for some modules: the first rule whose regular expression matches a module's name counts.

    Raises:
        LlmcError: an unsupported field; groups of unequal sizes.
    """
    config.one_of("pack_dtype", ("int32",), "int32")
    # GPTQModel calls the field `format`
    name = "checkpoint_format" if "checkpoint_format" in config.values else "format"
    one_less = config.one_of(name, ("gptq", "gptq_v2"), "gptq") == "gptq"
    config.one_of("bits", (2, 3, 4, 8))
    config.group_size()
    entries, dropped = [], []
    for prefix in prefixes(files, "qweight"):
        own = _for_module(config, prefix)
        bits = own.one_of("bits", (2, 3, 4, 8))
        size = own.group_size()
        symmetric = own.one_of("sym", (True, False), True)
        parts = tuple(f"{prefix}.{leaf}" for leaf in ("qweight", "qzeros", "scales"))
        words, _, scales = (require(files, part) for part in parts)
        n, k = words.shape[1], words.shape[0] * 32 // bits
        order = _order(own, files, f"{prefix}.g_idx", size or k)
        # symmetric ones keep their zero points too: some writers round them
        scheme = integer_scheme(
            bits, size if size < k else 0, symmetric, scale_dtype_of(scales), order=digest(order)
        )
        build = _Build(scheme, parts, n, k, one_less, order)
        entries.append(Entry(f"{prefix}.weight", (n, k), scheme, parts, build))
        dropped.append(f"{prefix}.g_idx")
    return QuantizedFiles(files, entries, dropped)


def _for_module(config: Config, module: str) -> Config:
    """The configuration with the rule of `dynamic` for a module applied."""
    rules = config.values.get("dynamic") or {}
    if not isinstance(rules, Mapping):
        raise config.refuse("dynamic", rules, "a mapping of rules")
    for pattern, changes in rules.items():
        # "-:" excludes modules from quantization; such modules have no qweight
        if pattern.startswith("-:") or not re.match(pattern.removeprefix("+:"), module):
            continue
        for field in _FIXED:
            if field in changes:
                raise config.refuse(f"dynamic[{pattern!r}].{field}", changes[field], f"rules without {field}")
        return Config({**config.values, **changes}, f"{config.where}.dynamic[{pattern!r}]")
    return config


def _order(config: Config, files: TensorFiles, key: str, size: int) -> np.ndarray | None:
    if key not in files.index():
        return None
    try:
        return order_of(files.read([key])[key], size)
    except ValueError:
        raise LlmcError(
            "quantization-config",
            f"{config.where}.group_size is {size} and {key} has groups of other sizes; llmc reads groups of equal sizes.",
            hint="Use the unquantized checkpoint and llmc's own --quant, or another quantized one.",
        ) from None


class _Build:
    def __init__(
        self,
        scheme: Scheme,
        parts: tuple[str, ...],
        n: int,
        k: int,
        one_less: bool,
        order: np.ndarray | None,
    ) -> None:
        self._scheme, self._parts, self._n, self._k = scheme, parts, n, k
        self._one_less, self._order = one_less, order

    def __call__(self, tensors: Tensors) -> QuantizedWeight:
        words, packed_zeros, scales = (tensors[part] for part in self._parts)
        bits = self._scheme.bits
        codes = unpack(words, bits, 0, self._k).T
        codes = np.ascontiguousarray(codes if self._order is None else codes[:, self._order])
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
            return QuantizedWeight(self._scheme, codes, floats(scales.T), order=self._order)
        zeros = np.ascontiguousarray(zeros)
        return QuantizedWeight(self._scheme, codes, floats(scales.T), zeros, order=self._order)
