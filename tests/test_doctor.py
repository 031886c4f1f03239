"""llmc doctor prints something useful whatever is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmc import doctor
from llmc.cli.doctor import plain_text, run_doctor
from llmc.doctor import Finding, diagnose, probe

ROOT = Path(__file__).resolve().parent.parent


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {f.name: f for f in findings}


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """tvm and torch count as importable; importing them takes seconds."""
    monkeypatch.setattr(doctor, "probe", lambda code, timeout=0: ({"llvm": 22}, ""))


def test_this_environment_works() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmc", "doctor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=True,
    )
    assert "compiling and running work" in done.stdout
    for word in ("0.27.0.post1, llvm 22", "torch", "C++ driver", "GiB available", "not in this version"):
        assert word in done.stdout, word


def test_a_broken_package_is_a_finding(tmp_path: Path) -> None:
    # a tvm that crashes on import, first on the path of doctor's own process and of its probes
    (tmp_path / "tvm.py").write_text("import os\nos.abort()\n")
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13 not found')\n")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from llmc.cli import main; import sys; sys.argv = ['llmc', 'doctor']; main()",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(tmp_path)},
        check=True,
    )
    assert "broken: killed by signal 6" in done.stdout
    assert "broken: ImportError: libcudart.so.13 not found" in done.stdout
    assert "blocked by apache-tvm" in done.stdout
    assert "pip install --force-reinstall 'apache-tvm==0.27.0.post1'" in done.stdout


def test_missing_packages_and_compiler(monkeypatch: pytest.MonkeyPatch, no_probes: None) -> None:
    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name in ("torch", "numpy") else version(name)
    )
    monkeypatch.setattr(doctor, "find_cxx", lambda: None)
    found = by_name(diagnose())
    assert found["torch"].ok is False and "only compiling needs it" in found["torch"].advice
    assert found["numpy"].value == "missing"
    assert found["C++ driver"].ok is False and "apt install g++" in found["C++ driver"].advice
    assert found["cpu"].value.endswith("compiling lacks C++ driver, torch; running works")


def test_a_wrong_version_is_named(monkeypatch: pytest.MonkeyPatch, no_probes: None) -> None:
    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: "0.1.15.post2" if name == "apache-tvm-ffi" else version(name)
    )
    finding = by_name(diagnose())["apache-tvm-ffi"]
    assert finding.ok is False and "pip install 'apache-tvm-ffi==0.1.14.post1'" in finding.advice


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch, no_probes: None) -> None:
    def broken() -> list[Finding]:
        raise OSError("no /proc here")

    monkeypatch.setattr(doctor, "_machine", broken)
    findings = diagnose()
    assert any(f.section == "problems" and "no /proc here" in f.value for f in findings)
    assert "cpu" in by_name(findings)


def test_plain_lines_where_rich_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_probes: None
) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    run_doctor()
    assert capsys.readouterr().out == plain_text(diagnose()) + "\n"


def test_a_probe_that_hangs_or_prints_nonsense() -> None:
    assert "timed out" in probe("import time; time.sleep(30)", timeout=0.5)[1]
    assert probe("print('hello')") == ({}, "unexpected output")
    assert probe("print('[1]')") == ({}, "")
    assert probe("print('noise'); print('{\"a\": 1}')") == ({"a": 1}, "")
