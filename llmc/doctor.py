"""What this machine and its Python environment offer to llmc.

Every check is independent and none raises: a broken tvm or driver is a finding, not a failure. tvm and torch
are imported in a process of their own, because a broken native library can take the whole process with it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from llmc import __version__, host, knobs
from llmc.link import find_cxx

# tvm-ffi 0.1.15 crashes in tvm.ir.save_json; see pyproject.toml
REQUIRED = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
COMPILE = {"torch": "2.13.0", "transformers": "5.23.0"}
OTHERS = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2", "typer", "rich", "huggingface_hub")

# distribution -> code that prints one line of JSON about it
_PROBES = {
    "apache-tvm": (
        "import json, tvm; print(json.dumps({'version': tvm.__version__,"
        "'llvm': tvm.target.codegen.llvm_version_major()}))"
    ),
    "torch": (
        "import json, torch;"
        "print(json.dumps({'version': torch.__version__, 'threads': torch.get_num_threads()}))"
    ),
}
# flags of /proc/cpuinfo that kernels make use of
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: heading that it belongs to.
        name: what was looked at.
        value: what was found.
        ok: False = something that llmc needs is missing or broken; None = nothing to judge.
        advice: what to do about it; empty if nothing.
    """

    section: str
    name: str
    value: str
    ok: bool | None = None
    advice: str = ""


def diagnose() -> list[Finding]:
    """All findings, in the order in which to print them."""
    checks: list[Callable[[], list[Finding]]] = [_python, _packages, _machine, _compiler]
    findings: list[Finding] = []
    for check in checks:
        findings += _safely(check)
    return findings + _safely(lambda: _targets(findings))


def _safely(check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as e:
        name = getattr(check, "__name__", "check").strip("_<>")
        return [Finding("problems", name, f"{type(e).__name__}: {e}", False, "Please report this.")]


def _python() -> list[Finding]:
    section = "llmc"
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return [
        Finding(section, "llmc", f"{__version__} in {Path(__file__).resolve().parent}"),
        Finding(
            section,
            "python",
            f"{platform.python_version()} in {sys.executable}",
            supported,
            "" if supported else "llmc is tested with Python 3.10 to 3.13.",
        ),
        Finding(section, "system", platform.platform()),
        Finding(section, "cache", str(knobs.cache_dir())),
    ]


def _packages() -> list[Finding]:
    findings = [_package(name, want, needed=True) for name, want in REQUIRED.items()]
    findings += [_package(name, want, needed=False) for name, want in COMPILE.items()]
    for name in OTHERS:
        findings.append(Finding("packages", name, _version(name) or "missing"))
    return findings


def _package(name: str, want: str, *, needed: bool) -> Finding:
    found = _version(name)
    extra = "llmc-compiler" if needed else "llmc-compiler[compile]"
    if found is None:
        why = "" if needed else " (only compiling needs it)"
        return Finding("packages", name, "missing", False, f"pip install '{extra}'{why}")
    text, ok, advice = found, True, ""
    if found.partition("+")[0] != want:
        ok, advice = False, f"llmc is made for {name}=={want}; pip install '{name}=={want}'"
    if name in _PROBES:
        facts, problem = probe(_PROBES[name])
        if problem:
            return Finding(
                "packages",
                name,
                f"{found}, broken: {problem}",
                False,
                f"pip install --force-reinstall '{name}=={want}'",
            )
        text += "".join(f", {key} {value}" for key, value in facts.items() if key != "version")
    return Finding("packages", name, text, ok, advice)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def probe(code: str, timeout: float = 120) -> tuple[dict[str, object], str]:
    """Run `code` in a fresh interpreter: (the JSON object that it printed, "") or ({}, what went wrong)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return {}, str(e)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        signal = (
            f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        )
        return {}, lines[-1] if lines else signal
    try:
        value = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {}, "unexpected output"
    return value if isinstance(value, dict) else {}, ""


def _machine() -> list[Finding]:
    section = "machine"
    flags = host.features() or frozenset()
    found = [f for f in CPU_FLAGS if f in flags]
    out = [
        Finding(section, "CPU", f"{cpu_name()} ({platform.machine()})"),
        Finding(section, "features", " ".join(found) or "none that llmc asks for"),
        Finding(
            section, "threads", f"{host.default_threads()} by default, of {os.cpu_count()} logical processors"
        ),
        Finding(section, "memory", f"{host.available_memory() / 2**30:.1f} GiB available"),
    ]
    disk = shutil.disk_usage(Path.cwd())
    out.append(Finding(section, "disk", f"{disk.free / 2**30:.1f} GiB free in {Path.cwd()}"))
    return out


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown CPU"


def _compiler() -> list[Finding]:
    command = find_cxx()
    if command is None:
        advice = "compiling needs one: apt install g++ (macOS: xcode-select --install), or set LLMC_CXX"
        return [Finding("tools", "C++ driver", "missing", False, advice)]
    try:
        done = subprocess.run(
            [*command, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        line = (done.stdout or done.stderr).strip().splitlines()
        text, ok = f"{command[0]}: {line[0] if line else 'no version'}", done.returncode == 0
    except (OSError, subprocess.TimeoutExpired) as e:
        text, ok = f"{command[0]}: {e}", False
    return [Finding("tools", "C++ driver", text, ok, "" if ok else "set LLMC_CXX to one that works")]


def _cuda(section: str) -> Finding:
    """Whether artifacts for NVIDIA GPUs can be compiled and run here."""
    from llmc.cuda_driver import query
    from llmc.errors import LlmcError

    driver = query()
    names = ", ".join(f"{d.name} (sm_{d.arch})" for d in driver.devices)
    runs = f"{names}, driver for CUDA {driver.version_text}" if names else f"cannot run: {driver.problem}"
    try:
        from llmc.targets.cuda.compiler import version

        compiles = f"compiles with {version()}"
    except LlmcError as e:
        return Finding(section, "cuda", f"cannot compile; {runs}", None, e.hint)
    except Exception as e:  # a broken tvm or library: the report goes on
        return Finding(section, "cuda", f"cannot compile: {e}; {runs}", None)
    return Finding(section, "cuda", f"{compiles}; {runs}", True if names else None)


def _targets(findings: list[Finding]) -> list[Finding]:
    """Which targets work, from what was found."""
    bad = {f.name for f in findings if f.ok is False}
    section = "targets"
    out = []
    try:
        from llmc.targets.cpu.backend import BACKEND, detect

        runs = [p for p in BACKEND.presets if not BACKEND.missing(BACKEND.capabilities(p))]
        machine, machine_ok = f"cpu/{detect()}, runs the levels {', '.join(runs)}", True
    except Exception as e:
        machine, machine_ok = str(e), False
    blocked = sorted(bad & set(REQUIRED))
    if not machine_ok:
        out.append(Finding(section, "cpu", machine, False))
    elif blocked:
        out.append(Finding(section, "cpu", f"{machine}, blocked by {', '.join(blocked)}", False))
    else:
        lacking = sorted(bad & {*COMPILE, "C++ driver"})
        text = (
            f"compiling lacks {', '.join(lacking)}; running works"
            if lacking
            else "compiling and running work"
        )
        out.append(Finding(section, "cpu", f"{machine}: {text}", not lacking))
    out.append(_cuda(section))
    for name in ("vulkan", "android"):
        out.append(Finding(section, name, "not in this version"))
    return out
