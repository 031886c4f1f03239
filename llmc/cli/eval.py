"""``llmc eval``: an artifact's perplexity on a text, and its distance from the source model or another artifact."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llmc.artifact import LayerQuality, Manifest, StoredParams, to_plain
from llmc.cli.format import grid
from llmc.errors import LlmcError
from llmc.evaluate import Evaluation, Window, evaluate
from llmc.evaluate_text import open_reference, text_windows
from llmc.spec import CompileSpec

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel


def run_eval(
    artifact: Path,
    text: Path,
    *,
    against: str | None,
    max_tokens: int,
    window: int | None,
    stride: int | None,
    layers: bool,
    as_json: bool,
    threads: int | None,
) -> None:
    """Print the figures as a table or as JSON.

    Raises:
        LlmcError: the artifact, the text or the reference cannot be used.
    """
    from llmc.runtime.model import load

    if max_tokens < 0:
        raise LlmcError(
            "max-tokens", f"--max-tokens must be at least 0 (the whole text), found {max_tokens}."
        )
    model = load(artifact, threads=threads)
    windows = text_windows(model, text, window=window, stride=stride, max_tokens=max_tokens or None)
    reference = open_reference(against, model) if against else None
    if layers and (reference is None or reference.source is None):
        raise LlmcError(
            "layers-without-model",
            "The layers' errors are measured against the source model, and none is given.",
            hint="Add --against MODEL.",
        )
    with _Bar(enabled=sys.stderr.isatty() and not as_json) as bar:
        result = evaluate(
            model.logits, windows, against=reference.logits if reference else None, progress=bar.advance
        )
    errors: tuple[LayerQuality, ...] = ()
    if layers and reference is not None and reference.source is not None:
        folder = artifact if artifact.is_dir() else artifact.parent
        errors = _layers(reference.source, folder.expanduser(), model.manifest, windows[0])
    if as_json:
        figures = {"artifact": str(artifact), "text": str(text), "reference": against, **to_plain(result)}
        print(json.dumps(figures | ({"layers": to_plain(errors)} if layers else {})))
        return
    console = Console(file=sys.stdout, highlight=False)
    console.print(evaluation_table(result, f"{artifact} on {text}", reference.name if reference else None))
    if layers:
        console.print(layers_table(errors))


def _layers(
    source: SourceModel, folder: Path, manifest: Manifest, window: Window
) -> tuple[LayerQuality, ...]:
    """Errors of the layers of the graph that the artifact was made of, compiled once more with their outputs."""
    from llmc.gate import layer_errors, layer_qualities
    from llmc.pipeline import run_taps

    spec, stored = CompileSpec.from_json(manifest.spec), StoredParams(folder, manifest.params)
    return layer_qualities(
        layer_errors(source, spec, window, lambda ids: run_taps(source, spec, ids, stored))
    )


def layers_table(layers: Sequence[LayerQuality]) -> Table:
    """Relative errors, first layer first."""
    from llmc.gate import worst_layers

    added = {layer.path: own for layer, own in worst_layers(layers, len(layers))}
    table = Table(
        title="relative error of each layer's output", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("layer")
    for column in ("error", "added here", "source in this dtype"):
        table.add_column(column, justify="right")
    for layer in layers:
        table.add_row(
            layer.path, f"{layer.error:.2e}", f"{added[layer.path]:.2e}", f"{layer.source_error:.2e}"
        )
    return table


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
