"""``llmc eval``: an artifact's perplexity on a text, and its distance from the source model or another artifact."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llmc.artifact import to_plain
from llmc.cli.format import grid
from llmc.evaluate import Evaluation, evaluate
from llmc.evaluate_text import open_reference, text_windows


def run_eval(
    artifact: Path,
    text: Path,
    *,
    against: str | None,
    max_tokens: int,
    window: int | None,
    stride: int | None,
    as_json: bool,
    threads: int | None,
) -> None:
    """Print the figures as a table or as JSON.

    Raises:
        LlmcError: the artifact, the text or the reference cannot be used.
    """
    from llmc.runtime.model import load

    model = load(artifact, threads=threads)
    windows = text_windows(model, text, window=window, stride=stride, max_tokens=max_tokens)
    reference = open_reference(against, model) if against else None
    with _Bar(enabled=sys.stderr.isatty() and not as_json) as bar:
        result = evaluate(
            model.logits, windows, against=reference.logits if reference else None, progress=bar.advance
        )
    if as_json:
        print(
            json.dumps({"artifact": str(artifact), "text": str(text), "against": against, **to_plain(result)})
        )
        return
    console = Console(file=sys.stdout, highlight=False)
    console.print(evaluation_table(result, f"{artifact} on {text}", reference.name if reference else None))


def evaluation_table(result: Evaluation, title: str, reference: str | None) -> Table:
    """The figures, one per row."""
    table = grid(title)
    table.add_row("tokens", f"{result.tokens} predicted, in {result.windows} windows")
    table.add_row("perplexity", f"{result.perplexity:.4f}")
    figures = result.against
    if figures is not None:
        table.add_row("against", reference or "")
        table.add_row("its perplexity", f"{figures.perplexity:.4f}")
        table.add_row(
            "increase", f"{figures.increase_percent:+.3f} % ± {figures.increase_error:.3f} (standard error)"
        )
        table.add_row(
            "KL divergence", f"mean {figures.kl_mean:.3g}, 99th percentile {figures.kl_p99:.3g} nats"
        )
        table.add_row("same top token", f"{100 * figures.top1_agreement:.2f} %")
    return table


class _Bar:
    """A progress bar on stderr, or nothing."""

    def __init__(self, *, enabled: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not enabled,
        )
        self._task: Any = None

    def __enter__(self) -> _Bar:
        self._progress.start()
        self._task = self._progress.add_task("evaluate", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, done: float, total: float, what: str) -> None:
        self._progress.update(self._task, completed=done, total=total, description=what)
