"""Error of every decoder layer of a compiled model against the source model in float32, and the first one that is off.

    python tools/bisect_layers.py examples/models/stdlib-llama --dtype bf16
    python tools/bisect_layers.py MODEL --artifact dist/demo          # the same target and dtypes as that artifact

The compiled graph is built once more with the layers' outputs as results. `error` is relative (root mean square of the
difference over that of the output); `source` is the error that torch itself has in that dtype. Exit code 1 if a layer
diverges.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmc.errors import LlmcError
from llmc.spec import CompileSpec, DType, KVDType
from llmc.verify_compare import LayerError, first_divergence


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hugging Face folder or hub id")
    parser.add_argument("--artifact", type=Path, help="take target and dtypes from this artifact")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--dtype", help="f32, bf16 or f16; default: the checkpoint's")
    parser.add_argument("--kv-dtype", help="of the cache; default: the same")
    parser.add_argument("--tokens", type=int, default=40, help="length of the random prompt")
    parser.add_argument("--ids", help="token ids instead, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args(argv)


def spec_of(options: argparse.Namespace) -> CompileSpec:
    """What to compile: as the artifact was, or as the options say."""
    if options.artifact is not None:
        from llmc.artifact import MANIFEST, Manifest

        path = options.artifact / MANIFEST
        try:
            manifest = Manifest.from_text(path.read_text(encoding="utf-8"), str(path))
        except OSError as e:
            raise LlmcError("manifest-unreadable", f"{path} cannot be read: {e.strerror}.") from None
        return CompileSpec.from_json({**manifest.spec, "model": options.model})
    return CompileSpec(
        model=options.model,
        target=options.target,
        dtype=DType.parse(options.dtype) if options.dtype else None,
        kv_dtype=KVDType.parse(options.kv_dtype) if options.kv_dtype else None,
    )


def bisect(spec: CompileSpec, options: argparse.Namespace) -> list[LayerError]:
    """Errors of all layers, first to last."""
    from llmc.frontend.checkpoint import open_model
    from llmc.pipeline import run_taps
    from llmc.verify import compare_layers, vocab_size

    source = open_model(spec.model, dtype=spec.dtype, revision=spec.revision)
    if options.ids:
        ids = [int(i) for i in options.ids.split(",")]
    else:
        ids = np.random.default_rng(options.seed).integers(0, vocab_size(source), options.tokens).tolist()
    taps: Mapping[str, np.ndarray] = run_taps(source, spec, ids)
    return compare_layers(
        source,
        ids,
        taps,
        dtype=spec.dtype.value if spec.dtype else source.dtype,
        kv_dtype=spec.kv_dtype.value if spec.kv_dtype else None,
    )


def table(errors: Sequence[LayerError]) -> Any:
    """A rich table; the first diverging layer is marked."""
    from rich.table import Table

    first = first_divergence(errors)
    out = Table("layer", "error", "source", "ratio", "allowed", "")
    for e in errors:
        ratio = f"{e.error / e.noise:.2f}" if e.noise else "-"
        mark = "<- first diverging" if e is first else "diverges" if e.diverges else ""
        style = "bold red" if e is first else "red" if e.diverges else ""
        noise = f"{e.noise:.2e}" if e.noise else "-"
        out.add_row(e.path, f"{e.error:.2e}", noise, ratio, f"{e.limit:.2e}", mark, style=style)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 = all layers agree, 1 = one diverges, 2 = cannot be run."""
    from rich.console import Console

    options = arguments(argv)
    try:
        errors = bisect(spec_of(options), options)
    except LlmcError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    Console().print(table(errors))
    first = first_divergence(errors)
    if options.json:
        layers = [{**asdict(e), "diverges": e.diverges} for e in errors]
        options.json.write_text(
            json.dumps({"first": first.path if first else None, "layers": layers}, indent=1)
        )
    print(f"first diverging layer: {first.path}" if first else "no layer diverges")
    return int(first is not None)


if __name__ == "__main__":
    sys.exit(main())
