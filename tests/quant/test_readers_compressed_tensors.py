"""compressed-tensors checkpoints give back exactly what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.quant.schemes import SCHEMES
from llmc.quant.weight import QuantizedWeight
from tests.quant.prequantized import (
    check,
    demo_tensors,
    library,
    linear_names,
    opened,
    orders,
    refused,
    rounded,
    write,
)


def ct_config(format_: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    base = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 64,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": {**base, **weights}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("scale", (torch.float16, torch.bfloat16))
def test_compressed_tensors_packed(symmetric: bool, scale: torch.dtype, tmp_path: Path) -> None:
    packing = library("compressed_tensors.compressors.pack_quantized.base")
    dequantize = library("compressed_tensors.quantization.lifecycle.forward").dequantize
    arguments = library("compressed_tensors.quantization").QuantizationArgs
    tensors, expected = demo_tensors(), {}
    for name in linear_names(tensors):
        prefix = name.removesuffix(".weight")
        weight = rounded(tensors.pop(name), SCHEMES["q4g64" if symmetric else "q4g64a"])
        scales = torch.from_numpy(weight.scales).to(scale)
        expected[name] = replace(weight, scales=scales.float().numpy())
        signed = torch.from_numpy(weight.codes.astype(np.int8) - 8)
        tensors[f"{prefix}.weight_packed"] = packing.pack_to_int32(signed, 4)
        tensors[f"{prefix}.weight_scale"] = scales
        tensors[f"{prefix}.weight_shape"] = torch.tensor(signed.shape)
        if weight.zeros is not None:
            zeros = torch.from_numpy(weight.zeros.astype(np.int8) - 8)
            tensors[f"{prefix}.weight_zero_point"] = packing.pack_to_int32(zeros, 4, packed_dim=0)
        theirs = dequantize(
            packing.unpack_from_int32(tensors[f"{prefix}.weight_packed"], 4, signed.shape),
            scales.float(),
            None if weight.zeros is None else zeros,
            args=arguments(num_bits=4, symmetric=symmetric, strategy="group", group_size=64),
        )
        np.testing.assert_array_equal(expected[name].dequantize(), theirs.numpy())
    check(write(tmp_path, tensors, ct_config("pack-quantized", {"symmetric": symmetric})), expected)


def test_compressed_tensors_actorder(tmp_path: Path) -> None:
    """weight_g_idx says which group, and so which scale, each input belongs to."""
    tensors, expected = demo_tensors(), {}
    for name in linear_names(tensors):
        prefix = name.removesuffix(".weight")
        weight = rounded(tensors.pop(name), SCHEMES["q8g64"])
        order = orders(weight.codes.shape[1], 64, 3)
        groups = torch.from_numpy(np.argsort(order) // 64)
        natural = torch.from_numpy(weight.codes[:, np.argsort(order)].astype(np.int16) - 128).char()
        want = expected[name] = replace(weight, order=order)
        scales = torch.from_numpy(weight.scales)
        np.testing.assert_array_equal(want.dequantize(), (natural.float() * scales[:, groups]).numpy())
        tensors |= {f"{prefix}.weight": natural, f"{prefix}.weight_scale": scales.half()}
        tensors[f"{prefix}.weight_g_idx"] = groups.int()
    config = ct_config("int-quantized", {"num_bits": 8, "actorder": "group"})
    check(write(tmp_path / "a", tensors, config), expected)
    # what the library writes for an order that it has not set
    natural = {k: torch.full_like(t, -1) if k.endswith("g_idx") else t for k, t in tensors.items()}
    weights = opened(write(tmp_path / "b", natural, config))
    assert weights.scheme_of("model.layers.0.mlp.up_proj.weight") == SCHEMES["q8g64"]


EIGHT = {"num_bits": 8, "strategy": "channel", "group_size": None}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def test_compressed_tensors_int8(tmp_path: Path) -> None:
    tensors, expected = demo_tensors(), {}
    for name in linear_names(tensors):
        weight = rounded(tensors[name], SCHEMES["w8a8"])
        scales = torch.from_numpy(weight.scales).bfloat16()
        expected[name] = QuantizedWeight(weight.scheme, weight.codes, scales.float().numpy())
        tensors[name] = torch.from_numpy((weight.codes.astype(np.int16) - 128).astype(np.int8))
        tensors[name.removesuffix("weight") + "weight_scale"] = scales
    check(write(tmp_path / "a", tensors, ct_config("int-quantized", EIGHT, TOKEN)), expected)
    assert opened(tmp_path / "a").scheme_of("model.layers.0.mlp.up_proj.weight") is SCHEMES["w8a8"]
    static = ct_config("int-quantized", EIGHT, {**TOKEN, "dynamic": False})
    refused(write(tmp_path / "b", tensors, static), "group_0.input_activations.dynamic", "False")
    block = ct_config("int-quantized", {**EIGHT, "strategy": "block"})
    refused(write(tmp_path / "c", tensors, block), "group_0.weights.strategy", "'block'")


@pytest.mark.parametrize("strategy", ("channel", "tensor"))
def test_compressed_tensors_fp8(strategy: str, tmp_path: Path) -> None:
    tensors, expected = demo_tensors(), {}
    for name in linear_names(tensors):
        weight = rounded(tensors[name], SCHEMES["fp8"])
        scales = torch.from_numpy(weight.scales)
        if strategy == "tensor":
            scales = scales.amax().reshape(1)
        spread = np.broadcast_to(scales.numpy(), weight.scales.shape)
        expected[name] = QuantizedWeight(weight.scheme, weight.codes, spread)
        tensors[name] = torch.from_numpy(weight.codes).view(torch.float8_e4m3fn)
        tensors[name.removesuffix("weight") + "weight_scale"] = scales
    weights = {**EIGHT, "type": "float", "strategy": strategy}
    check(write(tmp_path, tensors, ct_config("float-quantized", weights)), expected)
