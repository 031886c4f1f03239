"""Folders that are made once per test run, whichever of its processes asks first, and how tiny models are compiled."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

# how tests compile tiny models that they compare with transformers themselves
TINY = {"dtype": "f32", "verify": "off", "max_seq_len": 128}
# what a compile must know to give the same bytes again
REPEATABLE = {"SOURCE_DATE_EPOCH": "1"}


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of this run, filled by `make` the first time. Nobody may change it: copy it.

    With pytest-xdist a session fixture is set up in every worker, and a compile takes ten seconds of a core.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.parent / f"{name}.done"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt left
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
