"""Checkpoints of bitsandbytes: nf4, with or without quantized scales ("double quantization"), and int8."""

from __future__ import annotations

import json

import numpy as np

from llmc.errors import LlmcError
from llmc.frontend.tensor_files import TensorFiles
from llmc.quant.readers.base import Config, Entry, QuantizedFiles, Tensors, floats, prefixes, require
from llmc.quant.schemes import SCHEMES, Code, Scheme, stored_scheme
from llmc.quant.weight import NF4_TABLE, QuantizedWeight

_STATE = ".quant_state.bitsandbytes__"


def read_bitsandbytes(config: Config, files: TensorFiles) -> QuantizedFiles:
    """Layout of nf4: weight uint8 [N * K / 2, 1], the first of two values in the high half; weight.absmax per block of the
    flattened weight, float32 or uint8 indices into weight.nested_quant_map scaled by weight.nested_absmax; weight.quant_map
    (the 16 levels); weight.quant_state.bitsandbytes__nf4, JSON as bytes. Layout of int8: weight int8 [N, K] and SCB [N].

    Raises:
        LlmcError: fp4, or blocks that do not fit into rows.
    """
    if config.values.get("load_in_8bit"):
        return _read_int8(files)
    config.one_of("load_in_4bit", (True,), config.values.get("_load_in_4bit"))
    config.one_of("bnb_4bit_quant_type", ("nf4",), "fp4")
    entries, dropped = [], []
    for key in files.index():
        if _STATE not in key:
            continue
        name = key[: key.index(_STATE)]
        state = json.loads(files.read([key])[key].numpy().tobytes())
        shape, size = tuple(state["shape"]), int(state["blocksize"])
        if state.get("quant_type") != "nf4" or len(shape) != 2 or shape[1] % size:
            raise LlmcError(
                "quantization-config",
                f"{name} is stored as {state.get('quant_type')} with block size {size} and shape"
                f" {'×'.join(map(str, shape))}; llmc reads nf4 with blocks that divide the rows.",
                hint="Use the unquantized checkpoint with --quant nf4.",
            )
        nested = f"{name}.nested_absmax" in files.index()
        leaves = ("", ".absmax", ".quant_map") + ((".nested_absmax", ".nested_quant_map") if nested else ())
        parts = tuple(name + leaf for leaf in leaves)
        for part in parts:
            require(files, part)
        scheme = stored_scheme(Code.NF4, 4, size, scale_dtype="float32")
        entries.append(Entry(name, shape, scheme, parts, _Nf4(scheme, parts, shape, state)))
        dropped.append(key)
    # the float key is also that of the packed weight
    return QuantizedFiles(files, entries, dropped)


class _Nf4:
    def __init__(
        self, scheme: Scheme, parts: tuple[str, ...], shape: tuple[int, ...], state: dict[str, object]
    ) -> None:
        self._scheme, self._parts, self._shape, self._state = scheme, parts, shape, state

    def __call__(self, tensors: Tensors) -> QuantizedWeight:
        packed, absmax, levels, *nested = (tensors[part] for part in self._parts)
        if not np.array_equal(levels.float().numpy(), NF4_TABLE):
            raise LlmcError(
                "quantization-config",
                f"{self._parts[2]} holds other levels than those of nf4.",
                hint="Use the unquantized checkpoint with --quant nf4.",
            )
        raw = packed.numpy().reshape(-1)
        codes = np.stack([raw >> 4, raw & 15], axis=-1).reshape(self._shape)
        if nested:
            outer, table = floats(nested[0]), floats(nested[1])
            block = int(str(self._state["nested_blocksize"]))
            index = absmax.numpy().reshape(-1)
            spread = np.repeat(outer, block)[: len(index)]
            scales = table[index] * spread + np.float32(str(self._state["nested_offset"]))
        else:
            scales = floats(absmax)
        return QuantizedWeight(self._scheme, codes, scales.astype(np.float32).reshape(self._shape[0], -1))


def _read_int8(files: TensorFiles) -> QuantizedFiles:
    entries, dropped = [], []
    for prefix in prefixes(files, "SCB"):
        parts = (f"{prefix}.weight", f"{prefix}.SCB")
        shape = require(files, parts[0]).shape
        entries.append(Entry(parts[0], shape, SCHEMES["q8"], parts, _Int8(parts)))
        dropped.append(f"{prefix}.weight_format")
    return QuantizedFiles(files, entries, dropped)


class _Int8:
    def __init__(self, parts: tuple[str, str]) -> None:
        self._parts = parts

    def __call__(self, tensors: Tensors) -> QuantizedWeight:
        weight, largest = (tensors[part] for part in self._parts)
        codes = (weight.numpy().astype(np.int16) + 128).astype(np.uint8)
        scales = np.asarray(floats(largest) / np.float32(127), np.float32)
        return QuantizedWeight(SCHEMES["q8"], codes, scales[:, None])
