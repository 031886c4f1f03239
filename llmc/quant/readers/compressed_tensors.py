"""Checkpoints of compressed-tensors (llm-compressor, vLLM): packed integers, int8 and float8 weights."""

from __future__ import annotations

import fnmatch
import re

import numpy as np
import torch

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
from llmc.quant.readers.fp8 import spread_rows
from llmc.quant.schemes import Code, Scheme, stored_scheme
from llmc.quant.weight import QuantizedWeight

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_EXTRA = ("weight_shape", "weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point")


def read_compressed_tensors(config: Config, files: TensorFiles) -> QuantizedFiles:
    """Weights as ``(code - zero) * scale``.

    Layouts: pack-quantized weight_packed int32 [N, K * bits / 32], fields offset by 2**(bits-1); int-quantized weight int8
    [N, K]; float-quantized weight float8_e4m3fn [N, K]; weight_scale [N, G], or one value for the whole weight, or (of
    floats) one per block of rows and inputs;
    weight_zero_point int8 [N, G], packed along N if the weight is packed.

    Raises:
        LlmcError: an unsupported field: sparsity, cache quantization, integers with static activations or in blocks, groups of
            unequal sizes.
    """
    config.must_be_empty("sparsity_config")
    config.must_be_empty("kv_cache_scheme")
    config.must_be_empty("transform_config")
    default = config.one_of("format", (*_FORMATS, "mixed-precision"))
    groups = config.section("config_groups")
    found = [_Group(groups.section(name), default) for name in groups.values]
    entries, dropped = [], []
    for prefix in prefixes(files, "weight_scale"):
        group = found[0] if len(found) == 1 else _group_for(config, prefix, found)
        entries.append(_entry(config, files, prefix, group))
        dropped += [f"{prefix}.{leaf}" for leaf in _EXTRA]
    return QuantizedFiles(files, entries, dropped)


class _Group:
    """One of the config_groups, checked."""

    def __init__(self, config: Config, default_format: str) -> None:
        self.targets = config.values.get("targets") or []
        own = config.values.get("format") or default_format
        if own not in _FORMATS:
            raise config.refuse("format", own, " or ".join(_FORMATS))
        weights = config.section("weights")
        kind = weights.one_of("type", ("int", "float"))
        self.bits: int = weights.one_of("num_bits", (8,) if kind == "float" else (2, 3, 4, 6, 8))
        self.code = Code.E4M3 if kind == "float" else Code.INT
        self.symmetric: bool = weights.one_of("symmetric", (True, False) if kind == "int" else (True,), True)
        strategies = ("tensor", "channel", "group", *(("block",) if kind == "float" else ()))
        strategy = weights.one_of("strategy", strategies)
        self.size = weights.group_size() if strategy == "group" else 0
        self.rows = 1  # that share scales
        if strategy == "block":
            found = weights.values.get("block_structure")
            if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int for n in found):
                raise weights.refuse("block_structure", found, "two numbers")
            self.rows, self.size = found
        # "group" and "dynamic" come with weight_g_idx; the others keep groups of neighbours
        weights.one_of("actorder", (None, "weight", "static", "group", "dynamic"))
        self.activation_bits = 0
        if config.values.get("input_activations"):
            inputs = config.section("input_activations")
            # scales that are known before are not used for floats: llmc rounds these by their own magnitudes, or not at all
            inputs.one_of("dynamic", (True,) if kind == "int" else (True, False, "local"))
            inputs.one_of("type", (kind,))
            inputs.one_of("num_bits", (8,))
            self.activation_bits = 8
            if kind == "int":
                # both are what llmc does with 8-bit activations
                inputs.one_of("strategy", ("token",))
                inputs.one_of("symmetric", (True,), True)
        if config.values.get("output_activations"):
            raise config.refuse("output_activations", config.values["output_activations"], "null")

    def matches(self, prefix: str) -> bool:
        """Whether a target names this module: a class, a name, or a regular expression after ``re:``."""
        for target in self.targets:
            if target == "Linear" or fnmatch.fnmatchcase(prefix, target):
                return True
            if target.startswith("re:") and re.match(target[3:], prefix):
                return True
        return False


def _group_for(config: Config, prefix: str, groups: list[_Group]) -> _Group:
    for group in groups:
        if group.matches(prefix):
            return group
    raise config.refuse("config_groups", sorted(config.values["config_groups"]), f"one that matches {prefix}")


def _entry(config: Config, files: TensorFiles, prefix: str, group: _Group) -> Entry:
    index = files.index()
    packed = f"{prefix}.weight_packed" in index
    weight = require(files, f"{prefix}.weight_packed" if packed else f"{prefix}.weight")
    n = weight.shape[0]
    if packed:
        key = f"{prefix}.weight_shape"
        require(files, key)
        k = int(files.read([key])[key][1])
    else:
        k = weight.shape[1]
    scale = require(files, f"{prefix}.weight_scale")
    parts = [weight.key, scale.key]
    if not group.symmetric:
        parts.append(require(files, f"{prefix}.weight_zero_point").key)
    order = None
    groups = f"{prefix}.weight_g_idx"
    if group.size and groups in index:
        try:
            order = order_of(files.read([groups])[groups], group.size)
        except ValueError:
            raise config.refuse(groups, "groups of unequal sizes", "groups of equal sizes") from None
    if group.code is Code.E4M3:
        scheme = stored_scheme(
            Code.E4M3,
            8,
            group.size if group.size < k else 0,
            scale_dtype="float32",
            activation_bits=group.activation_bits,
            order=digest(order),
        )
    else:
        scheme = integer_scheme(
            group.bits,
            group.size if group.size < k else 0,
            group.symmetric,
            # rows have few scales: the named schemes keep them in float32
            scale_dtype_of(scale) if group.size else "float32",
            group.activation_bits,
            digest(order),
        )
    build = _Build(scheme, tuple(parts), (n, k), packed, order, group.rows)
    return Entry(f"{prefix}.weight", (n, k), scheme, tuple(parts), build)


class _Build:
    def __init__(
        self,
        scheme: Scheme,
        parts: tuple[str, ...],
        shape: tuple[int, int],
        packed: bool,
        order: np.ndarray | None,
        rows: int,
    ) -> None:
        self._scheme, self._parts, self._shape, self._packed = scheme, parts, shape, packed
        self._order, self._rows = order, rows

    def __call__(self, tensors: Tensors) -> QuantizedWeight:
        n, k = self._shape
        weight, scale = (tensors[part] for part in self._parts[:2])
        scales = floats(scale)
        if scales.size == 1:
            scales = np.full((n, 1), scales.reshape(-1)[0])
        else:
            scales = spread_rows(scales.reshape(-(-n // self._rows), -1), self._rows, n)
        zeros = None
        middle = 1 << (self._scheme.bits - 1)
        if len(self._parts) == 3:
            stored = tensors[self._parts[2]]
            if stored.dtype == torch.int32:
                zeros = unpack(stored, self._scheme.bits, 0, n)
            else:
                zeros = (stored.numpy().astype(np.int16).reshape(n, -1) + middle).astype(np.uint8)
        if self._scheme.code is Code.E4M3:
            codes = weight.contiguous().view(torch.uint8).numpy()
        elif self._packed:
            codes = unpack(weight, self._scheme.bits, 1, k)
        else:
            codes = (weight.numpy().astype(np.int16) + middle).astype(np.uint8)
        if self._order is not None:
            codes = codes[:, self._order]
        return QuantizedWeight(self._scheme, np.ascontiguousarray(codes), scales, zeros, order=self._order)
