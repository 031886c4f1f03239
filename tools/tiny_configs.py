"""Tiny random models of every decoder-only architecture in the installed transformers, for tests and tools.

Sizes are found by field name, so that a new architecture needs no entry; OVERRIDES holds what a config insists on.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 256

# architectures in the causal-LM table that are no decoder-only language models: encoders, encoder-decoders, models that
# need an image or sound encoder, drafts that need another model's hidden states, and byte patches from a second model
NOT_DECODERS = frozenset(
    "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert "
    "data2vec-text electra ernie marian mbart megatron-bert mvp pegasus plbart prophetnet rembert roberta "
    "roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod "
    "reformer moshi musicgen musicgen_melody git mllama fuyu got_ocr2 emu3 moss_transcribe_diarize "
    "gemma4_assistant gemma4_unified_assistant blt".split()
)

SIZES: dict[str, Any] = {
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim_model": 64, "embed_dim": 64, "dim": 64, "emb_dim": 64,
    "intermediate_size": 128, "ffn_dim": 128, "n_inner": 128, "d_ff": 128, "dff": 128, "ffn_hidden_size": 128,
    "dim_ff": 128, "feed_forward_proj_dim": 128, "intermediate_size_mlp": 128,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "multi_query_group_num": 2, "head_dim": 16, "dim_head": 16,
    "global_head_dim": 16, "d_kv": 16,
    "vocab_size": VOCAB, "max_position_embeddings": 512, "n_positions": 512, "max_seq_len": 512, "n_ctx": 512,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "moe_ffn_hidden_size": 32, "expert_ffn_hidden_size": 32, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_topk": 2,
    "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": 24, "sliding_window": 8, "attention_chunk_size": 8, "rotary_dim": 8, "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB,
}  # fmt: skip
# None means "as many as there are query heads", or "hidden size by heads"
_HEADS = ("head_dim", "num_key_value_heads")
# query, key and value dims follow from these in multi-head latent attention
_DERIVED_WITH_MLA = ("head_dim", "qk_head_dim", "num_key_value_heads")
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 24},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "gemma4_text": {"per_layer_config": {}, "num_kv_shared_layers": 2, "num_hidden_layers": 4},
    "gemma4_unified_text": {"per_layer_config": {}, "num_kv_shared_layers": 2, "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "hunyuan_v1_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "jamba": {"layer_types": None},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "zamba2": {
        "hybrid_layer_ids": [1],
        "layers_block_type": ["linear_attention", "hybrid"],
        "layer_types": None,
        "num_hidden_layers": 2,
    },
    "recurrent_gemma": {"layer_types": None, "num_hidden_layers": 3},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
}


def decoder_types() -> list[str]:
    """Every causal-LM model type that is a decoder-only language model, in alphabetical order."""

    def has_other_senses(model_type: str) -> bool:
        parts = getattr(CONFIG_MAPPING[model_type], "sub_configs", {})
        return "vision_config" in parts or "audio_config" in parts

    return sorted(
        t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t not in NOT_DECODERS and not has_other_senses(t)
    )


def tiny_config(model_type: str, **extra: Any) -> Any:
    """A config of a few layers and 64 wide, with windows of 8 tokens and every layer type that the default has."""
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    kwargs = _shrunk(default, OVERRIDES.get(model_type, {}))
    kwargs.update(extra)
    config = cls(**{k: v for k, v in kwargs.items() if v is not None})
    config.use_cache = False
    return config


def _shrunk(default: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    values = default.to_dict()
    names = set(values) | set(getattr(default, "attribute_map", {}))
    mapped = getattr(default, "attribute_map", {})
    kwargs: dict[str, Any] = {}
    latent = "kv_lora_rank" in names
    for name, value in SIZES.items():
        if latent and name in _DERIVED_WITH_MLA:
            continue
        if name in names and name not in kwargs and mapped.get(name) not in kwargs:
            current = values.get(mapped.get(name, name))
            unset = current is None and name not in _HEADS
            if not unset and not isinstance(current, list | dict):
                kwargs[name] = value
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if len(kinds) > 1:
        layers = max(4, len(kinds))
        kwargs["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if name in kwargs:
                kwargs[name] = layers
    if latent and "num_key_value_heads" in names:
        kwargs["num_key_value_heads"] = 4
    kwargs |= {n: i for i, n in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")) if n in names}
    kwargs.update(overrides)
    return kwargs


def tiny_model(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A random transformers model with weights so large that a wrong mask or position shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **extra), attn_implementation="eager")
    model = model.float().eval()
    randomize(model, seed)
    return model.to(dtype)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Matrices with unit gain, vectors moved off their initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() < 2:
                parameter.add_(0.2 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


__all__ = ["VOCAB", "decoder_types", "randomize", "tiny_config", "tiny_model"]
