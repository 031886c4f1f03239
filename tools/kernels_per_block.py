"""Kernels per decoder block, in decode and in step, of tiny models of every supported architecture.

    python tools/kernels_per_block.py                       # every type that compiles, in f32 and bf16
    python tools/kernels_per_block.py --only llama,phi --detail
    python tools/kernels_per_block.py --json counts.json --markdown docs/kernels.md     # adds to what counts.json holds

A model is lowered as for an artifact (no machine code), and its kernels are counted as `llmc inspect --kernels` shows them:
a block is what lies between two attention kernels, so a model of alternating layers has a mean.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "tools")]

DTYPES = ("f32", "bf16")
FUNCTIONS = ("decode", "step")


@dataclass
class Count:
    """Of one architecture.

    Attributes:
        blocks: "f32 decode" -> mean number of kernels per block.
        kernels: likewise -> {kernel: calls per block}.
        refused: why there is nothing to count; "" otherwise.
    """

    model_type: str
    blocks: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: str = ""


def lowered(model: Any, dtype: str, **options: Any) -> Any:
    """The StepModule of a model, as the pipeline makes it."""
    from llmc.pipeline import lower_model
    from llmc.spec import CompileSpec

    spec = CompileSpec.from_json({"model": "tiny", "dtype": dtype, "max_batch": 2, **options})
    return lower_model(model, spec)[1]


def count(model_type: str, dtypes: tuple[str, ...] = DTYPES) -> Count:
    """Lower a tiny model and count."""
    from tiny_configs import tiny_model

    from llmc.errors import LlmcError
    from llmc.passes.count_kernels import CountKernels

    found = Count(model_type)
    for dtype in dtypes:
        try:
            kernels = CountKernels()(lowered(tiny_model(model_type), dtype, max_step_tokens=64))
        except LlmcError as error:
            found.refused = str(error)
            return found
        except Exception as error:  # transformers cannot build the tiny model
            found.refused = f"{type(error).__name__}: {error}"
            return found
        for function in FUNCTIONS:
            inside = {k.name: k.block_calls for k in kernels[function] if k.block_calls}
            found.kernels[f"{dtype} {function}"] = inside
            found.blocks[f"{dtype} {function}"] = sum(inside.values())
    return found


def markdown(counts: list[Count], command: str, dtypes: tuple[str, ...]) -> str:
    """The table as a document."""
    from importlib.metadata import version

    columns = [f"{dtype} {function}" for function in FUNCTIONS for dtype in dtypes]
    lines = [
        "# Kernels per decoder block",
        "",
        f"Result of `{command}` with transformers {version('transformers')}: tiny models, lowered as for an artifact for "
        "this machine's cpu preset. A block is what lies between two attention kernels; where layers differ, the figure is "
        "their mean. What lies behind the last attention kernel is in no block: of a tiny model of two layers whose first is "
        "dense, experts are not counted. What the kernels are, and why: [design/007](design/007-kernels-per-block.md).",
        "",
        "| model type | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    done = [c for c in counts if not c.refused and all(n in c.blocks for n in columns)]
    for c in sorted(done, key=lambda c: (round(c.blocks[columns[len(dtypes) - 1]], 3), c.model_type)):
        lines.append(f"| `{c.model_type}` | " + " | ".join(f"{c.blocks[n]:.4g}" for n in columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="default: f32,bf16")
    parser.add_argument("--detail", action="store_true", help="also print the kernels of a block")
    parser.add_argument("--json", type=Path, help="also write the counts there")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    from tiny_configs import decoder_types

    dtypes = tuple(options.dtypes.split(","))
    known: dict[str, Count] = {}
    if options.json and options.json.exists():
        known = {c["model_type"]: Count(**c) for c in json.loads(options.json.read_text())}
    for model_type in options.only.split(",") if options.only else decoder_types():
        c = known[model_type] = count(model_type, dtypes)
        text = c.refused[:90] or "  ".join(f"{n}: {v:.4g}" for n, v in c.blocks.items())
        print(f"{model_type:24} {text}", flush=True)
        if options.detail:
            for name, kernels in c.kernels.items():
                print(f"    {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in kernels.items()))
        if options.json:
            options.json.write_text(json.dumps([asdict(c) for c in known.values()], indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(
            markdown(list(known.values()), "python tools/kernels_per_block.py", dtypes)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
