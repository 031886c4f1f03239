"""Perplexity of a model after quantization by several methods, beside that of its own weights.

    python tools/quant_compare.py examples/models/stdlib-llama --schemes q4g32 --methods rtn gptq awq --seeds 0 1 2

Everything runs in torch in float32 with the dequantized weights, so that only the method counts; for schemes that
round activations the inputs of the quantized layers are rounded per token as well. The calibration text and the scored
text default to calibration.txt and heldout.txt in the model's folder. The linear layers inside of the decoder layers
are quantized. Round-to-nearest uses no text and has no seed. Exit code 1 if a calibrated method is not better than
rounding to the nearest on every seed, or its perplexity rises by more than --within.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from llmc.frontend.capture import decoder_layers
from llmc.frontend.checkpoint import open_model
from llmc.frontend.graph import SourceModel
from llmc.frontend.untie import untied
from llmc.products import InputRounding, RoundedInputs
from llmc.quant.corpus import text_tokens
from llmc.quant.methods import METHODS, Calibration, calibrated
from llmc.quant.overlay import OverlayWeights
from llmc.quant.quantizer import RoundToNearest
from llmc.quant.schemes import SCHEMES, Scheme, rotates
from llmc.reference import _Loader, _runnable, _slots

# activations in so few bits are simulated only: there are no kernels
SIMULATED = {"w4a4": replace(SCHEMES["w4a8"], name="w4a4", activation_bits=4)}


def perplexity(source: SourceModel, tokens: torch.Tensor, plan: Mapping[str, Scheme]) -> float:
    """exp of the mean loss per token, the first token of every piece given.

    Args:
        source: run in float32 with its weights.
        tokens: int64 [pieces, length].
        plan: schemes; where they round activations, the inputs of these weights are rounded.
    """
    assert source.weights is not None
    model = _runnable(source, "float32", None)
    loader = _Loader(source.weights, source.module)
    held: dict[str, torch.Tensor] = {}
    for slot in list(_slots(model, "", recurse=True)):
        name = loader.canonical(slot.name)
        if name not in held:
            held[name] = loader.load(slot.name, slot.empty.dtype).clone()
        slot.put(held[name])
    roundings = {
        name: InputRounding.of(scheme, _outliers(source, name, scheme))
        for name, scheme in plan.items()
        if scheme.activation_bits
    }
    loss, count = 0.0, 0
    with torch.no_grad(), RoundedInputs.of(held, roundings):
        for piece in tokens.split(4):
            logits = model(piece).logits[:, :-1].flatten(0, 1)
            targets = piece[:, 1:].flatten()
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
    return math.exp(loss / count)


def _outliers(source: SourceModel, name: str, scheme: Scheme) -> torch.Tensor | None:
    """Inputs of a weight that are not rounded."""
    if not scheme.outlier_share:
        return None
    made = source.weights.quantized(name)  # type: ignore[union-attr]
    return torch.from_numpy(made.outlier_columns.astype(np.int64))


def nearest(source: SourceModel, plan: Mapping[str, Scheme]) -> SourceModel:
    """Rounded to the nearest."""
    assert source.weights is not None
    weights = source.weights
    quantizer = RoundToNearest()
    floats = {
        name: torch.from_numpy(
            quantizer.quantize(name, weights.load(name).float().numpy(), scheme).dequantize()
        )
        for name, scheme in plan.items()
    }
    return replace(source, weights=OverlayWeights(weights, floats))


def linears(source: SourceModel, scheme: Scheme) -> dict[str, Scheme]:
    """Every nn.Linear inside of a decoder layer."""
    return {
        f"{path}.{name}.weight": scheme
        for path, layer in decoder_layers(source.module).items()
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemes", nargs="+", default=["q4g32"], choices=sorted({**SCHEMES, **SIMULATED}))
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "awq"], choices=["rtn", *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--sequences", type=int, default=32, help="for calibration")
    parser.add_argument(
        "--length", type=int, default=512, help="tokens of a sequence, also of the scored ones"
    )
    parser.add_argument("--pieces", type=int, default=32, help="sequences that are scored")
    parser.add_argument(
        "--within", type=float, default=0.02, help="largest relative rise of a calibrated method"
    )
    options = parser.parse_args()

    source = open_model(str(options.model), dtype=None)
    assert source.weights is not None
    ids = text_tokens(source, options.eval or options.model / "heldout.txt")
    size = min(len(ids) // options.length, options.pieces) * options.length
    tokens = torch.tensor(ids[:size]).view(-1, options.length)
    base = perplexity(source, tokens, {})
    print(
        f"scored tokens {size} in pieces of {options.length}; calibrated on {options.sequences} × {options.length}"
    )
    print("| scheme | method | seed | perplexity | against the source | seconds |\n|---|---|---|---|---|---|")
    print(f"| {source.dtype} | | | {base:.4f} | | |", flush=True)
    failed = False
    for scheme_name in options.schemes:
        plan = linears(source, {**SCHEMES, **SIMULATED}[scheme_name])
        plain = math.inf
        for name in options.methods:
            for seed in [None] if name == "rtn" else options.seeds:
                began = time.perf_counter()
                if seed is None and not any(scheme.outlier_share for scheme in plan.values()):
                    made = nearest(source, plan)
                else:
                    text = options.calib or options.model / "calibration.txt"
                    settings = Calibration(name, text, options.sequences, options.length, seed or 0)
                    made, _ = calibrated(untied(source) if rotates(name) else source, plan, settings)
                seconds = time.perf_counter() - began
                got = perplexity(made, tokens, plan)
                rise = got / base - 1
                if seed is None:
                    plain = got
                else:
                    failed |= got >= plain or rise > options.within
                shown = "" if seed is None else seed
                print(
                    f"| {scheme_name} | {name} | {shown} | {got:.4f} | {100 * rise:+.3f} % | {seconds:.1f} |",
                    flush=True,
                )
    sys.exit(failed)


if __name__ == "__main__":
    main()
