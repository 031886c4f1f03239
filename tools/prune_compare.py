"""Perplexity of a model after pruning or low-rank factoring, alone or followed by quantization.

    python tools/prune_compare.py examples/models/stdlib-llama --transforms magnitude:0.5 wanda:0.5 sparsegpt:0.5 svd:0.8

Everything runs in torch in float32, as in tools/quant_compare.py; texts default to calibration.txt and heldout.txt in the
model's folder. The linear layers inside of the decoder layers are changed. "error" is the mean relative error of their
outputs on the calibration text, before quantization.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from llmc.frontend.checkpoint import open_model
from llmc.frontend.graph import SourceModel
from llmc.frontend.low_rank import low_rank
from llmc.quant.corpus import text_tokens
from llmc.quant.methods import METHODS, Calibration, calibrated
from llmc.quant.schemes import NONE, RTN, SCHEMES
from llmc.quant.shrink import PruneRule, RankRule
from tools.quant_compare import linears, nearest, perplexity


def weights_and_zeros(source: SourceModel) -> tuple[int, int]:
    """How many weights the linear layers of the decoder layers have, and how many are zero."""
    assert source.weights is not None
    count, zeros = 0, 0
    for name in linears(source, SCHEMES["q8"]):
        weight = source.weights.load(name)
        count += weight.numel()
        zeros += int((weight == 0).sum())
    return count, zeros


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--transforms", nargs="+", required=True, help="as --prune takes them, or svd:RANK|RATIO"
    )
    parser.add_argument("--scheme", default=NONE, choices=[NONE, *sorted(SCHEMES)])
    parser.add_argument("--method", default=RTN, choices=[RTN, *METHODS])
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--sequences", type=int, default=32, help="for calibration")
    parser.add_argument(
        "--length", type=int, default=512, help="tokens of a sequence, also of the scored ones"
    )
    parser.add_argument("--pieces", type=int, default=32, help="sequences that are scored")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    source = open_model(str(options.model), dtype=None)
    ids = text_tokens(source, options.eval or options.model / "heldout.txt")
    size = min(len(ids) // options.length, options.pieces) * options.length
    tokens = torch.tensor(ids[:size]).view(-1, options.length)
    base = perplexity(source, tokens, {})
    print(f"scored tokens {size}; calibrated on {options.sequences} × {options.length}, seed {options.seed}")
    print(
        "| transform | scheme | method | weights | zeros | error | perplexity | against the source | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print(f"| {source.dtype} | | | {weights_and_zeros(source)[0]} | | | {base:.4f} | | |", flush=True)
    for text in options.transforms:
        began = time.perf_counter()
        kind, _, amount = text.partition(":")
        svd = RankRule.parse(amount) if kind == "svd" else None
        rule = None if svd is not None else PruneRule.parse(text)
        shaped = source if svd is None else low_rank(source, svd)[0]
        plan = {} if options.scheme == NONE else linears(shaped, SCHEMES[options.scheme])
        corpus = options.calib or options.model / "calibration.txt"
        settings = Calibration(
            options.method, corpus, options.sequences, options.length, options.seed, rule, svd
        )
        made, found = calibrated(source, plan, settings)
        if options.method == RTN:
            made = nearest(made, plan)
        seconds = time.perf_counter() - began
        got = perplexity(made, tokens, plan)
        count, zeros = weights_and_zeros(made)
        error = sum(found.errors.values()) / max(len(found.errors), 1)
        print(
            f"| {text} | {options.scheme} | {options.method} | {count} | {100 * zeros / count:.1f} % | {error:.4f} |"
            f" {got:.4f} | {100 * (got / base - 1):+.2f} % | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
