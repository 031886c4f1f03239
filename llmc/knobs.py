"""All environment variables that llmc reads. Nothing else in the tree reads os.environ."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def debug() -> bool:
    """LLMC_DEBUG=1: print tracebacks for user errors too."""
    return os.environ.get("LLMC_DEBUG", "") not in ("", "0")


def cache_dir() -> Path:
    """LLMC_CACHE: folder for reproducers and other files that outlive a command (default ~/.cache/llmc)."""
    return Path(os.environ.get("LLMC_CACHE", "~/.cache/llmc")).expanduser()


def source_date_epoch() -> int | None:
    """SOURCE_DATE_EPOCH (reproducible-builds.org): the timestamp to write instead of the current time."""
    value = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(value) if value.isdigit() else None


def cxx() -> str:
    """LLMC_CXX: the C++ driver that links model.so (default: g++, clang++ or c++, the first on PATH)."""
    return os.environ.get("LLMC_CXX", "")


def level() -> str:
    """LLMC_LEVEL: the level of processor features to load (default: the best that this machine runs)."""
    return os.environ.get("LLMC_LEVEL", "")


def emulator() -> list[str]:
    """LLMC_EMULATOR: command of a Python that runs as on the target's processor; see llmc.emulated."""
    return shlex.split(os.environ.get("LLMC_EMULATOR", ""))


def fault() -> str:
    """LLMC_FAULT: name of a fault to inject in tests, e.g. ``disk-full``; never set in production."""
    return os.environ.get("LLMC_FAULT", "")


def threads() -> int | None:
    """TVM_NUM_THREADS: worker threads of compiled kernels (default: the cores that the process may use)."""
    value = os.environ.get("TVM_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None


def set_threads(threads: int) -> None:
    """Set TVM's worker count; must run before the first parallel kernel of the process."""
    os.environ["TVM_NUM_THREADS"] = str(threads)


def cuda_compiler() -> str:
    """LLMC_CUDA_COMPILER: nvrtc or nvcc (default: nvrtc if it is installed, else nvcc)."""
    return os.environ.get("LLMC_CUDA_COMPILER", "")


def cuda_graphs() -> bool:
    """LLMC_CUDA_GRAPHS=0: launch the kernels of decode steps one by one instead of replaying CUDA graphs."""
    return os.environ.get("LLMC_CUDA_GRAPHS", "1") != "0"
