"""Numbers and tables for people."""

from __future__ import annotations

from rich.table import Table

from llmc.errors import LlmcError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


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


def parse_bytes(text: str) -> int:
    """``512M``, ``2G``, ``1.5GiB`` or a plain number of bytes; binary units.

    Raises:
        LlmcError: anything else, or not positive.
    """
    upper = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = upper[-1:] if upper[-1:].isalpha() else ""
    try:
        value = int(float(upper.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value <= 0:
        raise LlmcError("size", f"A size must look like 512M or 2G; found {text!r}.")
    return value


def grid(title: str) -> Table:
    """A table of keys and values without a header."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table
