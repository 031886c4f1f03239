"""Perplexity of a model after quantization by several methods, beside that of its own weights.

    python tools/quant_compare.py examples/models/stdlib-llama --schemes q4g32 --methods rtn gptq awq --seeds 0 1 2

Everything runs in torch in float32 with the dequantized weights, so that only the method counts; for schemes with 8-bit
activations the inputs of the quantized layers are rounded to int8 per token as well. The calibration text and the scored
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from llmc.frontend.capture import decoder_layers
from llmc.frontend.checkpoint import open_model
from llmc.frontend.graph import SourceModel, WeightSource
from llmc.products import to_int8
from llmc.quant.calibrate import Method, calibrate
from llmc.quant.corpus import calibration_sequences, text_tokens
from llmc.quant.methods import METHODS
from llmc.quant.overlay import OverlayWeights
from llmc.quant.quantizer import RoundToNearest
from llmc.quant.schemes import SCHEMES, Scheme


class Scorer:
    """Scores weights on one text.

    Args:
        source: the model.
        tokens: int64 [pieces, length].
    """

    def __init__(self, source: SourceModel, tokens: torch.Tensor) -> None:
        assert source.folder is not None
        self.model = transformers.AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        self.tokens = tokens

    def perplexity(self, weights: WeightSource, plan: Mapping[str, Scheme]) -> float:
        """exp of the mean loss per token, the first token of every piece given."""
        state = self.model.state_dict()
        for name in weights.names():
            state[name].copy_(weights.load(name).float())
        hooks = [
            self.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(round_inputs)
            for name, scheme in plan.items()
            if scheme.activation_bits == 8
        ]
        loss, count = 0.0, 0
        with torch.no_grad():
            for piece in self.tokens.split(4):
                logits = self.model(piece).logits[:, :-1].flatten(0, 1)
                targets = piece[:, 1:].flatten()
                loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
                count += len(targets)
        for hook in hooks:
            hook.remove()
        return math.exp(loss / count)


def round_inputs(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """int8 per token."""
    return (to_int8(args[0]),)


def nearest(weights: WeightSource, plan: Mapping[str, Scheme]) -> OverlayWeights:
    """Rounded to the nearest."""
    quantizer = RoundToNearest()
    floats = {
        name: torch.from_numpy(
            quantizer.quantize(name, weights.load(name).float().numpy(), scheme).dequantize()
        )
        for name, scheme in plan.items()
    }
    return OverlayWeights(weights, floats)


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
    parser.add_argument("--schemes", nargs="+", default=["q4g32"], choices=sorted(SCHEMES))
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
    scorer = Scorer(source, torch.tensor(ids[:size]).view(-1, options.length))
    base = scorer.perplexity(source.weights, {})
    print(
        f"scored tokens {size} in pieces of {options.length}; calibrated on {options.sequences} × {options.length}"
    )
    print("| scheme | method | seed | perplexity | against the source | seconds |\n|---|---|---|---|---|---|")
    print(f"| {source.dtype} | | | {base:.4f} | | |", flush=True)
    failed = False
    for scheme_name in options.schemes:
        plan = linears(source, SCHEMES[scheme_name])
        plain = math.inf
        for name in options.methods:
            for seed in [None] if name == "rtn" else options.seeds:
                began = time.perf_counter()
                weights: WeightSource
                if seed is None:
                    weights = nearest(source.weights, plan)
                else:
                    sequences = calibration_sequences(
                        source,
                        options.calib or options.model / "calibration.txt",
                        sequences=options.sequences,
                        length=options.length,
                        seed=seed,
                    )
                    method: Method = METHODS[name]()
                    weights = calibrate(source, plan, sequences, method).weights
                seconds = time.perf_counter() - began
                got = scorer.perplexity(weights, plan)
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
