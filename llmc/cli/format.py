"""Numbers and tables for people."""

from __future__ import annotations

from rich.table import Table


def human_bytes(count: float) -> str:
    """``1536 -> '1.5 KiB'``; binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def human_count(count: int) -> str:
    """``8030261248 -> '8.03 B'``; decimal units, as parameters are counted."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def grid(title: str) -> Table:
    """A table of keys and values without a header."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table
