"""Perplexity of a checkpoint with its weights rounded to each scheme, through transformers in float32: no compile needed.

    python tools/quant_perplexity.py examples/models/stdlib-llama examples/models/stdlib-llama/heldout.txt --windows 8

Linear layers are quantized as `llmc compile --quant SCHEME` would; the head (and a tied embedding) likewise. With
schemes that round activations (w8a8, w4a8, fp8a8) their inputs are rounded as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmc.evaluate import cut, evaluate
from llmc.products import InputRounding
from llmc.quant.rtn import quantize
from llmc.quant.schemes import parse
from llmc.spec import CompileSpec

SCHEMES = "none q8 q6g64 q4g32 q4g32a q4g64 q4g64a q4g128 q3g64 nf4 fp8 mxfp4 w8a8 w4a8 w4a8g64 w4a8g128 fp8a8 fp8a8g128"


def with_scheme(model: str, name: str, search: bool) -> tuple[torch.nn.Module, float]:
    """The checkpoint with rounded weights, and bits per weight of what was rounded."""
    source = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    head = source.get_output_embeddings()
    spec = CompileSpec(model, quant=name)
    bits, count = 0.0, 0
    for module in source.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        scheme = parse((spec.head_scheme() or name) if module is head else name)
        if scheme is None:
            continue
        weight = module.weight.detach()
        if scheme.activation_bits:
            rounding = InputRounding.of(scheme)
            module.register_forward_pre_hook(lambda _, args, rounding=rounding: rounding(args[0]))
        weight.copy_(torch.from_numpy(quantize(weight.numpy(), scheme, search=search).dequantize()))
        bits += scheme.bits_per_weight(weight.shape[1]) * weight.numel()
        count += weight.numel()
    return source, bits / count if count else 32.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("text", type=Path, help="text file in UTF-8")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES.split())
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, default=8, help="at most so many")
    parser.add_argument("--search", action="store_true", help="choose scales by mean square error")
    options = parser.parse_args(argv)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows = cut(ids, window=options.length, max_tokens=options.length * options.windows)
    base = None
    print("| scheme | bits per weight | perplexity | change |\n|---|---|---|---|")
    for name in options.schemes:
        source, bits = with_scheme(options.model, name, options.search)
        with torch.no_grad():
            found = evaluate(
                lambda w, m=source: m(torch.tensor([w]), use_cache=False).logits[0].numpy(), windows
            ).perplexity
        base = base or found
        change = 100 * (found / base - 1)
        print(f"| {name} | {bits:.2f} | {found:.4f} | {change:+.2f} % |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
