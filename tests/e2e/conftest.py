"""The demo model as a user compiles it, compiled once per test run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.shared import REPEATABLE, made_once

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "models" / "stdlib-llama"


def llmc_command(
    *arguments: str | Path, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `llmc ARGUMENTS` in a process of its own, which has to end with `code`."""
    fixed = {"COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **REPEATABLE}
    done = subprocess.run(
        [sys.executable, "-m", "llmc", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **fixed, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@dataclass(frozen=True)
class CompiledDemo:
    """Attributes:
    artifact: its folder, which was moved after the compile; copy it before a change.
    printed: what the compile wrote to the terminal.
    dumps: the folder of --dump-ir.
    """

    artifact: Path
    printed: str
    dumps: Path


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> CompiledDemo:
    def make(folder: Path) -> None:
        options = ["--target", "cpu", "--time-passes", "--dump-ir", folder / "ir"]
        done = llmc_command(
            "compile", DEMO, "-o", folder / "dist", *options, LLMC_CACHE=str(folder / "cache")
        )
        # the artifact must not depend on where it was compiled
        (folder / "dist").rename(folder / "elsewhere")
        (folder / "printed.txt").write_text(done.stdout + done.stderr)

    folder = made_once(tmp_path_factory, "demo", make)
    return CompiledDemo(folder / "elsewhere", (folder / "printed.txt").read_text(), folder / "ir")


@pytest.fixture(scope="session")
def artifact(demo: CompiledDemo) -> Path:
    """The demo's artifact; copy it before a change."""
    return demo.artifact
