"""Quantized checkpoints are read exactly as they are stored."""

from __future__ import annotations

import json
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
from llmc.reference import reference_logits
from tests.frontend.tiny import save, tiny_model
from tests.quant.prequantized import (
    demo_tensors,
    library,
    library_file,
    linear_names,
    pack_fields,
    rounded,
    write,
)

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


@pytest.mark.parametrize("scheme", ("q4g64", "q4g64a", "q8g32", "q3g64", "q3g32a", "q8g64a"))
@pytest.mark.parametrize("version", ("gptq", "gptq_v2"))
def test_gptq(scheme: str, version: str, tmp_path: Path) -> None:
    check(tmp_path, write_gptq(tmp_path, SCHEMES[scheme], version=version))


def test_gptq_refuses(tmp_path: Path) -> None:
    scheme = SCHEMES["q4g64"]
    for field, value in (
        ("bits", 5),
        ("group_size", 33),
        ("dynamic", ["x"]),
        ("checkpoint_format", "marlin"),
    ):
        write_gptq(tmp_path / field, scheme, version="gptq", **{field: value})
        refused(tmp_path / field, "quantization_config", field, repr(value))
    write_gptq(tmp_path / "v", scheme, version="gptq_v2", checkpoint_format="gptq")
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(LlmcError, match="checkpoint_format"):
        opened(tmp_path / "v").quantized(name)


def test_gptq_act_order(tmp_path: Path) -> None:
    """Groups of scattered inputs: codes are put in the order of the groups, values come out in that of the model."""
    scheme = SCHEMES["q4g64a"]
    check(tmp_path / "a", write_gptq(tmp_path / "a", scheme, version="gptq", desc_act=True))
    expected = write_gptq(tmp_path / "b", scheme, version="gptq_v2", desc_act=True, reorder=True)
    check(tmp_path / "b", expected)
    weights, dense = opened(tmp_path / "b"), demo_tensors()
    for name in expected:
        got = weights.quantized(name)
        assert got is not None and got.order is not None
        np.testing.assert_array_equal(got.order, expected[name].order)
        # natural order: near to the source's weights
        assert float((weights.load(name) - dense[name].float()).abs().mean()) < 0.1 * float(
            dense[name].abs().mean()
        )
    layer = "model.layers.0."
    q, k, o = (weights.scheme_of(f"{layer}self_attn.{p}_proj.weight") for p in "qko")
    assert q == k and q is not None and o is not None and q != o and q.any_order == o.any_order
    tensors = load_file(tmp_path / "b/model.safetensors")
    key = f"{layer}mlp.up_proj.g_idx"
    tensors[key][0] = 1 - tensors[key][0].clamp(max=1)
    save_file(tensors, tmp_path / "b/model.safetensors")
    refused(tmp_path / "b", "group_size", key)


def test_gptq_dynamic(tmp_path: Path) -> None:
    """GPTQModel's rules for modules: the first that matches counts."""
    rules = {
        r"-:.*\.lm_head": {},
        r".*\.down_proj": {"bits": 8, "group_size": 32},
        r"+:.*\.mlp\..*": {"bits": 8, "sym": False},
        r".*\.up_proj": {"bits": 3},
    }
    others = {"down_proj": SCHEMES["q8g32"], "up_proj": SCHEMES["q8g64a"], "gate_proj": SCHEMES["q8g64a"]}
    expected = write_gptq(tmp_path / "a", SCHEMES["q4g64"], version="gptq_v2", others=others, dynamic=rules)
    check(tmp_path / "a", expected)
    assert {w.scheme.name for w in expected.values()} == {"q4g64", "q8g32", "q8g64a"}
    bad = {".*": {"format": "marlin"}}
    write_gptq(tmp_path / "b", SCHEMES["q4g64"], version="gptq_v2", dynamic=bad)
    refused(tmp_path / "b", "dynamic['.*'].format", "marlin")


def test_awq(tmp_path: Path) -> None:
    scheme = SCHEMES["q4g64a"]
    tensors, expected = demo_tensors(), {}
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(codes: np.ndarray) -> torch.Tensor:
        words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
        for i, column in enumerate(order):
            words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * i)
        return torch.from_numpy(words.view(np.int32))

    for name in linear_names(tensors):
        prefix = name.removesuffix(".weight")
        weight = expected[name] = rounded(tensors.pop(name), scheme)
        assert weight.zeros is not None
        tensors[f"{prefix}.qweight"] = interleaved(weight.codes.T)
        tensors[f"{prefix}.qzeros"] = interleaved(weight.zeros.T)
        tensors[f"{prefix}.scales"] = torch.from_numpy(weight.scales.T.copy()).half()
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    check(write(tmp_path / "a", tensors, config), expected)
    refused(write(tmp_path / "b", tensors, {**config, "version": "gemv"}), "version", "'gemv'")
    refused(write(tmp_path / "c", tensors, {**config, "bits": 3}), "bits", "3")


def test_awq_of_the_library(tmp_path: Path) -> None:
    """Random words, as AutoAWQ's own dequantization reads them (in float16)."""
    packing = library_file("awq/utils/packing_utils.py")
    tensors, expected = demo_tensors(), {}
    rng = torch.Generator().manual_seed(0)
    for name in linear_names(tensors):
        outputs, inputs = tensors.pop(name).shape
        words, groups = outputs // 8, inputs // 64

        def random_words(rows: int, words: int = words) -> torch.Tensor:
            return torch.randint(-(2**31), 2**31, (rows, words), generator=rng).to(torch.int32)

        parts = random_words(inputs), random_words(groups), torch.rand(groups, outputs, generator=rng).half()
        for field, value in zip(("qweight", "qzeros", "scales"), parts, strict=True):
            tensors[f"{name.removesuffix('.weight')}.{field}"] = value
        expected[name] = packing.dequantize_gemm(*parts, 4, 64).T
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    source = open_model(str(write(tmp_path, tensors, config)), dtype=None)
    assert source.weights is not None
    for name, want in expected.items():
        np.testing.assert_array_equal(source.weights.load(name).half().numpy(), want.numpy(), name)


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


def test_experts_stored_one_by_one(tmp_path: Path) -> None:
    """Codes and scales are put together as transformers puts the weights together."""
    model = tiny_model("mixtral")
    folder = save(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    scheme = SCHEMES["q4g32a"]
    for name in [k for k in tensors if ".experts." in k]:
        prefix = name.removesuffix(".weight")
        weight = rounded(tensors.pop(name), scheme)
        assert weight.zeros is not None
        tensors[f"{prefix}.qweight"] = pack_fields(weight.codes.T, 4, 0)
        tensors[f"{prefix}.qzeros"] = pack_fields(weight.zeros.T, 4, 1)
        tensors[f"{prefix}.scales"] = torch.from_numpy(weight.scales.T.copy()).half()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        **GPTQ_CONFIG,
        "group_size": 32,
        "sym": False,
        "checkpoint_format": "gptq_v2",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = opened(folder)
    for name in weights.names():
        if ".experts." in name:
            got = weights.quantized(name)
            assert got is not None and got.codes.ndim == 3
            np.testing.assert_array_equal(got.dequantize(), weights.load(name).numpy())


def test_unknown_methods_are_refused(tmp_path: Path) -> None:
    tensors = demo_tensors()
    refused(
        write(tmp_path / "a", tensors, {"quant_method": "hqq"}), "quantization_config.quant_method", "'hqq'"
    )
    refused(write(tmp_path / "b", tensors, {}), "quantization_config.quant_method", "None")


def test_models_of_conv1d(tmp_path: Path) -> None:
    """GPT-2 keeps its weights as [in, out]; checkpoints store them as those of other models."""
    model = tiny_model("gpt2")
    folder = save(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    scheme, expected = SCHEMES["q4g32"], {}
    for name in [k for k in tensors if k.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]:
        prefix = name.removesuffix(".weight")
        weight = expected[name] = rounded(tensors.pop(name).T, scheme)
        tensors[f"{prefix}.qweight"] = pack_fields(weight.codes.T, 4, 0)
        zeros = np.full(weight.scales.shape[::-1], 8, np.uint8)
        tensors[f"{prefix}.qzeros"] = pack_fields(zeros, 4, 1)
        tensors[f"{prefix}.scales"] = torch.from_numpy(weight.scales.T.copy()).half()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**GPTQ_CONFIG, "group_size": 32, "checkpoint_format": "gptq_v2"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = opened(folder)
    assert len(expected) >= 8
    for name in weights.names():
        want = next((w for key, w in expected.items() if name.endswith(key)), None)
        got = weights.quantized(name)
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            np.testing.assert_array_equal(got.codes, want.codes)
            np.testing.assert_array_equal(weights.load(name).numpy(), want.dequantize().T)
