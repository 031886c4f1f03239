"""Perplexity of an artifact on a text, beside that of its source model through transformers on the same tokens.

    python tools/perplexity.py dist/demo examples/models/stdlib-llama/heldout.txt --against examples/models/stdlib-llama

The text is cut into windows of --length tokens, each scored on its own; the first token of a window is given, the
others count. Exit code 1 if the two differ by more than --within (relative), 2 if it cannot be run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmc.errors import LlmcError

Floats = npt.NDArray[np.float32]
Scorer = Callable[[list[int]], Floats]


@dataclass(frozen=True)
class Score:
    """Perplexity of one side.

    Attributes:
        name: artifact or model.
        perplexity: exp of the mean of -log p over the scored tokens.
        tokens: how many were scored.
        seconds: time that it took.
    """

    name: str
    perplexity: float
    tokens: int
    seconds: float


def nats(logits: Floats, targets: npt.NDArray[np.int64]) -> float:
    """Sum of -log p(target) over rows; logits [n, vocab], targets [n]."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    total = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return float((total - wide[np.arange(len(targets)), targets]).sum())


def score(name: str, logits_of: Scorer, windows: Sequence[list[int]]) -> Score:
    """Score all windows; `logits_of` gives f32 [n, vocab] of the n tokens of a window."""
    start = time.perf_counter()
    loss, count = 0.0, 0
    for window in windows:
        loss += nats(logits_of(window)[:-1], np.array(window[1:]))
        count += len(window) - 1
    return Score(name, math.exp(loss / count), count, time.perf_counter() - start)


def cut(ids: Sequence[int], length: int, most: int) -> list[list[int]]:
    """Windows of `length` tokens, the last one shorter; at most `most` of them, none of a single token."""
    pieces = [list(ids[i : i + length]) for i in range(0, len(ids), length)]
    return [p for p in pieces if len(p) > 1][:most]


def transformers_scorer(model: str, dtype: str) -> Scorer:
    """Logits of a checkpoint through transformers, eagerly."""
    import torch
    import transformers

    from llmc.spec import DType

    source = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, DType.parse(dtype).value), attn_implementation="eager"
    ).eval()

    def logits_of(window: list[int]) -> Floats:
        with torch.no_grad():
            out: Floats = source(torch.tensor([window]), use_cache=False).logits[0].float().numpy()
        return out

    return logits_of


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", help="folder that llmc compile wrote")
    parser.add_argument("text", type=Path, help="text file in UTF-8")
    parser.add_argument("--against", metavar="MODEL", help="the source model, for transformers")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, default=32, help="at most so many")
    parser.add_argument("--dtype", default="f32", help="of the source model in torch: f32, bf16 or f16")
    parser.add_argument("--within", type=float, default=1e-3, help="largest relative difference")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> list[Score]:
    """The artifact's score, then the source model's if that is asked for."""
    import llmc

    model = llmc.load(options.artifact)
    try:
        ids = model.tokenize(options.text.read_text(encoding="utf-8"), special_tokens=False)
    except (OSError, UnicodeDecodeError) as e:
        raise LlmcError("text-unreadable", f"{options.text} cannot be read as UTF-8 text: {e}.") from None
    windows = cut(ids, min(options.length, model.manifest.limits.max_seq_len), options.windows)
    if not windows:
        raise LlmcError("text-too-short", f"{options.text} has fewer than two tokens.")
    scores = [score(str(options.artifact), model.logits, windows)]
    if options.against:
        name = f"{options.against} (transformers, {options.dtype})"
        scores.append(score(name, transformers_scorer(options.against, options.dtype), windows))
    return scores


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    from rich.console import Console
    from rich.table import Table

    options = arguments(argv)
    try:
        scores = measure(options)
    except LlmcError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    table = Table("", "perplexity", "tokens", "seconds")
    for s in scores:
        table.add_row(s.name, f"{s.perplexity:.5f}", str(s.tokens), f"{s.seconds:.1f}")
    Console().print(table)
    difference = scores[0].perplexity / scores[1].perplexity - 1 if len(scores) > 1 else None
    if difference is not None:
        print(f"difference {100 * difference:+.4f} % (allowed {100 * options.within:.2f} %)")
    if options.json:
        figures = {"scores": [asdict(s) for s in scores], "difference": difference, "within": options.within}
        options.json.write_text(json.dumps(figures, indent=1))
    return int(difference is not None and not abs(difference) <= options.within)


if __name__ == "__main__":
    sys.exit(main())
