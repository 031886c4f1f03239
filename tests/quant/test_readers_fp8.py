"""Checkpoints in e4m3 with scales per block, row or tensor give back exactly what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.passes.quantize_weights import QuantizeWeights
from llmc.passes.step_module import PackedParam
from llmc.pipeline.notes import unrounded_note
from llmc.quant.schemes import SCHEMES, QuantRules, by_name
from llmc.quant.stored import stored_schemes
from llmc.quant.weight import QuantizedWeight
from tests.quant.prequantized import (
    Expected,
    check,
    demo_tensors,
    linear_names,
    opened,
    refused,
    rounded,
    write,
)

BLOCK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
UP = "model.layers.0.mlp.up_proj.weight"


def checkpoint(suffix: str, rows: int, columns: int) -> tuple[dict[str, torch.Tensor], Expected]:
    """Tensors and weights with a scale per block of rows and columns; 0 = all of them."""
    tensors, expected = demo_tensors(), {}
    for name in linear_names(tensors):
        n, k = tensors[name].shape
        r, c = rows or n, columns or k
        weight = rounded(tensors[name], SCHEMES["fp8"])
        blocks = np.random.default_rng(0).uniform(1e-4, 1e-2, (-(-n // r), -(-k // c))).astype(np.float32)
        scheme = SCHEMES["fp8a8g128"] if columns and k > columns else SCHEMES["fp8a8"]
        expected[name] = QuantizedWeight(scheme, weight.codes, np.repeat(blocks, r, axis=0)[:n])
        spread = np.repeat(np.repeat(blocks, r, axis=0)[:n], c, axis=1)[:, :k]
        np.testing.assert_array_equal(
            expected[name].dequantize(),
            torch.from_numpy(weight.codes).view(torch.float8_e4m3fn).float().numpy() * spread,
        )
        tensors[name] = torch.from_numpy(weight.codes).view(torch.float8_e4m3fn)
        tensors[name.removesuffix("weight") + suffix] = torch.from_numpy(
            blocks if rows or columns else blocks.reshape(())
        )
    return tensors, expected


@pytest.mark.parametrize(
    ("suffix", "rows", "columns", "config"),
    [
        ("weight_scale_inv", 128, 128, BLOCK),
        ("weight_scale", 1, 0, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
        ("weight_scale", 0, 0, {"quant_method": "fp8", "activation_scheme": "static"}),
    ],
)
def test_fp8(suffix: str, rows: int, columns: int, config: dict[str, Any], tmp_path: Path) -> None:
    tensors, expected = checkpoint(suffix, rows, columns)
    if config.get("activation_scheme") == "static":
        tensors |= {n.removesuffix("weight") + "input_scale": torch.ones(()) for n in linear_names(tensors)}
    check(write(tmp_path, tensors, config), expected)


def test_blocks_of_compressed_tensors(tmp_path: Path) -> None:
    tensors, expected = checkpoint("weight_scale", 128, 128)
    weights = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "block",
        "block_structure": [128, 128],
    }
    inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }
    check(write(tmp_path, tensors, config), expected)


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    tensors, _ = checkpoint("weight_scale_inv", 128, 128)
    refused(write(tmp_path / "a", tensors, {**BLOCK, "expert_dtype": "fp4"}), "expert_dtype", "'fp4'")
    refused(
        write(tmp_path / "b", tensors, {**BLOCK, "weight_block_size": [128]}), "weight_block_size", "[128]"
    )
    refused(write(tmp_path / "c", tensors, {**BLOCK, "weight_block_size": [64, 64]}), "weight_scale_inv")
    lost = {k: t for k, t in tensors.items() if not k.startswith("model.layers.0.mlp.up_proj.weight_scale")}
    refused(write(tmp_path / "d", lost, BLOCK), UP)


def test_activations_are_rounded_only_if_asked_for(tmp_path: Path) -> None:
    """Weights keep their codes, groups and scales; any scheme with e4m3 activations rounds those of all e4m3 weights."""
    source = opened(write(tmp_path, checkpoint("weight_scale_inv", 128, 128)[0], BLOCK))
    stored = stored_schemes(source)
    assert stored[UP] == "fp8g128f" and source.scheme_of(UP) == SCHEMES["fp8a8g128"]
    for quant, scheme in (
        ("none", "fp8g128f"),
        ("q4g32", "fp8g128f"),
        ("fp8a8g128", "fp8a8g128"),
        ("fp8a8", "fp8a8g128"),
    ):
        kept = QuantizeWeights(QuantRules(quant), stored=stored)._kept(stored[UP])
        assert kept == scheme
        told = unrounded_note(source, [PackedParam(UP, UP, "uint8", (1,), scheme=kept)])
        assert (told is None) == bool(by_name(kept).activation_bits)
    assert QuantizeWeights(QuantRules("fp8a8g128"), stored={})._kept("fp8") == "fp8a8"
    plain = [PackedParam(UP, UP, "uint8", (1,), scheme="fp8g128f")]
    assert "1 weights were made for fp8 activations" in str(unrounded_note(source, plain))
    assert replace(SCHEMES["fp8a8g128"], name="", activation_bits=0) == replace(by_name("fp8g128f"), name="")
