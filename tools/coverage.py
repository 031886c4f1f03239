"""Which decoder-only architectures of the installed transformers compile, and which are refused and why.

    python tools/coverage.py                      # every model type; compile and compare with eager
    python tools/coverage.py --graph-only         # capture alone, evaluated with numpy: quick, no code generation
    python tools/coverage.py --graph-only --markdown docs/coverage.md
    python tools/coverage.py --only llama,bloom --json out.json --jobs 2 --limit 120

Every type is a tiny random model (tools/tiny_configs.py) whose logits have to match transformers' eager float32 at lengths
other than the traced one. A result is one of: matches (largest error <= 2e-4 of the logits' scale), differs, refused (with the
sentence that a user gets), error (a bug), or no model (transformers itself cannot build or run the tiny model).
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "tools")]

TOLERANCE = 2e-4
LENGTHS = (1, 5, 37)
# errors that a user is told of, but that mean a bug; any other is a refusal
_OUTCOMES = {"internal-error": "error", "verify-failed": "differs"}


@dataclass(frozen=True)
class Result:
    """Outcome for one model type; `error` is the largest absolute difference of logits, `scale` their largest value."""

    model_type: str
    outcome: str
    detail: str = ""
    error: float | None = None
    scale: float | None = None
    attentions: int = 0
    seconds: float = 0.0


# (model, config) -> (largest logit error, largest logit, number of attention blocks)
Check = Callable[[Any, Any], tuple[float, float, int]]


def check_graph(model: Any, config: Any) -> tuple[float, float, int]:
    """Capture and evaluate the graph with numpy, the whole sequence at once."""
    import torch

    from llmc.frontend.capture import capture
    from tests.frontend.dense import run_dense

    graph = capture(model)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    error = scale = 0.0
    for length in LENGTHS:
        ids = tokens(length)
        with torch.no_grad():
            reference = model(ids, use_cache=False).logits[0].float().numpy()
        error = max(error, float(abs(run_dense(graph, weights, ids[0].numpy())[0] - reference).max()))
        scale = max(scale, float(abs(reference).max()))
    return error, scale, graph.as_text().count('"llmc.attention"')


def check_compiled(model: Any, config: Any) -> tuple[float, float, int]:
    """Compile for the CPU in float32; the compile's own check compares prefill and paged decode with eager."""
    import torch

    from llmc.pipeline import compile_model
    from llmc.spec import DType, Verify

    with torch.no_grad():
        scale = float(model(tokens(LENGTHS[-1]), use_cache=False).logits.abs().max())
    with tempfile.TemporaryDirectory() as folder:
        result = compile_model(
            model,
            Path(folder) / "artifact",
            dtype=DType.F32,
            verify=Verify.FULL,
            max_batch=2,
            max_step_tokens=64,
        )
    assert result.manifest is not None
    quality = result.manifest.quality
    errors = (quality.prefill_max_abs_error, quality.decode_max_abs_error)
    if None in errors:
        raise RuntimeError(f"the artifact was not checked: {quality.note}")
    plan = result.manifest.kv_plan
    blocks = sum(len(group.layers) for group in plan.groups) + len(plan.shared)
    return max(e for e in errors if e is not None), scale, blocks


def tokens(length: int) -> Any:
    import torch
    from tiny_configs import VOCAB

    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))


def run_one(model_type: str, check: Check) -> Result:
    """Build, run eagerly, check."""
    import torch
    from tiny_configs import tiny_model

    from llmc.errors import LlmcError

    start = time.monotonic()

    def result(outcome: str, detail: str = "", **numbers: Any) -> Result:
        return Result(model_type, outcome, detail, seconds=time.monotonic() - start, **numbers)

    try:
        model: Any = tiny_model(model_type)
        with torch.no_grad():
            model(tokens(5), use_cache=False)
    except Exception as error:
        return result("no model", _one_line(error))
    try:
        error, scale, attentions = check(model, model.config)
    except LlmcError as failure:
        return result(_OUTCOMES.get(failure.ref, "refused"), str(failure))
    except Exception as bug:
        return result("error", _one_line(bug))
    numbers = {"error": error, "scale": scale, "attentions": attentions}
    if not error <= TOLERANCE * max(1.0, scale):
        return result("differs", f"logits differ by {error:.1e}", **numbers)
    return result("matches", **numbers)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def worker(graph_only: bool) -> None:
    """Answer one JSON result per model type read from stdin."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    check: Check = check_graph if graph_only else check_compiled
    for line in sys.stdin:
        result = run_one(line.strip(), check)
        print("RESULT " + json.dumps(asdict(result)), flush=True)


class _Worker:
    """A worker process, replaced when a model takes too long or kills it."""

    def __init__(self, graph_only: bool, limit: float) -> None:
        self.command = [sys.executable, __file__, "--worker", *(["--graph-only"] if graph_only else [])]
        self.limit = limit
        self.process: subprocess.Popen[str] | None = None

    def run(self, model_type: str) -> Result:
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self.limit, process.kill)
        start = time.monotonic()
        timer.start()
        try:
            process.stdin.write(model_type + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("RESULT "):
                    return Result(**json.loads(line[7:]))
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        self.process = None
        seconds = time.monotonic() - start
        what = f"took longer than {self.limit:.0f} s" if seconds >= self.limit else "the process died"
        return Result(model_type, "error", what, seconds=seconds)

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(timeout=30)


def run_all(types: list[str], graph_only: bool, jobs: int, limit: float) -> Iterator[Result]:
    """Results as they come."""
    todo: queue.Queue[str] = queue.Queue()
    done: queue.Queue[Result | None] = queue.Queue()
    for name in types:
        todo.put(name)

    def serve() -> None:
        process = _Worker(graph_only, limit)
        try:
            while True:
                done.put(process.run(todo.get_nowait()))
        except queue.Empty:
            process.close()
        finally:
            done.put(None)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(max(1, min(jobs, len(types))))]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        result = done.get()
        if result is None:
            running -= 1
        else:
            yield result


def show(results: list[Result]) -> None:
    """The table and the totals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="decoder-only architectures in transformers")
    for column in ("model type", "outcome", "max error", "attention blocks", "s", "why"):
        table.add_column(column, overflow="fold")
    colours = {"matches": "green", "refused": "yellow", "no model": "dim"}
    for r in sorted(results, key=lambda r: r.model_type):
        colour = colours.get(r.outcome, "red")
        error = "" if r.error is None else f"{r.error:.1e}"
        blocks = str(r.attentions) if r.attentions else ""
        table.add_row(
            r.model_type,
            f"[{colour}]{r.outcome}",
            error,
            blocks,
            f"{r.seconds:.1f}",
            r.detail.replace("[", "\\["),
        )
    console = Console(width=180 if not sys.stdout.isatty() else None)
    console.print(table)
    totals = Counter(r.outcome for r in results)
    console.print(
        f"{len(results)} model types: " + ", ".join(f"{n} {name}" for name, n in totals.most_common())
    )


def markdown(results: list[Result], command: str) -> str:
    """The results as a document: what was run, counts, the matching types, and every other type's sentence."""
    from importlib.metadata import version

    packages = ("transformers", "torch", "apache-tvm")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    totals = Counter(r.outcome for r in results)
    matching = sorted(r.model_type for r in results if r.outcome == "matches")
    worst = max(
        (r.error / max(1.0, r.scale) for r in results if r.error is not None and r.scale), default=0.0
    )
    lines = [
        "# Coverage of transformers' decoder-only architectures",
        "",
        f"Result of `{command}` with {versions}, Python {sys.version_info.major}.{sys.version_info.minor}.",
        "Each type is a tiny random model whose logits are compared with transformers' eager float32 at lengths "
        f"{', '.join(map(str, LENGTHS))}."
        + (
            " This run evaluates the captured graph with numpy; without `--graph-only` every model is compiled and checked "
            "through the paged cache."
            if "--graph-only" in command
            else " Every model is compiled; prefill and paged decode are compared."
        ),
        "",
        "| outcome | model types |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in totals.most_common()),
        f"| all | {len(results)} |",
        "",
        f"Largest error of those that match, relative to the largest logit (at least 1): {worst:.1e}; the limit is "
        f"{TOLERANCE:.0e}.",
        "",
        "## Matches",
        "",
        ", ".join(f"`{name}`" for name in matching),
        "",
        "## Others",
        "",
        "| model type | outcome | what a user is told |",
        "|---|---|---|",
    ]
    for r in sorted(results, key=lambda r: (r.outcome, r.model_type)):
        if r.outcome != "matches":
            lines.append(
                f"| `{r.model_type}` | {r.outcome} | {' '.join(r.detail.split()).replace('|', '/')} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument(
        "--graph-only", action="store_true", help="capture and evaluate with numpy; no code generation"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds per model type (default 180)")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--markdown", metavar="FILE", help="also write a document there (docs/coverage.md)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.graph_only)
        return 0
    from tiny_configs import decoder_types

    types = options.only.split(",") if options.only else decoder_types()
    results = []
    for result in run_all(types, options.graph_only, options.jobs, options.limit):
        results.append(result)
        print(
            f"[{len(results)}/{len(types)}] {result.model_type}: {result.outcome}",
            file=sys.stderr,
            flush=True,
        )
    show(results)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    if options.markdown:
        kept = ["--graph-only"] if options.graph_only else []
        Path(options.markdown).write_text(markdown(results, " ".join(["python tools/coverage.py", *kept])))
    return 0 if all(r.outcome not in ("differs", "error") for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
