"""A checkpoint with a tokenizer, small enough to be compiled by a test, and a text for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz .,()=:\n"


def random_text(length: int, seed: int = 0) -> str:
    """Letters, each with probability that depends on the one before it."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(len(LETTERS), 0.2), len(LETTERS))
    out = [0]
    for _ in range(length - 1):
        out.append(int(rng.choice(len(LETTERS), p=table[out[-1]])))
    return "".join(LETTERS[i] for i in out)


def save_tiny(folder: Path, architecture: str = "llama") -> Path:
    """A random float32 model and a tokenizer that knows letters and some pairs of them; begin token 0, end token 1."""
    from tokenizers import Tokenizer, decoders, models

    from tools.tiny_configs import tiny_model

    model = tiny_model(architecture)
    model.config.bos_token_id, model.config.eos_token_id = 0, 1
    model.config.architectures = [type(model).__name__]
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 0, 1
    model.save_pretrained(folder)
    pairs = [(a, b) for a in "abcd" for b in "aeiou "]
    words = ["<s>", "</s>", *LETTERS, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sequence_logits(model: torch.nn.Module) -> Callable[[Sequence[int]], np.ndarray]:
    """A torch model as what llmc.evaluate compares with: tokens of one sequence -> logits f32 [n, V]."""

    def logits(ids: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()

    return logits
