"""What each graph pass brings: decode time of a model compiled with and without it.

    python tools/ablation.py --dtype bf16 --threads 2             # the 1.2B shape
    python tools/ablation.py --layers 2 --only FuseRoPE,all        # quicker
    python tools/ablation.py --shape qwen-0.5b --quant w4a8        # where a step is short

The model has random weights (made by tools/bench.py). For each pass an artifact is compiled without it and measured
against the artifact with all passes, in one process, one token of each in turn; then it is deleted. The figure is the
median; the ratio is of medians of one pair. The last row has every such pass off.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.bench_sides.shapes import SHAPES, TORCH_NAMES, checkpoint, prompt_of  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One variant against all passes on.

    Attributes:
        off: the passes that are off.
        decode, decode_all_on: seconds per token, medians.
        kernels, kernels_all_on: per block, in decode.
        step_kernels: per block, in step.
    """

    off: tuple[str, ...]
    decode: float
    decode_all_on: float
    kernels: float
    kernels_all_on: float
    step_kernels: float

    @property
    def ratio(self) -> float:
        return self.decode / self.decode_all_on


def compiled(model: Path, artifact: Path, options: argparse.Namespace, off: tuple[str, ...]) -> Path:
    """Compile `model` without the passes in `off`, in a process of its own."""
    command = [sys.executable, "-m", "llmc", "compile", str(model), "-o", str(artifact)]
    command += ["--dtype", options.dtype, "--quant", options.quant]
    command += ["--verify", "off", "--quiet", "--max-seq-len", "2048", "--max-batch", "1"]
    for name in off:
        command += ["--disable-pass", name]
    subprocess.run(command, check=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    return artifact


def per_block(model: Any, function: str) -> float:
    """Kernels per block that the manifest lists."""
    entry = next(f for f in model.manifest.functions if f.name == function)
    return sum(k.block_calls for k in entry.kernels)


def in_turns(models: list[Any], prompt: list[int], tokens: int) -> list[float]:
    """Median seconds per token of each model; they take turns, token by token."""
    sequences = [model.new_sequence() for model in models]
    times: list[list[float]] = [[] for _ in models]
    try:
        logits = [m.step([(s, prompt)]) for m, s in zip(models, sequences, strict=True)]
        for i in range(tokens + 2):
            for j, (model, sequence) in enumerate(zip(models, sequences, strict=True)):
                token = int(logits[j][0].argmax())
                start = time.perf_counter()
                logits[j] = model.step([(sequence, [token])])
                if i >= 2:  # the first touch everything once
                    times[j].append(time.perf_counter() - start)
    finally:
        for sequence in sequences:
            sequence.free()
    return [statistics.median(t) for t in times]


def measure(model: Path, folder: Path, options: argparse.Namespace, base: Any, off: tuple[str, ...]) -> Row:
    """Compile a variant, measure it against `base`, delete it."""
    import llmc

    artifact = compiled(model, folder / "variant", options, off)
    variant = llmc.load(artifact, threads=options.threads, check_hashes=False)
    prompt = prompt_of(options.shape, options.prompt)
    slower, base_time = in_turns([variant, base], prompt, options.tokens)
    row = Row(
        off,
        slower,
        base_time,
        per_block(variant, "decode"),
        per_block(base, "decode"),
        per_block(variant, "step"),
    )
    del variant
    shutil.rmtree(artifact)
    return row


def show(rows: list[Row], options: argparse.Namespace) -> None:
    """The table, as Markdown."""
    from llmc.doctor import cpu_name

    layers = options.layers or "all"
    print(
        f"\n{options.shape}, {layers} layers, {options.dtype}, quant {options.quant}, {options.threads} threads, "
        f"context {options.prompt} + {options.tokens}; {cpu_name()}; load average {os.getloadavg()[0]:.1f}\n"
    )
    print("| off | decode ms | all on, ms | ratio | kernels per block | in step |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        name = row.off[0] if len(row.off) == 1 else "all of them"
        print(
            f"| {name} | {1e3 * row.decode:.2f} | {1e3 * row.decode_all_on:.2f} | {row.ratio:.3f} | "
            f"{row.kernels:.4g} (all on: {row.kernels_all_on:.4g}) | {row.step_kernels:.4g} |"
        )


def main() -> None:
    """Entry point."""
    from llmc.spec import OPTIONAL_PASSES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--layers", type=int, help="so many layers instead of the shape's")
    parser.add_argument("--dtype", choices=TORCH_NAMES, default="bf16")
    parser.add_argument("--quant", default="none", help="a scheme, as for llmc compile")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of context (default 128)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to measure (default 64)")
    parser.add_argument(
        "--only", help="passes, separated by commas (default: each, then all); all = all together"
    )
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    import llmc
    from llmc import knobs

    cache = knobs.cache_dir() / "bench"
    model = checkpoint(options.shape, options.dtype, cache, options.layers or 0)
    names = options.only.split(",") if options.only else list(OPTIONAL_PASSES)
    variants = [tuple(OPTIONAL_PASSES) if name == "all" else (name,) for name in names]
    if not options.only:
        variants.append(tuple(OPTIONAL_PASSES))
    folder = cache / f"ablation-{os.getpid()}"
    try:
        base_folder = compiled(model, folder / "base", options, ())
        base = llmc.load(base_folder, threads=options.threads, check_hashes=False)
        rows = []
        for off in variants:
            rows.append(measure(model, folder, options, base, off))
            print(f"{', '.join(off)}: {rows[-1].ratio:.3f}", file=sys.stderr, flush=True)
            if options.json:  # row by row: the whole takes a while
                plain = [{**asdict(row), "ratio": row.ratio} for row in rows]
                options.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(rows, options)


if __name__ == "__main__":
    main()
