"""``python -m llmc``: the same as the ``llmc`` command."""

from __future__ import annotations

from llmc.cli import main

if __name__ == "__main__":
    main()
