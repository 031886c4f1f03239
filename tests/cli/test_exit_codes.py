"""Errors, Ctrl-C and a closed pipe become exit codes; help is fast."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmc.cli.guard import guard
from llmc.errors import LlmcError
from tests.cli.conftest import ROOT, WIDE


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (LlmcError("x-y", "Found 3.", hint="Use 4."), 2, "llmc: Found 3. Use 4. [x-y]"),
        (LlmcError("internal-error", "Pass A failed."), 1, "llmc: Pass A failed. [internal-error]"),
        (ValueError("boom"), 1, "llmc: ValueError: boom. This is a bug in llmc"),
        (KeyboardInterrupt(), 130, "llmc: interrupted."),
    ],
)
def test_guard(
    error: BaseException,
    code: int,
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import typer

    with pytest.raises(typer.Exit) as e, guard():
        raise error
    assert e.value.exit_code == code
    captured = capsys.readouterr()
    assert captured.err.startswith(text) and "Traceback" not in captured.err and captured.out == ""
    monkeypatch.setenv("LLMC_DEBUG", "1")
    with pytest.raises(typer.Exit), guard():
        raise error
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_help_is_fast_and_needs_neither_tvm_nor_torch(tmp_path: Path) -> None:
    for name in ("tvm", "torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('must not be imported')")
    start = time.perf_counter()
    for arguments in (["--help"], ["compile", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-m", "llmc", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**WIDE, "PYTHONPATH": str(tmp_path)},
            check=True,
        )
        assert "llmc" in done.stdout
    # three times well under a second each; generous, because test machines are shared
    assert time.perf_counter() - start < 6


def test_ctrl_c_during_compile_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    # a pipeline that hangs in the middle of writing, in a process of its own
    (tmp_path / "slow.py").write_text(
        "import sys, time, llmc.pipeline\n"
        "from llmc.writer import ArtifactWriter\n"
        "from llmc.cli import main\n"
        "def compile_model(model, output, **_):\n"
        "    with ArtifactWriter(output) as w:\n"
        "        (w.folder / 'model.so').write_text('half')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "llmc.pipeline.compile_model = compile_model\n"
        "sys.argv = ['llmc', 'compile', 'm', '-o', sys.argv[1], '-q']\n"
        "main()\n"
    )
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "out" / "demo")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**WIDE, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code, errors
        assert b"Traceback" not in errors
        assert not (tmp_path / "out").exists()


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "from llmc.cli.guard import guard\nimport sys, typer\n"
        "def work():\n    with guard():\n        while True:\n            print('x' * 9999, flush=True)\n"
        "typer.run(work)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=WIDE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 141
