"""bitsandbytes and MXFP4 checkpoints give back exactly what was written; unknown methods are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmc.frontend.checkpoint import open_model
from llmc.quant.readers.source import QuantizedCheckpoint
from llmc.quant.rtn import quantize
from llmc.quant.schemes import SCHEMES
from llmc.quant.weight import QuantizedWeight
from llmc.reference import reference_logits
from tests.frontend.tiny import save, tiny_model
from tests.quant.prequantized import (
    NF4_CONFIG,
    check,
    demo_tensors,
    library,
    linear_names,
    refused,
    write,
    write_nf4,
)


@pytest.mark.parametrize("nested", (False, True))
def test_bitsandbytes_nf4(nested: bool, tmp_path: Path) -> None:
    check(tmp_path / "a", write_nf4(tmp_path / "a", nested))
    write_nf4(tmp_path / "b", nested, bnb_4bit_quant_type="fp4")
    refused(tmp_path / "b", "bnb_4bit_quant_type", "fp4")


@pytest.mark.parametrize("nested", (False, True))
def test_bitsandbytes_nf4_of_the_library(nested: bool, tmp_path: Path) -> None:
    """Weights that bitsandbytes itself quantized, and its own dequantization of them."""
    functional = library("bitsandbytes.functional")
    tensors, expected = demo_tensors(), {}
    for name in linear_names(tensors):
        dense = tensors[name].float()
        codes, state = functional.quantize_4bit(
            dense, blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        expected[name] = functional.dequantize_4bit(codes, state)
        tensors[name] = codes
        tensors.update({f"{name}.{field}": value for field, value in state.as_dict(packed=True).items()})
    source = open_model(str(write(tmp_path, tensors, NF4_CONFIG)), dtype=None)
    assert source.weights is not None
    for name, want in expected.items():
        np.testing.assert_array_equal(source.weights.load(name).numpy(), want.numpy(), name)


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    tensors, expected = demo_tensors(), {}
    for name in linear_names(tensors):
        dense = tensors[name].float()
        largest = dense.abs().amax(dim=1)
        tensors[name] = torch.round(dense / largest[:, None] * 127).to(torch.int8)
        tensors[name.removesuffix("weight") + "SCB"] = largest
        codes = (tensors[name].numpy().astype(np.int16) + 128).astype(np.uint8)
        expected[name] = QuantizedWeight(SCHEMES["q8"], codes, (largest / 127)[:, None].numpy())
    check(write(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}), expected)


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    """Experts in blocks; the whole model computes what transformers computes with the dequantized weights."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    folder = save(model, tmp_path / "plain")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = {}
    for name in [k for k in state if k.endswith(("gate_up_proj", "down_proj"))]:
        weight = expected[name] = quantize(
            state[name].float().transpose(1, 2).contiguous().numpy(), SCHEMES["mxfp4"]
        )
        e, n, k = weight.codes.shape
        blocks = (weight.codes[..., ::2] | (weight.codes[..., 1::2] << 4)).reshape(e, n, k // 32, 16)
        exponents = np.where(weight.scales > 0, np.log2(np.maximum(weight.scales, 1e-38)) + 127, 0)
        state[f"{name}_blocks"] = torch.from_numpy(blocks)
        state[f"{name}_scales"] = torch.from_numpy(exponents.astype(np.uint8))
        theirs = convert_moe_packed_tensors(
            state[f"{name}_blocks"], state[f"{name}_scales"], dtype=torch.float32
        )
        model.state_dict()[name].copy_(theirs)
        del state[name]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    source = open_model(str(folder), dtype=None)
    weights = source.weights
    assert isinstance(weights, QuantizedCheckpoint)
    for name, want in expected.items():
        got = weights.quantized(name)
        assert got is not None and got.scheme is SCHEMES["mxfp4"]
        np.testing.assert_array_equal(got.dequantize(), want.dequantize())
        np.testing.assert_array_equal(weights.load(name).numpy(), want.dequantize().transpose(0, 2, 1))
    model.save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        theirs = dense(torch.tensor([[1, 2, 3, 4]])).logits[0].numpy()
    np.testing.assert_array_equal(reference_logits(source, [1, 2, 3, 4], "float32").logits, theirs)


def test_unknown_methods_are_refused(tmp_path: Path) -> None:
    tensors = demo_tensors()
    refused(
        write(tmp_path / "a", tensors, {"quant_method": "hqq"}), "quantization_config.quant_method", "'hqq'"
    )
    refused(write(tmp_path / "b", tensors, {}), "quantization_config.quant_method", "None")
