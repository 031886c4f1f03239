"""Writes checkpoints as the quantization libraries do, out of one layer of the demo model, and checks what is read."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.quant.readers.source import QuantizedCheckpoint
from llmc.quant.rtn import quantize
from llmc.quant.schemes import SCHEMES, Scheme, by_name
from llmc.quant.weight import NF4_TABLE, QuantizedWeight

DEMO = Path(__file__).resolve().parents[2] / "examples/models/stdlib-llama"
LAYERS = 1


def demo_tensors() -> dict[str, torch.Tensor]:
    """The demo model cut to its first layer."""
    tensors = load_file(DEMO / "model.safetensors")
    return {k: v for k, v in tensors.items() if ".layers." not in k or ".layers.0." in k}


def linear_names(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [k for k in tensors if k.endswith("_proj.weight")]


def write(
    folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None, **config: Any
) -> Path:
    """A checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads((DEMO / "config.json").read_text())
    values.update(num_hidden_layers=LAYERS, **config)
    if quantization is not None:
        values["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(values))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def rounded(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    return quantize(weight.float().numpy(), scheme)


def pack_fields(codes: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """uint8 codes to int32 words, lowest field first, bit by bit along `axis`."""
    moved = np.moveaxis(codes, axis, -1)
    stream = ((moved[..., None] >> np.arange(bits)) & 1).astype(np.uint8)
    stream = stream.reshape(*moved.shape[:-1], -1)
    words = np.packbits(stream, axis=-1, bitorder="little").view("<i4")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def library(name: str) -> Any:
    """A format's own library, from this Python or from the folder LLMC_TEST_LIBS (pip install --target); else skip."""
    folder = os.environ.get("LLMC_TEST_LIBS")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    return pytest.importorskip(name, reason=f"{name} is not installed")


def library_file(path: str) -> Any:
    """One module of a library by its file, in LLMC_TEST_LIBS, for packages that do not import on a machine without a GPU."""
    file = Path(os.environ.get("LLMC_TEST_LIBS", "")) / path
    if not file.is_file():
        pytest.skip(f"{path} is not installed")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Expected = dict[str, QuantizedWeight]


def opened(folder: Path) -> QuantizedCheckpoint:
    weights = open_model(str(folder), dtype=None).weights
    assert isinstance(weights, QuantizedCheckpoint)
    return weights


def check(folder: Path, expected: Expected) -> None:
    """Codes, scales and zeros as written; everything else as it was; the model runs."""
    weights = opened(folder)
    for name, want in expected.items():
        got = weights.quantized(name)
        assert got is not None
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_array_equal(got.scales, want.scales)
        if want.zeros is None:
            assert got.zeros is None
        else:
            np.testing.assert_array_equal(got.zeros, want.zeros)
        assert weights.scheme_of(name) == got.scheme
        np.testing.assert_array_equal(weights.load(name).numpy(), want.dequantize())
    for name, tensor in demo_tensors().items():
        if name not in expected:
            assert weights.quantized(name) is None
            assert torch.equal(weights.load(name), tensor)
    assert weights.unused == ()


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(LlmcError) as caught:
        open_model(str(folder), dtype=None)
    for part in parts:
        assert part in str(caught.value)


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}


def orders(k: int, size: int, seed: int) -> np.ndarray:
    """A random order of inputs, ascending inside of each group."""
    order = np.random.default_rng(seed).permutation(k).astype(np.int32)
    return np.concatenate([np.sort(part) for part in np.split(order, range(size, k, size))])


def write_gptq(
    folder: Path,
    scheme: Scheme,
    *,
    version: str,
    reorder: bool = False,
    others: dict[str, Scheme] | None = None,
    **config: Any,
) -> Expected:
    """`reorder`: groups of inputs that are no neighbours; `others`: schemes of some modules, by the end of their names."""
    tensors, expected = demo_tensors(), {}
    default = scheme
    for name in linear_names(tensors):
        prefix = name.removesuffix(".weight")
        scheme = next((s for end, s in (others or {}).items() if prefix.endswith(end)), default)
        dense = tensors.pop(name)
        k = dense.shape[1]
        size = scheme.group_size or k
        order = np.arange(k, dtype=np.int32)
        if reorder:  # projections of one input have one order
            order = orders(
                k,
                size,
                1 if "_proj" in name and not name.endswith(("o_proj.weight", "down_proj.weight")) else 2,
            )
        weight = rounded(dense[:, torch.from_numpy(order).long()], scheme)
        zeros = weight.zeros
        if zeros is None:
            zeros = np.full(weight.scales.shape, 1 << (scheme.bits - 1), np.uint8)
        else:
            zeros = np.maximum(zeros, 1)  # version 1 cannot say 0
            weight = replace(weight, zeros=zeros)
        expected[name] = replace(weight, order=order) if reorder else weight
        back = np.argsort(order)
        tensors[f"{prefix}.qweight"] = pack_fields(weight.codes[:, back].T, scheme.bits, 0)
        tensors[f"{prefix}.qzeros"] = pack_fields((zeros - (version == "gptq")).T, scheme.bits, 1)
        tensors[f"{prefix}.scales"] = torch.from_numpy(weight.scales.T.copy()).half()
        tensors[f"{prefix}.g_idx"] = torch.from_numpy(back // size).int()
    values = {
        **GPTQ_CONFIG,
        "bits": default.bits,
        "group_size": default.group_size or -1,
        "sym": default.symmetric,
    }
    write(folder, tensors, {**values, "checkpoint_format": version, **config})
    return expected


def dynamic_map() -> torch.Tensor:
    """256 increasing levels in [-1, 1], as double quantization uses them."""
    levels = np.sign(np.arange(-128, 128)) * np.linspace(-1, 1, 256) ** 2
    return torch.from_numpy(levels.astype(np.float32))


NF4_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def write_nf4(folder: Path, nested: bool, **config: Any) -> Expected:
    tensors, expected = demo_tensors(), {}
    for name in linear_names(tensors):
        weight = rounded(tensors[name], SCHEMES["nf4"])
        codes, scales = weight.codes.reshape(-1), weight.scales.reshape(-1)
        tensors[name] = torch.from_numpy((codes[::2] << 4) | codes[1::2])[:, None]
        tensors[f"{name}.quant_map"] = torch.from_numpy(NF4_TABLE.copy())
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
        state["shape"] = list(weight.codes.shape)
        if nested:
            table, offset = dynamic_map().numpy(), np.float32(scales.mean())
            centred = scales - offset
            outer = np.array(
                [np.abs(c).max() for c in np.split(centred, range(256, len(centred), 256))], np.float32
            )
            spread = np.repeat(outer, 256)[: len(scales)]
            index = np.abs(table[None] - (centred / spread)[:, None]).argmin(1).astype(np.uint8)
            scales = table[index] * spread + offset
            tensors[f"{name}.absmax"] = torch.from_numpy(index)
            tensors[f"{name}.nested_absmax"] = torch.from_numpy(outer)
            tensors[f"{name}.nested_quant_map"] = dynamic_map()
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        else:
            tensors[f"{name}.absmax"] = torch.from_numpy(scales.copy())
        data = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = data
        scales = scales.reshape(weight.scales.shape)
        expected[name] = QuantizedWeight(by_name("nf4f"), weight.codes, scales)
    write(folder, tensors, {**NF4_CONFIG, **config})
    return expected
