"""Tables of bench results."""

from __future__ import annotations

import statistics
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

# sides whose bits per weight differ by more are not comparable, and the table says so
_SAME_BITS = 0.05


def compare_batch(batch: int, one: list[float], many: list[float]) -> dict[str, Any]:
    """Seconds per step of one sequence and of `batch`."""
    a, b = statistics.median(one), statistics.median(many)
    return {
        "size": batch,
        "one_seconds": a,
        "batch_seconds": b,
        "tokens_per_second": batch / b,
        "speedup": batch * a / b,
    }


def compare_context(
    short: int, long: int, near: list[float], far: list[float], prefill: list[float], peak_rss: int
) -> dict[str, Any]:
    """Seconds per step after `short` and after `long` tokens."""
    a, b = statistics.median(near), statistics.median(far)
    return {
        "short": short,
        "long": long,
        "short_seconds": a,
        "long_seconds": b,
        "ratio": b / a,
        "long_prefill_seconds": statistics.median(prefill),
        "peak_rss_bytes": peak_rss,
    }


def show(result: dict[str, Any]) -> None:
    """Print one case."""
    # a table that goes to a file or a pipe is not cut to a terminal's width
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    console.print(sides_table(result))
    for line in notes(result):
        console.print(line)
    console.print()


def sides_table(result: dict[str, Any]) -> Table:
    """A row per side, and a row of ratios per peer."""
    title = (
        f"{result['shape']} {result['quant']}, {result['threads']} threads, prompt {result['prompt']}, "
        f"{result['rounds']} rounds of {result['tokens']} tokens, medians; {result['machine']}"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("format")
    columns = ("bits/weight", "prefill tok/s", "±", "of peak", "decode tok/s", "±", "of bandwidth", "RSS MiB")
    for column in columns:
        table.add_column(column, justify="right")
    for name, side in result["sides"].items():
        table.add_row(
            name,
            side["format"],
            f"{side['bits_per_weight']:.2f}",
            f"{side['prefill_tokens_per_second']:.1f}",
            f"{100 * side['prefill_spread']:.0f} %",
            f"{100 * side['prefill_share_of_multiply_peak']:.0f} %",
            f"{side['decode_tokens_per_second']:.2f}",
            f"{100 * side['decode_spread']:.0f} %",
            f"{100 * side['decode_share_of_read_bandwidth']:.0f} %",
            f"{side['peak_rss_bytes'] / 2**20:.0f}",
        )
    for name, ratio in result["ratios"].items():
        table.add_row(
            f"llmc / {name}", "", "", f"{ratio['prefill']:.2f}", "", "", f"{ratio['decode']:.2f}", "", "", ""
        )
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """What must be said beside the table."""
    lines = []
    own = result["sides"]["llmc"]["bits_per_weight"]
    same = dict(result["ratios"])
    for name, side in result["sides"].items():
        differs = side["bits_per_weight"] / own - 1
        if differs > _SAME_BITS:  # a smaller one is no easier opponent
            same.pop(name, None)
        if abs(differs) > _SAME_BITS:
            lines.append(
                f"not the same size: {name} has {side['bits_per_weight']:.2f} bits per weight, "
                f"{100 * differs:+.0f} % of llmc's {own:.2f}"
            )
    if same:
        best = [
            f"{key} {min(r[key] for r in same.values()):.2f} ({min(same, key=lambda n: same[n][key])})"
            for key in ("prefill", "decode")
        ]
        lines.append(f"against the fastest side of at most llmc's size (and 5 %): {', '.join(best)}")
    for name, why in result["missing"].items():
        lines.append(f"{name} was not measured: {why.splitlines()[0]}")
    if "batch" in result:
        b = result["batch"]
        lines.append(
            f"batch {b['size']}: {b['tokens_per_second']:.1f} tok/s, {b['speedup']:.2f} times one sequence's "
            f"({1e3 * b['batch_seconds']:.2f} and {1e3 * b['one_seconds']:.2f} ms per step)"
        )
    if "context" in result:
        c = result["context"]
        lines.append(
            f"context {c['long']}: {1e3 * c['long_seconds']:.2f} ms per step, {c['ratio']:.2f} times that at "
            f"{c['short']} ({1e3 * c['short_seconds']:.2f} ms); prefill {c['long_prefill_seconds']:.1f} s, "
            f"peak RSS {c['peak_rss_bytes'] / 2**20:.0f} MiB"
        )
    limits = result["limits"]
    rates = ", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in limits["multiply"].items())
    lines.append(
        f"limits, {limits['threads']} threads: read {limits['read'] / 1e9:.1f} GB/s; operations: {rates}"
    )
    if result["load_average"] > 0.5:
        lines.append(f"the machine was busy: load average {result['load_average']:.1f}")
    lines.append(f"compiled in {result['compile_seconds']:.1f} s; {result['versions']}")
    return lines
