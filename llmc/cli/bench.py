"""``llmc bench``: how fast an artifact is here, and with --roofline which kernels take the time."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from llmc.artifact import Manifest, to_plain
from llmc.bench import Speed, choose_sizes, measure_speed, measure_steps, profile_room
from llmc.cli.format import human_bytes, human_count
from llmc.errors import LlmcError
from llmc.limits import MachineLimits, measured_limits
from llmc.roofline import StepRoofline, best_share, totals

# waiting threads lose their core to whatever else runs, which slows a step down manyfold
_BUSY = 0.5
# a step that takes so much longer than its parts was disturbed
_LOST = 0.03
# columns of a table that no terminal bounds
_WIDE = 220


def run_bench(
    artifact: Path,
    *,
    prompt: int | None,
    tokens: int,
    rounds: int,
    batch: int,
    threads: int | None,
    roofline: bool,
    json_file: Path | None,
    plot: Path | None,
    level: str | None = None,
) -> None:
    """Measure, print tables, write files.

    Raises:
        LlmcError: the artifact cannot be loaded, sizes that it does not take, files that cannot be written.
    """
    from llmc.runtime.library import use_threads
    from llmc.runtime.model import load

    roofline = roofline or plot is not None
    for path in (json_file, plot):
        if path is not None and not path.parent.is_dir():
            raise LlmcError("no-folder", f"{path} cannot be written: there is no folder {path.parent}.")
    load_average = os.getloadavg()[0]
    model = load(artifact, threads=threads, level=level)
    sizes = choose_sizes(model, prompt, tokens, rounds, batch, room=profile_room() if roofline else 0)
    used = use_threads(None)
    # a table that goes to a file or a pipe is not cut to a terminal's width
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDE)
    errors = Console(stderr=True, highlight=False)
    if load_average > _BUSY:
        errors.print(f"This machine is busy (load average {load_average:.1f}): do not trust the figures.")
    limits: MachineLimits | None = None
    steps: tuple[StepRoofline, ...] = ()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task("measure", total=None)

        def progress(done: float, total: float, what: str) -> None:
            bar.update(task, description=what)

        if roofline:
            progress(0, 1, "limits of this machine")
            limits = measured_limits(used)
        speed = measure_speed(model, sizes, progress)
        if limits is not None:
            steps = measure_steps(model, sizes, limits, progress)
    memory = model.memory()
    console.print(speed_table(speed, model.manifest, str(artifact), used))
    console.print(
        f"weights {human_bytes(memory.weights)}, KV cache {human_bytes(memory.kv_resident)}, "
        f"process at most {human_bytes(memory.process_peak)}"
    )
    if limits is not None:
        for step in steps:
            console.print()
            console.print(step_table(step, limits))
        console.print()
        console.print(limits_text(limits))
    if json_file is not None:
        _write_json(json_file, artifact, model.manifest, speed, limits, steps, load_average)
    if plot is not None and limits is not None:
        from llmc.cli.roofline_plot import write_plot

        console.print(write_plot(plot, steps, limits))


def speed_table(speed: Speed, manifest: Manifest, name: str, threads: int) -> Table:
    """Prefill and decode, medians and spread."""
    sizes = speed.sizes
    many = f", {sizes.batch} sequences" if sizes.batch > 1 else ""
    table = Table(
        title=f"{name}: {threads} thread{'s' * (threads > 1)}, {sizes.rounds} rounds{many}; {manifest.target.preset}",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    table.add_column("")
    for column in ("tokens", "tok/s", "median", "fastest", "10 % - 90 %"):
        table.add_column(column, justify="right")
    rows = (
        ("prefill", sizes.batch * sizes.prompt, speed.prefill_tokens_per_second, speed.prefill),
        ("decode", sizes.batch, speed.decode_tokens_per_second, speed.decode),
    )
    for what, tokens, rate, seconds in rows:
        low, high = percentiles(seconds)
        table.add_row(
            what,
            str(tokens),
            f"{rate:.1f}",
            _time(statistics.median(seconds)),
            _time(min(seconds)),
            f"{_time(low)} - {_time(high)}",
        )
    return table


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The values that a tenth lies below and above (nearest rank)."""
    ordered = sorted(seconds)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9))
    return low, high


def step_table(step: StepRoofline, limits: MachineLimits) -> Table:
    """One row per kernel, what is spent outside of kernels, and the whole step."""
    whole = totals(step, limits)
    table = Table(
        title=f"{step.function}: {_time(step.wall)} for {step.sizes}; medians",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    table.add_column("kernel", overflow="fold")
    table.add_column("class")
    for column in ("calls", "time", "share", "bytes", "GB/s", "of read", "operations", "Gop/s", "of peak"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("nearest limit", no_wrap=True)
    for row in step.rows:
        known = row.moved is not None and row.operations is not None and row.seconds > 0
        best = best_share(row)
        table.add_row(
            row.name,
            row.kind,
            str(row.calls),
            _time(row.seconds),
            _percent(row.seconds / step.wall),
            human_bytes(row.moved) if row.moved is not None else "?",
            f"{row.moved / row.seconds / 1e9:.1f}" if known and row.moved is not None else "",
            _percent(row.read_share) if row.read_share is not None else "",
            human_count(round(row.operations)) if row.operations is not None else "?",
            f"{row.operations / row.seconds / 1e9:.1f}" if known and row.operations is not None else "",
            f"{_percent(row.multiply_share)} {row.operands}" if row.multiply_share is not None else "",
            best[1] if best else "",
        )
    table.add_section()
    around = (
        (f"virtual machine, {step.vm_calls} other calls", step.vm_seconds),
        ("Python: page tables, checks, choice of the token", step.python_seconds),
    )
    for what, seconds in around:
        table.add_row(what, "", "", _time(seconds), _percent(seconds / step.wall))
    outside = step.vm_seconds + step.python_seconds
    table.add_row("outside of kernels", "", "", _time(outside), _percent(outside / step.wall))
    lost = step.wall - outside - step.kernel_seconds
    if lost > _LOST * step.wall:
        table.add_row("lost to other programs", "", "", _time(lost), _percent(lost / step.wall))
    table.add_row(
        "whole step", "", str(sum(row.calls for row in step.rows)), _time(step.wall), _percent(1.0),
        human_bytes(whole["moved"]), f"{whole['moved'] / step.wall / 1e9:.1f}", _percent(whole["read_share"]),
        human_count(round(whole["operations"])), f"{whole['operations'] / step.wall / 1e9:.1f}",
    )  # fmt: skip
    if whole["unknown"]:
        table.caption = f"without counts of bytes and operations: {', '.join(whole['unknown'])}"
    return table


def limits_text(limits: MachineLimits) -> str:
    """What the shares refer to."""
    rates = ", ".join(f"{name} {rate / 1e9:.0f} Gop/s" for name, rate in limits.multiply.items())
    return (
        f"limits measured with {limits.threads} threads: read {limits.read / 1e9:.1f} GB/s; {rates}. "
        "Above 100 % of read: the bytes come from a cache."
    )


def _write_json(
    path: Path,
    artifact: Path,
    manifest: Manifest,
    speed: Speed,
    limits: MachineLimits | None,
    steps: tuple[StepRoofline, ...],
    load_average: float,
) -> None:
    plain = {
        "artifact": str(artifact),
        "llmc": manifest.llmc_version,
        "target": to_plain(manifest.target),
        "load_average": load_average,
        "speed": to_plain(speed)
        | {
            "prefill_tokens_per_second": speed.prefill_tokens_per_second,
            "decode_tokens_per_second": speed.decode_tokens_per_second,
        },
        "limits": limits.to_json() if limits else None,
        "steps": to_plain(steps),
    }
    try:
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise LlmcError("json-unwritable", f"{path} cannot be written: {e.strerror}.") from None


def _time(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
