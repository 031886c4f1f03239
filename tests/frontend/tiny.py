"""Tiny random models (tools/tiny_configs.py) saved as checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from tools.tiny_configs import tiny_config, tiny_model

__all__ = ["save", "tiny_config", "tiny_model"]


def save(model: PreTrainedModel, folder: Path, *, shard_size: str = "5GB", as_bin: bool = False) -> Path:
    """Write a checkpoint; `as_bin` writes pytorch_model.bin, which transformers 5 no longer does by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if as_bin:
        from safetensors.torch import load_file

        state: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            state.update(load_file(file))
            file.unlink()
        for index in folder.glob("*.index.json"):
            index.unlink()
        torch.save({k: v.clone() for k, v in state.items()}, folder / "pytorch_model.bin")
    return folder
