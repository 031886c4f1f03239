"""Do the peers compute what transformers computes? Small models whose weights make attention and positions matter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from tools.bench_sides.peers import PEERS, PeerUnavailable, converted, interpreter
from tools.bench_sides.protocol import SideFailed, Worker
from tools.bench_sides.shapes import CHECKED, checkpoint, prompt_of

_PROMPT = 64
# of 16-bit formats: error of the logits, as a share of what shuffling the prompt changes in them
_LIMIT = 0.1


def run(peers: Sequence[str], threads: int, cache: Path) -> int:
    """Print a table; 0 if all peers agree with transformers in float32, else 1."""
    table = Table(title="last token's logits against transformers in float32", title_justify="left", box=None)
    for column in ("model", "peer", "format", "error", "limit", "same token", ""):
        table.add_column(column)
    bad = 0
    for shape in CHECKED:
        folder = checkpoint(shape, "bf16", cache)
        prompt = prompt_of(shape, _PROMPT)
        shuffled = [*prompt[-2::-1], prompt[-1]]
        plain = {"dtype": "float32", "attention": "eager"}
        reference = Worker(
            "transformers", Path(sys.executable), PEERS["transformers"].side, folder, threads, plain
        )
        expected, other = (np.array(reference.logits(p)) for p in (prompt, shuffled))
        reference.close()
        for name in peers:
            for bits, kind in sorted(PEERS[name].formats.items(), reverse=True):
                if kind == "16" and bits != 16:
                    continue
                row = f"{shape} {name} {kind}"
                try:
                    found = _logits(name, kind, folder, threads, cache, prompt)
                except (PeerUnavailable, SideFailed) as e:
                    print(f"bench: {row}: {e}", file=sys.stderr)
                    table.add_row(shape, name, kind, "", "", "", "[red]not run[/red]")
                    bad += 1
                    continue
                error = distance(found, expected) / distance(other, expected)
                wrong = bits == 16 and not error <= _LIMIT
                bad += wrong
                same = "yes" if found.argmax() == expected.argmax() else "no"
                limit = str(_LIMIT) if bits == 16 else ""
                verdict = "[red]wrong[/red]" if wrong else "ok" if bits == 16 else "quantized"
                table.add_row(shape, name, kind, f"{error:.4f}", limit, same, verdict)
    Console(highlight=False).print(table)
    print("error 1 = as far away as the logits of the same prompt with its tokens in another order")
    return 1 if bad else 0


def distance(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Root mean square of the difference."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def _logits(
    name: str, kind: str, folder: Path, threads: int, cache: Path, prompt: list[int]
) -> npt.NDArray[np.float64]:
    peer = PEERS[name]
    python = interpreter(peer, cache)
    options = {"dtype": "bfloat16", "attention": "eager"}
    worker = Worker(name, python, peer.side, converted(peer, python, folder, kind), threads, options)
    try:
        return np.array(worker.logits(prompt))
    finally:
        worker.close()
