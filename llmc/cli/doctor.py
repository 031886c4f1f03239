"""``llmc doctor``: the findings as a table. Prints plain lines where even the table fails."""

from __future__ import annotations

import sys

from llmc.doctor import Finding, diagnose

_MARKS = {True: "ok", False: "!!", None: "  "}


def run_doctor() -> None:
    """Print all findings on stdout."""
    findings = diagnose()
    try:
        _print_table(findings)
    except Exception:  # rich itself may be what is broken
        print(plain_text(findings))


def plain_text(findings: list[Finding]) -> str:
    """The report without any library."""
    lines, section = [], ""
    for f in findings:
        if f.section != section:
            section = f.section
            lines.append(section)
        lines.append(f"  {_MARKS[f.ok]} {f.name:<16} {f.value}" + (f"  -> {f.advice}" if f.advice else ""))
    return "\n".join(lines)


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    styles = {True: "green", False: "bold red", None: "dim"}
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    section = ""
    for f in findings:
        if f.section != section:
            section = f.section
            table.add_row("", f"[bold]{section}[/bold]", "")
        style = styles[f.ok]
        advice = f"\n[yellow]-> {escape(f.advice)}[/yellow]" if f.advice else ""
        table.add_row(f"[{style}]{_MARKS[f.ok]}[/{style}]", f.name, escape(f.value) + advice)
    Console(file=sys.stdout, highlight=False).print(table)
