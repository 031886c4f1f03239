"""The roofline plot of ``llmc bench --plot``."""

from __future__ import annotations

import itertools
from pathlib import Path

from llmc.errors import LlmcError
from llmc.limits import MachineLimits
from llmc.roofline import StepRoofline

_MARKERS = ("o", "s")
# of the limits, in grey: colours are for the steps
_DASHES = ("-", "--", "-.", ":")
# only kernels that take more of the step get their name written
_NAMED = 0.03


def write_plot(path: Path, steps: tuple[StepRoofline, ...], limits: MachineLimits) -> str:
    """Draw operations per second over operations per byte; returns a sentence on what was done.

    Raises:
        LlmcError: the file cannot be written.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return f"{path} was not drawn: matplotlib is not installed (pip install matplotlib)."
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    points = [
        (row.intensity, row.operations / row.seconds, row.seconds / step.wall, row.kind or row.name, number)
        for number, step in enumerate(steps)
        for row in step.rows
        if row.intensity and row.operations and row.seconds
    ]
    left = min([0.1, *(x for x, *_ in points)]) / 2
    right = max([1000.0, *(x for x, *_ in points)]) * 4
    for (name, peak), dashes in zip(limits.multiply.items(), itertools.cycle(_DASHES)):
        label = f"{name}: {peak / 1e9:.0f} Gop/s"
        ridge = [peak / limits.read, right]
        axes.plot(ridge, [peak / 1e9] * 2, dashes, color="0.35", linewidth=1.2, label=label)
    top = max(limits.multiply.values())
    axes.plot(
        [left, top / limits.read],
        [left * limits.read / 1e9, top / 1e9],
        "k-",
        linewidth=1.2,
        label=f"read: {limits.read / 1e9:.1f} GB/s",
    )
    for number, step in enumerate(steps):
        mine = [p for p in points if p[4] == number]
        axes.scatter(
            [p[0] for p in mine],
            [p[1] / 1e9 for p in mine],
            [20 + 600 * p[2] for p in mine],
            marker=_MARKERS[number % len(_MARKERS)],
            alpha=0.6,
            label=f"{step.function}, {step.sizes}",
        )
        named: set[str] = set()  # of several kernels of one class, the slowest
        for x, y, share, name, _ in mine:
            if share >= _NAMED and name not in named:
                named.add(name)
                axes.annotate(name, (x, y / 1e9), xytext=(5, 5), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("Gop/s")
    axes.set_title(
        f"{limits.threads} thread{'s' * (limits.threads > 1)}; the area of a mark is its share of the step",
        fontsize=9,
    )
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3, which="both")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise LlmcError("plot-unwritable", f"The plot {path} cannot be written: {e}.") from None
    return f"{path} shows the kernels below the machine's limits."
