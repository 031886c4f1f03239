"""The ``llmc`` command."""

from __future__ import annotations


def main() -> None:
    """Entry point of the console script; exits with 0 ok, 1 bug, 2 user error, 130 Ctrl-C."""
    from llmc.cli.app import app

    app()
