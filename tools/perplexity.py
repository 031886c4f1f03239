"""Perplexity of an artifact on a text, and of its source model through transformers on the same tokens.

    python tools/perplexity.py dist/demo examples/models/stdlib-llama examples/models/stdlib-llama/heldout.txt

The text is cut into pieces of --length tokens, each scored on its own; the first token of a piece is given, the others
count. Exit code 1 if the two differ by more than --within (relative).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Floats = npt.NDArray[np.float32]


def nats(logits: Floats, targets: npt.NDArray[np.int64]) -> float:
    """Sum of -log p(target) over rows; logits [n, vocab], targets [n]."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    total = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return float((total - wide[np.arange(len(targets)), targets]).sum())


def perplexity(score: Callable[[list[int]], Floats], pieces: list[list[int]]) -> float:
    """exp of the mean over all scored tokens; `score` gives logits [n, vocab] of the n tokens of a piece."""
    loss, count = 0.0, 0
    for piece in pieces:
        loss += nats(score(piece)[:-1], np.array(piece[1:]))
        count += len(piece) - 1
    return math.exp(loss / count)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact")
    parser.add_argument("checkpoint", help="the source model, for transformers")
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=512, help="tokens per piece")
    parser.add_argument("--pieces", type=int, default=32, help="at most so many")
    parser.add_argument("--dtype", default="float32", help="of the source model in torch")
    parser.add_argument("--within", type=float, default=1e-3, help="largest relative difference")
    options = parser.parse_args()

    import torch
    import transformers

    import llmc

    model = llmc.load(options.artifact)
    ids = model.tokenize(options.text.read_text(encoding="utf-8"), special_tokens=False)
    cut = [ids[i : i + options.length] for i in range(0, len(ids), options.length)]
    pieces = [p for p in cut if len(p) > 1][: options.pieces]
    if not pieces:
        parser.error(f"{options.text} has fewer than two tokens")
    source = transformers.AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=getattr(torch, options.dtype), attn_implementation="eager"
    ).eval()

    def through_torch(piece: list[int]) -> Floats:
        with torch.no_grad():
            return source(torch.tensor([piece])).logits[0].float().numpy()

    ours, theirs = perplexity(model.logits, pieces), perplexity(through_torch, pieces)
    difference = ours / theirs - 1
    print(f"tokens {sum(map(len, pieces))} in {len(pieces)} pieces of up to {options.length}")
    print(f"llmc          perplexity {ours:.5f}   ({options.artifact})")
    print(f"transformers  perplexity {theirs:.5f}   ({options.dtype})")
    print(f"difference    {100 * difference:+.4f} %   (allowed {100 * options.within:.2f} %)")
    sys.exit(abs(difference) > options.within)


if __name__ == "__main__":
    main()
