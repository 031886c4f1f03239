"""What ``llmc tune`` shows: a live table of the run, its result, and what a database knows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmc.cli.format import grid
from llmc.cli.progress import ConsoleReporter
from llmc.schedules.records import Record, Status
from llmc.targets.runner import Limits
from llmc.tune.job import Job, Outcome, schedule_text, task_name
from llmc.tune.result import TuneProgress, TuneResult
from llmc.tune.scheduler import LEAST_SHARE
from llmc.tune.sources import Judge

_SHOWN = 16  # jobs in the live table


class TuneView(TuneProgress):
    """Shows the tuner at work on stderr: a live table on a terminal, a line per improvement elsewhere.

    Attributes:
        result: of the finished run.
    """

    def __init__(self, console: Console, *, live: bool, quiet: bool) -> None:
        self.result: TuneResult | None = None
        self._console, self._quiet = console, quiet
        self._live = (
            Live(console=console, refresh_per_second=4, transient=True) if live and not quiet else None
        )
        self._reporter: ConsoleReporter | None = None
        self._jobs: Sequence[Job] = ()
        self._phase, self._left, self._shown_at = "", 0.0, 0.0
        self._counts = {status: 0 for status in Status}

    def beside(self, other: ConsoleReporter) -> None:
        """Take the terminal from the reporter of the stages while tuning."""
        self._reporter = other

    def started(self, jobs: Sequence[Job], limits: Limits, budget: float) -> None:
        self._jobs, self._left = jobs, budget
        if self._reporter is not None:
            self._reporter.close()
        if self._live is not None:
            self._live.start()
        else:
            self._print(f"{len(jobs)} tasks; limits of this machine: {limits_text(limits)}")

    def note(self, text: str) -> None:
        if self._reporter is not None:  # whose progress bar has the terminal still
            self._reporter.note(text)
        else:
            self._print(text)

    def phase(self, text: str) -> None:
        self._phase = text
        if self._live is None:
            self._print(text)

    def measured(self, job: Job, schedule: Any, outcome: Outcome, left: float) -> None:
        self._left = left
        self._counts[outcome.status] += 1
        best = job.best()
        if self._live is not None:
            self._live.update(self._table())
        elif outcome.status is not Status.OK:
            self._print(
                f"{job.name}: {schedule_text(schedule, job.space.default)}: {outcome.status.value}, {outcome.note}"
            )
        elif best is not None and best[0] == schedule:
            self._print(
                f"{clock(left)} left  {job.name}: {outcome.seconds * 1e3:.3f} ms, "
                f"{100 * job.efficiency:.0f} % of the roofline, {1 / outcome.ratio:.2f}x the default"
            )

    def finished(self, result: TuneResult) -> None:
        self.result = result
        if self._live is not None:
            self._live.stop()

    def _table(self) -> Group:
        jobs = sorted(self._jobs, key=lambda j: -j.share)
        failed = ", ".join(f"{n} {s.value}" for s, n in self._counts.items() if n and s is not Status.OK)
        head = f"{self._phase}, {clock(self._left)} left, {sum(self._counts.values())} measured"
        return Group(Text(head + (f" ({failed})" if failed else "")), jobs_table(jobs[:_SHOWN]))

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)


def jobs_table(jobs: Sequence[Job]) -> Table:
    """One row per task and bucket; times in milliseconds."""
    table = Table(box=None, pad_edge=False)
    table.add_column("task", overflow="fold", min_width=14)
    for column in ("rows", "share", "default", "best", "gain", "roofline", "tried"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("schedule", overflow="fold")
    for job in jobs:
        best = job.best()
        name, rows = job.short_name, str(job.bucket)
        if job.failure:
            table.add_row(name, rows, "", "failed", "", "", "", str(len(job.measured)), job.failure)
        elif best is None:
            table.add_row(name, rows, f"{100 * job.share:.1f} %", "", "", "", "", "0", "")
        else:
            table.add_row(
                name,
                rows,
                f"{100 * job.share:.1f} %",
                f"{job.default_seconds * 1e3:.3f}",
                f"{job.best_seconds * 1e3:.3f}",
                f"{1 / job.best_ratio:.2f}x",
                f"{100 * job.efficiency:.0f} %" if job.roofline else "",
                str(len(job.measured)),
                schedule_text(best[0], job.space.default),
            )
    return table


def result_table(result: TuneResult) -> Table:
    """The jobs that were measured, those with the largest share of the step time first."""
    jobs = [job for job in result.jobs if job.measured]
    table = jobs_table(sorted(jobs, key=lambda j: -j.share))
    table.title, table.title_justify = "tuned kernels (milliseconds per call)", "left"
    table.caption_justify = "left"
    table.caption = (
        "share: of a step's time with default schedules; roofline: the least possible time over the best; tried: schedules"
        + (f"\nlimits measured: {limits_text(result.limits)}" if result.limits else "")
    )
    return table


def conclusions(result: TuneResult) -> list[str]:
    """What a run comes to."""
    lines = []
    if result.interrupted:
        lines.append("interrupted; what was measured is kept")
    failed = ", ".join(f"{n} {status}" for status, n in sorted(result.failures.items()))
    lines.append(
        f"{result.trials} candidates tried in {result.seconds:.0f} s, {result.known} measurements known before"
        + (f"; dropped: {failed}" if failed else "; none was wrong or failed")
        + (f"; {result.restarts} processes restarted" if result.restarts else "")
    )
    if result.spent and result.seconds:
        parts = (f"{k} {v:.0f} s" for k, v in result.spent.items() if not k.startswith(" ") and v >= 0.5)
        lines.append(f"waited for: {', '.join(parts)}")
    lines += _untouched(result)
    if result.limits is None:
        lines.append("nothing is left to tune: every task is known from the records")
    lines.append(
        f"expected step time: {100 * result.gain:.1f} % of that with default schedules"
        + (f"; 90 % of what was saved was found in {result.seconds_to(0.9):.0f} s" if result.curve else "")
    )
    return lines


def next_step(model: str, options: Mapping[str, Any], database: Path) -> str:
    """How to use the records: `options` of the compile beside the model, by name; None = not given."""
    given = [f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None]
    command = " ".join(["llmc compile", model, *given, f"--records {database} -o DIR"])
    return f"records: {database}; use them with: {command}"


def _untouched(result: TuneResult) -> list[str]:
    """Why tasks were left alone, and what helps."""
    idle = [job for job in result.jobs if not job.measured]
    small = sum(job.share < LEAST_SHARE for job in idle)
    lines = []
    if late := len(idle) - small:
        lines.append(f"{late} tasks were not reached in the time given: a larger --budget goes on from here")
    elif not result.trials and not result.interrupted and result.limits is not None:
        lines.append("no schedule was tried in the time given: a larger --budget goes on from here")
    if small:
        lines.append(
            f"{small} more tasks take less than {100 * LEAST_SHARE:.1f} % of a step each: left alone"
        )
    return lines


def limits_text(limits: Limits) -> str:
    """What the roofline is made of."""
    peaks = ", ".join(f"{k} {v / 1e9:.0f} Gop/s" for k, v in sorted(limits.peak.items()))
    return f"read {limits.read / 1e9:.1f} GB/s; {peaks}"


def records_tables(path: Path, records: Sequence[Record]) -> Group:
    """What a database knows, a table per machine: per task and bucket the best time and schedule."""
    if not records:
        return Group(grid(f"{path} holds no tuning records"))
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.preset, record.device, record.tvm), []).append(record)
    parts: list[Any] = [Text(f"{len(records)} tuning records in {path}")]
    for (preset, device, tvm), group in sorted(groups.items(), key=lambda item: item[0]):
        parts += [Text(), _machine_table(f"{preset}, {device}, TVM {tvm}", group)]
    return Group(*parts, Text(), Text(_LEGEND_OF_LIST))


_LEGEND_OF_LIST = (
    "best: milliseconds; gain: over the default schedule; tried, failed: schedules; not used: why a compile "
    "leaves the records out, though llmc tune begins with the best of them"
)


def _machine_table(title: str, records: Sequence[Record]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("kernel", overflow="fold", min_width=14)
    for column in ("rows", "best", "gain", "tried", "failed"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("schedule", "not used"):
        table.add_column(column, overflow="fold")
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task_key, record.low), []).append(record)
    judge = Judge()
    for (_, _), group in sorted(groups.items(), key=lambda item: item[0]):
        good = [r for r in group if r.status is Status.OK]
        best = min(good, key=lambda r: r.ratio, default=None)
        first = group[0]
        table.add_row(
            task_name(first.rule, first.task),
            str(first.bucket),
            f"{best.seconds * 1e3:.3f}" if best else "",
            f"{1 / best.ratio:.2f}x" if best and best.ratio else "",
            str(len(group)),
            str(len(group) - len(good)) if len(group) > len(good) else "",
            judge.schedule_text(best) if best else "",
            judge.objection(best or first),
        )
    return table


def clock(seconds: float) -> str:
    """``754 -> '12:34'``."""
    return time.strftime("%M:%S" if seconds < 3600 else "%H:%M:%S", time.gmtime(max(0.0, seconds)))
