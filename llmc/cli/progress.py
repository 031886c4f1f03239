"""Shows a compile's progress on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from llmc.cli.format import human_bytes
from llmc.stages import ProgressReporter, Timing


def reporter(quiet: bool) -> ConsoleReporter:
    """The reporter for this process's stderr."""
    return ConsoleReporter(Console(stderr=True, highlight=False), live=sys.stderr.isatty(), quiet=quiet)


class ConsoleReporter(ProgressReporter):
    """Prints one line per finished stage; on a terminal also a spinner and bar for the running one.

    Attributes:
        finished: timings of the finished stages, for the summary.
    """

    def __init__(self, console: Console, *, live: bool, quiet: bool) -> None:
        self.finished: list[Timing] = []
        self._console = console
        self._quiet = quiet
        self._label = ""
        self._task: Any = None
        self._bar: Progress | None = None
        if live and not quiet:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )

    def stage_started(self, stage: str, number: int, total: int) -> None:
        self._label = f"[{number}/{total}] {stage}"
        if self._bar is not None:
            # a task of its own per stage, so that the clock starts anew
            self._task = self._bar.add_task(_escape(self._label), total=None)
            self._bar.start()

    def stage_finished(self, timing: Timing) -> None:
        self.finished.append(timing)
        self._clear()
        self._print(f"{self._label:<16} {timing.seconds:7.1f} s   peak memory {human_bytes(timing.peak_rss)}")

    def advance(self, done: float, total: float, what: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=done, total=total, description=_escape(f"{self._label} {what}")
            )

    def note(self, text: str) -> None:
        self._print(text)

    def timings(self, timings: Sequence[Timing]) -> None:
        # asked for by --time-passes, so printed even when quiet
        self._console.print(timing_table(timings))

    def close(self) -> None:
        self._clear()

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    def _clear(self) -> None:
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None
            self._bar.stop()


def timing_table(timings: Sequence[Timing]) -> Table:
    """Stages with their passes below them: seconds, share of the whole, peak RSS afterwards."""
    total = sum(t.seconds for t in timings if not t.part) or 1e-9
    table = Table(title="Time per stage and pass", box=None, pad_edge=False)
    table.add_column("stage")
    for column in ("seconds", "share", "peak RSS after"):
        table.add_column(column, justify="right")
    # passes are recorded before the stage that they belong to; show them below it
    timings = summed(timings)
    stages = [t for t in timings if not t.part]
    orphans = {t.stage for t in timings} - {t.stage for t in stages}
    rows = [(t, [p for p in timings if p.part and p.stage == t.stage]) for t in stages]
    rows += [(Timing(name, "", 0.0, 0), [p for p in timings if p.stage == name]) for name in sorted(orphans)]
    for stage, passes in rows:
        failed = stage.stage in orphans
        table.add_row(
            f"[bold]{stage.stage}[/bold]" + (" (failed)" if failed else ""),
            "" if failed else f"[bold]{stage.seconds:.2f}[/bold]",
            "" if failed else f"[bold]{100 * stage.seconds / total:.0f} %[/bold]",
            "" if failed else human_bytes(stage.peak_rss),
        )
        for part in passes:
            share = 100 * part.seconds / total
            table.add_row(
                f"  {part.part}", f"{part.seconds:.2f}", f"{share:.0f} %", human_bytes(part.peak_rss)
            )
    last = max((t.peak_rss for t in timings), default=0)
    table.add_row("total", f"{total:.2f}", "100 %", human_bytes(last), style="bold")
    return table


def summed(timings: Sequence[Timing]) -> list[Timing]:
    """Stages and passes that ran once per level as one each."""
    found: dict[tuple[str, str], Timing] = {}
    for t in timings:
        before = found.get((t.stage, t.part))
        seconds = t.seconds + (before.seconds if before else 0.0)
        found[t.stage, t.part] = Timing(t.stage, t.part, seconds, t.peak_rss)
    return list(found.values())


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
