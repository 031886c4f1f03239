"""Tiny random models of many architectures, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 128,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 160, "n_positions": 128}
_OWN: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 8},
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 160,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 64,
    },
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 160},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160},
}
_MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": 16},
}


def tiny_config(kind: str, **changes: Any) -> Any:
    """A small config of model type `kind`, without special tokens."""
    values = {**_OWN.get(kind, {**_COMMON, **_MORE.get(kind, {})}), **changes}
    values = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **values}
    return AutoConfig.for_model(kind, **values)


def tiny_model(
    kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model in eval mode; norm weights and biases are random too, so that none can be left out unseen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes), attn_implementation="eager").eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.02)
    return model.to(dtype)


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
