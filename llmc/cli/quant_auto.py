"""What ``llmc compile --quant auto`` shows of its search: tables, and a plot of size against perplexity."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table

from llmc.cli.format import human_bytes
from llmc.errors import LlmcError
from llmc.quant.choose import QuantSearch


def percent(loss: float) -> float:
    """Growth of the perplexity in percent from that of the mean loss in nats."""
    return 100 * math.expm1(loss)


def measured_table(found: QuantSearch) -> Table:
    """Everything that was measured, largest first; the chosen assignment is marked."""
    table = Table(title="assignments that were measured", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in ("weights", "of full size", "predicted", "measured"):
        table.add_column(column, justify="right")
    rows: list[tuple[int, float | None, float, str]] = [
        (p.nbytes, p.predicted, p.measured, "mixed") for p in found.choice.points
    ]
    rows += [(nbytes, None, loss, f"all {scheme}") for scheme, nbytes, loss in found.uniform]
    for nbytes, predicted, measured, name in sorted(rows, key=lambda r: -r[0]):
        chosen = name == "mixed" and nbytes == found.choice.nbytes
        table.add_row(
            f"{name} (chosen)" if chosen else name,
            human_bytes(nbytes),
            f"{100 * nbytes / found.full_bytes:.1f} %",
            "" if predicted is None else f"{percent(predicted):+.3f} %",
            f"{percent(measured):+.3f} %",
            style="bold" if chosen else None,
        )
    return table


def choice_table(found: QuantSearch) -> Table:
    """How many weights got which scheme."""
    table = Table(title="schemes that were chosen", title_justify="left", box=None, pad_edge=False)
    table.add_column("scheme")
    for column in ("weights", "bytes"):
        table.add_column(column, justify="right")
    for size in found.sizes():
        table.add_row(size.scheme, str(size.weights), human_bytes(size.nbytes))
    return table


def write_plot(found: QuantSearch, path: Path) -> str:
    """Draw size against growth of the perplexity; returns a sentence on what was done.

    Raises:
        LlmcError: the file cannot be written.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return f"{path} was not drawn: matplotlib is not installed (pip install matplotlib)."
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    mega = 1 << 20
    points = found.choice.points
    axes.plot([p.nbytes / mega for p in points], [percent(p.measured) for p in points], "o-", label="mixed")
    axes.plot([found.choice.nbytes / mega], [percent(found.choice.loss)], "*", markersize=14, label="chosen")
    if found.uniform:
        axes.plot(
            [n / mega for _, n, _ in found.uniform],
            [percent(x) for *_, x in found.uniform],
            "s",
            label="uniform",
        )
        for scheme, nbytes, loss in found.uniform:
            axes.annotate(scheme, (nbytes / mega, percent(loss)), xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel("quantized weights, MiB")
    axes.set_ylabel("perplexity increase, %")
    # zero and noise below it have a place on this scale, which is linear up to a tenth of a percent
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend()
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as e:
        raise LlmcError("plot-unwritable", f"The plot {path} cannot be written: {e}.") from None
    return f"{path} shows size against perplexity."
