"""GGUF files are read exactly, and make the same model as the checkpoint that they came from."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.quant.readers.gguf import llama3_factors
from llmc.quant.readers.gguf_blocks import KINDS, blocks_to_weight
from llmc.quant.readers.gguf_file import TYPES
from llmc.quant.readers.source import QuantizedCheckpoint
from llmc.reference import reference_logits
from tests.frontend.tiny import tiny_model
from tests.quant.prequantized import DEMO, library

NUMBER = {name: number for number, (name, _, _) in TYPES.items()}
IDS = [3, 150, 7, 99, 42, 8]
HF_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _field(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    if isinstance(value[0], float):
        return struct.pack("<IIQ", 9, 6, len(value)) + struct.pack(f"<{len(value)}f", *value)
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...], bytes]]
) -> Path:
    """tensors: name -> (kind, shape, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += _text(key) + _field(value)
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        dims = tuple(reversed(shape))
        head += _text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", NUMBER[kind], len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return path


def random_blocks(kind: str, rows: int, k: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bits with finite, small scales: uint8 [rows, row bytes]."""
    _, values, size = TYPES[NUMBER[kind]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows, k // values, size), dtype=np.uint8)
    two = ("q4_1", "q5_1", "q4_k", "q5_k")
    at = (208,) if kind == "q6_k" else (0, 2) if kind in two else (0,)
    for i in at:
        # values of about one or less: some kinds have scales of scales
        scale = (random.standard_normal(blocks.shape[:2]) * (2e-5 if kind == "q6_k" else 1e-3)).astype(
            np.float16
        )
        blocks[..., i : i + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_blocks_equal_the_library(kind: str) -> None:
    """Every bit pattern counts: all codes, both signs of scales, all 6-bit scales and minima."""
    gguf = library("gguf")
    rows = random_blocks(kind, 64, 1024)
    theirs = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind.upper()])
    ours = blocks_to_weight(rows, kind)
    assert ours.codes.max() < 1 << ours.scheme.bits
    np.testing.assert_array_equal(ours.dequantize(), theirs)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k of a llama."""
    n = len(weight)
    return weight.reshape(heads, 2, n // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def export(model: PreTrainedModel, path: Path, arch: str, **extra: Any) -> Path:
    """The model as llama.cpp's converter writes it, in float32."""
    config = model.config
    names = dict(HF_TO_GGUF)
    if arch in ("gemma2", "gemma3"):
        names |= {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim if hasattr(config, "head_dim") else 16,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **extra,
    }
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, leaf = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            new = f"blk.{layer}.{names[rest]}.{leaf}"
        else:
            new = f"{names[stem]}.{leaf}"
        if arch == "llama" and "q_proj" in name:
            value = permuted(value, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            value = permuted(value, config.num_key_value_heads)
        if arch.startswith("gemma") and new.endswith("norm.weight"):
            value = value + 1
        tensors[new] = ("f32", tuple(value.shape), value.contiguous().numpy().tobytes())
    return write_gguf(path, metadata, tensors)


_SLIDING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2}


@pytest.mark.parametrize(
    ("kind", "arch", "more"),
    [
        ("llama", "llama", {}),
        ("llama", "llama", {"attention_bias": True}),
        ("mistral", "llama", {"sliding_window": None}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"head_dim": 16}),
        ("gemma", "gemma", {"head_dim": 16}),
        ("gemma2", "gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
        ("gemma3_text", "gemma3", {"query_pre_attn_scalar": 16, "sliding_window": 16, **_SLIDING}),
    ],
)
def test_same_model(kind: str, arch: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(kind, **more)
    extra: dict[str, Any] = {}
    if arch in ("gemma2", "gemma3"):
        extra[f"{arch}.attention.sliding_window"] = 16
    if arch == "gemma2":
        extra |= {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0}
    path = export(model, tmp_path / "m.gguf", arch, **extra)
    got = reference_logits(open_model(str(path), dtype=None), IDS, "float32").logits
    with torch.no_grad():
        expected = model(torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    # norms of gemma are stored plus one
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6 if arch.startswith("gemma") else 0)


def test_llama3_rope(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", rope_parameters=rope, head_dim=64)
    path = export(model, tmp_path / "m.gguf", "llama", **{"llama.rope.freq_base": 500000.0})
    source = open_model(str(path), dtype=None)
    plain = source.module.model.rotary_emb.inv_freq
    factors = llama3_factors(500000.0, 64, 8.0, 1.0, 4.0, 8192)
    torch.testing.assert_close(plain / torch.from_numpy(factors), model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_quantized_tensors(kind: str, tmp_path: Path) -> None:
    """Rows of q and k come back in transformers' order, with their own scales."""
    model = tiny_model("llama", hidden_size=256, head_dim=64, intermediate_size=256)
    path = export(model, tmp_path / "m.gguf", "llama")
    from llmc.quant.readers.gguf_file import GGUFFile

    file = GGUFFile(path)
    tensors, raw = {}, {}
    for name, tensor in file.tensors.items():
        rows = file.rows(tensor)
        if len(tensor.shape) == 2:
            rows = raw[name] = random_blocks(kind, tensor.shape[0], tensor.shape[1], seed=len(raw))
        tensors[name] = (kind if len(tensor.shape) == 2 else tensor.kind, tensor.shape, rows.tobytes())
    weights = open_model(str(write_gguf(tmp_path / "q.gguf", file.metadata, tensors)), dtype=None).weights
    assert isinstance(weights, QuantizedCheckpoint)
    got = weights.quantized("model.layers.0.mlp.down_proj.weight")
    want = blocks_to_weight(raw["blk.0.ffn_down.weight"], kind)
    assert got is not None and got.scheme == KINDS[kind]
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_array_equal(got.scales, want.scales)
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        name = f"model.layers.1.self_attn.{ours}.weight"
        dense = torch.from_numpy(blocks_to_weight(raw[f"blk.1.{theirs}.weight"], kind).dequantize())
        got = weights.quantized(name)
        assert got is not None
        np.testing.assert_array_equal(
            permuted(torch.from_numpy(got.dequantize()), heads).numpy(), dense.numpy()
        )
        np.testing.assert_array_equal(weights.load(name).numpy(), got.dequantize())
    assert weights.quantized("model.embed_tokens.weight") is not None
    assert weights.quantized("model.norm.weight") is None


def test_tokenizer_from_the_metadata(tmp_path: Path) -> None:
    model = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    kinds = [3] * 3 + [1] * (len(tokens) - 3)
    path = export(
        tiny_model("llama"),
        tmp_path / "m.gguf",
        "llama",
        **{
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        },
    )
    source = open_model(str(path), dtype=None)
    assert source.folder is not None
    ours, theirs = AutoTokenizer.from_pretrained(source.folder), AutoTokenizer.from_pretrained(DEMO)
    text = "def f(self, x):\n    return 'héllo' + x  # naïve\n<|eos|>"
    ids = ours(text, add_special_tokens=False)["input_ids"]
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == text
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(LlmcError) as caught:
        open_model(str(path), dtype=None)
    for part in parts:
        assert part in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    path = export(tiny_model("llama"), tmp_path / "m.gguf", "llama")
    good = path.read_bytes()
    for name, data, *parts in (
        ("empty", b"", "gguf-unreadable"),
        ("other", b"PK\3\4" + good[4:], "gguf-damaged", "PK"),
        ("short", good[:-4096], "gguf-damaged", "bytes"),
        ("header", good[:100], "gguf-damaged"),
        ("version", good[:4] + struct.pack("<I", 1) + good[8:], "gguf-version", "1"),
    ):
        bad = tmp_path / f"{name}.gguf"
        bad.write_bytes(data)
        refused(bad, *parts)
    refused(tmp_path / "missing.gguf", "gguf-unreadable")
    refused(
        export(tiny_model("llama"), tmp_path / "a.gguf", "mamba"), "gguf-architecture", "'mamba'", "llama"
    )
    scaled = export(tiny_model("llama"), tmp_path / "r.gguf", "llama", **{"llama.rope.scaling.type": "yarn"})
    refused(scaled, "gguf-rope", "'yarn'")


def test_unsupported_tensor_type(tmp_path: Path) -> None:
    path = export(tiny_model("llama", intermediate_size=256), tmp_path / "m.gguf", "llama")
    from llmc.quant.readers.gguf_file import GGUFFile

    file = GGUFFile(path)
    tensors = {n: (t.kind, t.shape, file.rows(t).tobytes()) for n, t in file.tensors.items()}
    name = "blk.0.ffn_down.weight"
    shape = tensors[name][1]
    tensors[name] = ("q2_k", shape, bytes(shape[0] * -(-shape[1] // 256) * 84))
    refused(
        write_gguf(tmp_path / "q.gguf", file.metadata, tensors), "gguf-type", "blk.0.ffn_down.weight", "q2_k"
    )
