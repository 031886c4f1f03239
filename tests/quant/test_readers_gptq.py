"""GPTQ and AWQ checkpoints, written bit by bit, give back exactly what was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.quant.schemes import SCHEMES
from tests.frontend.tiny import save, tiny_model
from tests.quant.prequantized import (
    GPTQ_CONFIG,
    check,
    demo_tensors,
    library_file,
    linear_names,
    opened,
    pack_fields,
    refused,
    rounded,
    write,
    write_gptq,
)


@pytest.mark.parametrize("scheme", ("q4g64", "q4g64a", "q8g32", "q3g64", "q3g32a", "q8g64a"))
@pytest.mark.parametrize("version", ("gptq", "gptq_v2"))
def test_gptq(scheme: str, version: str, tmp_path: Path) -> None:
    check(tmp_path, write_gptq(tmp_path, SCHEMES[scheme], version=version))


@pytest.mark.parametrize(
    ("scheme", "reorder"), [("q4g64a", False), ("q4g64", True), ("q3g64", False), ("q8g32a", True)]
)
def test_gptq_of_the_library(scheme: str, reorder: bool, tmp_path: Path) -> None:
    """A checkpoint as AutoGPTQ's own layer reads it (in float16: rows of the identity are exact)."""
    layer = library_file("auto_gptq/nn_modules/qlinear/qlinear_cuda.py").QuantLinear
    expected = write_gptq(tmp_path, SCHEMES[scheme], version="gptq", reorder=reorder)
    tensors = load_file(tmp_path / "model.safetensors")
    source = open_model(str(tmp_path), dtype=None)
    assert source.weights is not None
    for name, weight in expected.items():
        outputs, inputs = weight.codes.shape
        theirs = layer(weight.scheme.bits, weight.scheme.group_size, inputs, outputs, False)
        parts = ("qweight", "qzeros", "scales", "g_idx")
        theirs.load_state_dict({part: tensors[f"{name.removesuffix('.weight')}.{part}"] for part in parts})
        want = theirs(torch.eye(inputs).half()).T
        np.testing.assert_array_equal(source.weights.load(name).half().numpy(), want.detach().numpy(), name)


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
