"""Run llmc on an emulated aarch64 machine: python tools/run_aarch64.py [--setup | --command | ARGUMENTS OF PYTHON ...].

    python tools/run_aarch64.py --setup          # once: a folder with arm64 Python, glibc, TVM's runtime, numpy, ...
    python tools/run_aarch64.py -m llmc.cli run dist/demo "import os" --max-tokens 8
    python tools/run_aarch64.py -c "import llmc; print(llmc.load('dist/demo').generate([1, 2, 3], max_tokens=4).token_ids)"

Needs qemu-aarch64 (user mode: Linux system calls go to this machine), and for --setup apt-get, dpkg-deb and pip; no root.
What is downloaded: Debian's arm64 packages of Python 3.11 and the wheels that pyproject.toml asks for at run time.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from llmc import knobs
from llmc.errors import LlmcError

ROOT = Path(__file__).resolve().parent.parent
QEMU = "qemu-aarch64"
CPU = "max"  # dotprod, fp16, i8mm, bf16 and what came later
_PYTHON = "3.11"
_SUITE = "bookworm"  # the Debian release that has it
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_PACKAGES = (
    "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 "
    "libssl3 libffi8 libbz2-1.0 liblzma5"
).split()
_PLATFORMS = (
    "manylinux_2_28_aarch64",
    "manylinux_2_27_aarch64",
    "manylinux_2_17_aarch64",
    "manylinux2014_aarch64",
)


def folder() -> Path:
    """Where the emulated machine's files are."""
    return knobs.cache_dir() / "aarch64"


def lacking() -> str:
    """One sentence on what to install before anything can be emulated; "" = nothing."""
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not on PATH: apt install qemu-user"
    if not (folder() / "complete").exists():
        return f"there is no emulated machine in {folder()}: python tools/run_aarch64.py --setup"
    return ""


def command(cpu: str = CPU) -> list[str]:
    """What starts the emulated machine's Python; this working tree is importable in it.

    Raises:
        LlmcError: see lacking.
    """
    why = lacking()
    if why:
        raise LlmcError("no-emulator", f"aarch64 cannot be emulated here; {why}.")
    path = os.pathsep.join((str(folder() / "site"), str(ROOT)))
    python = folder() / "root" / "usr" / "bin" / f"python{_PYTHON}"
    # no paths of this machine's Python reach the emulated one
    environment = ["-E", f"PYTHONPATH={path}", "-U", "PYTHONHOME", "-U", "LD_LIBRARY_PATH"]
    return [QEMU, "-cpu", cpu, "-L", str(folder() / "root"), *environment, str(python), "-s"]


def set_up() -> None:
    """Download and unpack the emulated machine's files; what is there is replaced when the new files are whole.

    Raises:
        LlmcError: a tool is missing or a download failed.
    """
    for tool in ("apt-get", "dpkg-deb", QEMU):
        if shutil.which(tool) is None:
            raise LlmcError(
                "no-emulator", f"The emulated machine needs {tool}, which is not on PATH.", hint=_HINT
            )
    final, work = folder(), folder().with_name(f".aarch64.tmp-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    try:
        _system(work)
        _site(work / "site")
        (work / "complete").touch()
        shutil.rmtree(final, ignore_errors=True)
        work.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


_HINT = "Debian/Ubuntu: apt install qemu-user g++-aarch64-linux-gnu debian-archive-keyring."


def _system(work: Path) -> None:
    """Debian's packages, with lists and caches of their own: this machine's apt is not touched."""
    lists, archive = work / "apt" / "lists", work / "apt" / "cache"
    for path in (lists / "partial", archive / "archives" / "partial", work / "debs", work / "root"):
        path.mkdir(parents=True)
    sources = work / "apt" / "sources.list"
    signed = f" [signed-by={_KEYRING}]" if _KEYRING.exists() else ""
    sources.write_text(f"deb{signed} http://deb.debian.org/debian {_SUITE} main\n", encoding="ascii")
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": work / "apt",
        "Dir::State::Lists": lists,
        "Dir::State::status": "/dev/null",
        "Dir::Cache": archive,
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "-",
    }
    apt = ["apt-get", "-qq", *(word for k, v in options.items() for word in ("-o", f"{k}={v}"))]
    _run([*apt, "update"])
    _run([*apt, "download", *_PACKAGES], cwd=work / "debs")
    for package in sorted((work / "debs").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(work / "root")])
    for name in ("apt", "debs"):
        shutil.rmtree(work / name)


def _site(site: Path) -> None:
    """The wheels of llmc's runtime."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--only-binary=:all:", *platforms]
    _run([*pip, "--python-version", _PYTHON, "--target", str(site), *project["dependencies"]])


def _run(words: list[str], cwd: Path | None = None) -> None:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        output = (done.stderr or done.stdout).strip().splitlines()
        raise LlmcError(
            "emulator-setup",
            f"{Path(words[0]).name} failed with exit code {done.returncode}: {output[-1] if output else 'no output'}.",
            context={"command": words},
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--setup", action="store_true", help="make the emulated machine's files, or make them anew"
    )
    parser.add_argument("--command", action="store_true", help="print what to set LLMC_EMULATOR to")
    parser.add_argument("--cpu", default=CPU, help=f"processor that qemu shows (default: {CPU})")
    parser.add_argument("python", nargs=argparse.REMAINDER, help="arguments of the emulated Python")
    args = parser.parse_args()
    try:
        if args.setup:
            set_up()
            print(f"The emulated machine is in {folder()}.")
        if args.command:
            print(shlex.join(command(args.cpu)))
        if args.python:
            return subprocess.run([*command(args.cpu), *args.python], check=False).returncode
    except LlmcError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if not (args.setup or args.command):
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
