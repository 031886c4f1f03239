"""Linking model.so: the C++ driver, the embedded manifest, and tvm's export with reproducible bytes."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmc import knobs
from llmc.errors import LlmcError
from llmc.host import architecture
from llmc.runtime.embedded import SIZE_SYMBOL, SYMBOL

DRIVERS = ("g++", "clang++", "c++")

_GLIBC = "2.28"  # the oldest that TVM's own wheels run with
# no build id, no symbol table (it names temporary files): the same objects give the same bytes
_LINUX_FLAGS = ("-Wl,--build-id=none", "-Wl,-s", "-Wl,--as-needed", "-static-libgcc", "-lm")
_DARWIN_FLAGS = ("-undefined", "dynamic_lookup", "-Wl,-S", "-Wl,-x", "-Wl,-no_uuid")


def find_cxx(triple: str = "") -> list[str] | None:
    """How the C++ driver is called: LLMC_CXX, or the first of DRIVERS on PATH; None = there is none.

    Args:
        triple: what it must link for. For another processor than this machine's: Debian's cross driver, else the
            compiler of the package ziglang, which carries the C libraries of all.
    """
    if knobs.cxx():
        path = shutil.which(knobs.cxx())
        return None if path is None else [path]
    machine = _foreign(triple)
    for name in (f"{machine}-linux-gnu-g++",) if machine else DRIVERS:
        if path := shutil.which(name):
            return [path]
    if machine and importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{_GLIBC}"]
    return None


def _foreign(triple: str) -> str:
    """The processor that `triple` names; "" = this machine's, or none."""
    machine = architecture(triple.partition("-")[0]) if triple else ""
    return "" if machine == architecture() else machine


def require_cxx(triple: str = "") -> list[str]:
    """find_cxx, or a sentence on what to install."""
    found = find_cxx(triple)
    if found is not None:
        return found
    machine = _foreign(triple)
    if machine and not knobs.cxx():
        raise LlmcError(
            "no-cross-cxx",
            f"Linking model.so for {machine} on this {architecture()} machine needs a cross compiler driver; neither "
            f"{machine}-linux-gnu-g++ is on PATH nor the package ziglang installed.",
            hint=f"apt install g++-{machine.replace('_', '-')}-linux-gnu (Debian, Ubuntu), or pip install ziglang, "
            "or set LLMC_CXX to a driver's path.",
        )
    wanted = f"LLMC_CXX={knobs.cxx()}" if knobs.cxx() else ", ".join(DRIVERS)
    raise LlmcError(
        "no-cxx",
        f"Linking model.so needs a C++ compiler driver; none was found on PATH ({wanted}).",
        hint="Install one (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
        "macOS: xcode-select --install) or set LLMC_CXX to its path.",
    )


def run_cxx(arguments: Sequence[str], cwd: Path | None = None, *, triple: str = "") -> None:
    """Run the C++ driver for `triple` ("" = this machine).

    Raises:
        LlmcError: there is none, it failed, or the disk is full.
    """
    command = [*require_cxx(triple), *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as e:
        raise LlmcError(
            "no-cxx", f"{command[0]} cannot be run: {e.strerror}.", hint="Set LLMC_CXX."
        ) from None
    if done.returncode == 0:
        return
    output = (done.stdout + done.stderr).strip()
    if "No space left on device" in output:
        raise LlmcError(
            "disk-full", "The disk is full: model.so could not be linked.", hint="Free space and retry."
        )
    last = output.splitlines()[-1] if output else "no output"
    raise LlmcError(
        "link-failed",
        f"{Path(command[0]).name} failed with exit code {done.returncode}: {last}.",
        hint="LLMC_DEBUG=1 shows the whole output.",
        context={"command": command, "output": output},
    )


def embed_manifest(manifest_text: str, folder: Path, *, triple: str = "") -> Path:
    """Compile the manifest into an object file in `folder` and return its path.

    Exported symbols: ``char llmc_manifest[]`` (UTF-8, NUL-terminated) and ``uint64_t llmc_manifest_size``
    (bytes without the NUL).
    """
    raw = manifest_text.encode()
    if b"\0" in raw:
        raise ValueError("a manifest holds no NUL")
    source = folder / "llmc_manifest.cc"
    export = '__attribute__((visibility("default"), used))'
    lines = [
        'extern "C" {',
        f"extern const char {SYMBOL}[];",
        f"extern const unsigned long long {SIZE_SYMBOL};",
        f"{export} const char {SYMBOL}[] =",
        *(_literal(raw[i : i + 2048]) for i in range(0, len(raw), 2048)),
        '"";' if raw else ";",
        f"{export} const unsigned long long {SIZE_SYMBOL} = {len(raw)}ull;",
        "}",
    ]
    source.write_text("\n".join(lines) + "\n", encoding="ascii")
    # relative names, so that no temporary path ends up in the object
    run_cxx(["-c", "-O0", "-g0", "-fPIC", source.name, "-o", "llmc_manifest.o"], cwd=folder, triple=triple)
    return folder / "llmc_manifest.o"


def export_objects(executable: Any, folder: Path) -> list[Path]:
    """Write the object files of a tvm executable (or runtime module) into `folder`; LLVM makes the code here.

    The same executable gives the same bytes under the same names.
    """
    kept: list[Path] = []

    def keep(output: str, files: Sequence[str], **_: Any) -> None:
        kept.extend(Path(f) for f in files)

    executable.export_library(str(folder / "unused.so"), fcompile=keep, workspace_dir=str(folder))
    return kept


def link_objects(objects: Sequence[Path], path: Path, *, triple: str = "") -> None:
    """Link object files into the shared library `path`; the same objects give the same bytes.

    Raises:
        LlmcError: see run_cxx.
    """
    flags = _DARWIN_FLAGS if sys.platform == "darwin" and not _foreign(triple) else _LINUX_FLAGS
    run_cxx(["-shared", "-fPIC", "-o", str(path), *map(str, objects), *flags], triple=triple)


def link_library(executable: Any, path: Path, objects: Sequence[Path] = ()) -> None:
    """Link a tvm executable (or runtime module) and `objects` into the shared library `path`.

    The same executable and objects give the same bytes.

    Raises:
        LlmcError: see run_cxx.
    """
    require_cxx()
    with tempfile.TemporaryDirectory(prefix="llmc-link-") as work:
        link_objects([*objects, *export_objects(executable, Path(work))], path)


def _literal(raw: bytes) -> str:
    """A C string literal of `raw`; octal escapes, because a hexadecimal one has no fixed length."""
    out = []
    for byte in raw:
        char = chr(byte)
        out.append(char if 32 <= byte < 127 and char not in '"\\?' else f"\\{byte:03o}")
    return '"' + "".join(out) + '"'
