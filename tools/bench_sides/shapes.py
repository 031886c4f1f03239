"""Model shapes to measure, and their checkpoints of random weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.bench_sides.protocol import ROOT

# transformers configs; llama-1b has the shape of Llama-3.2-1B, qwen-0.5b that of Qwen2.5-0.5B
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": dict(
        model_type="llama",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    ),
    "qwen-0.5b": dict(
        model_type="qwen2",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
    ),
    "tiny": dict(
        model_type="llama",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    ),
    # for --check: weights so large that attention, positions and biases decide the logits
    "check-llama": dict(
        model_type="llama",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=0.08,
    ),
    "check-qwen": dict(
        model_type="qwen2",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=4096,
        rope_theta=1000000.0,
        tie_word_embeddings=False,
        initializer_range=0.08,
    ),
}
CHECKED = ("check-llama", "check-qwen")
TORCH_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def checkpoint(shape: str, dtype: str, cache: Path, layers: int = 0) -> Path:
    """A Hugging Face folder with random weights, made if it is not in the cache; `layers` instead of the shape's."""
    folder = cache / f"{shape}-{dtype}{f'-{layers}' if layers else ''}"
    if not (folder / "config.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        # in a process of its own: torch's memory goes back to the system afterwards
        command = [sys.executable, "-m", "tools.bench_sides.shapes", shape, dtype, str(folder), str(layers)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    return folder


def make_model(shape: str, dtype: str, folder: Path, layers: int) -> None:
    """Write the folder of checkpoint()."""
    import torch
    import transformers

    print(f"bench: making random weights in {folder}", file=sys.stderr)
    torch.manual_seed(0)
    values = {**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})}
    config = transformers.AutoConfig.for_model(**values, bos_token_id=0, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, TORCH_NAMES[dtype]))
    if shape in CHECKED:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:  # biases start at 0 and norms at 1, which would hide a lost one
                    weight += 0.3 * torch.randn_like(weight)
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def prompt_of(shape: str, length: int, start: int = 1) -> list[int]:
    """Fixed token ids, spread over the vocabulary, so that embedding rows are not all in the cache."""
    vocabulary = SHAPES[shape]["vocab_size"]
    return [(7919 * (i + start)) % vocabulary for i in range(length)]


if __name__ == "__main__":
    make_model(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
