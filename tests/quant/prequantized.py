"""Writes checkpoints as the quantization libraries do, out of one layer of the demo model."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.quant.rtn import quantize
from llmc.quant.schemes import Scheme
from llmc.quant.weight import QuantizedWeight

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
