"""Facts about the machine that the runtime runs on: processor features, cores, memory."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from llmc.errors import LlmcError

# macOS's names of what /proc/cpuinfo calls otherwise (sysctl hw.optional.arm.*)
_DARWIN_ARM = {
    "FEAT_FP16": ("fphp", "asimdhp"),
    "FEAT_DotProd": ("asimddp",),
    "FEAT_BF16": ("bf16",),
    "FEAT_I8MM": ("i8mm",),
    "FEAT_LSE": ("atomics",),
    "FEAT_FHM": ("asimdfhm",),
    "FEAT_SME": ("sme",),
    "AdvSIMD": ("asimd", "fp"),
}
# Linux's names of processor features by their bits in the auxiliary vector (arch/arm64/include/uapi/asm/hwcap.h)
_HWCAP = {
    0: "fp",
    1: "asimd",
    8: "atomics",
    9: "fphp",
    10: "asimdhp",
    20: "asimddp",
    22: "sve",
    23: "asimdfhm",
}
_HWCAP2 = {1: "sve2", 9: "svei8mm", 12: "svebf16", 13: "i8mm", 14: "bf16", 23: "sme"}
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_ARCHITECTURES = {"amd64": "x86_64", "x86-64": "x86_64", "arm64": "aarch64"}


def architecture(name: str = "") -> str:
    """Processor architecture as in an LLVM triple: of `name`, or of this machine."""
    name = (name or platform.machine()).lower()
    return _ARCHITECTURES.get(name, name)


def system_of(triple: str) -> str:
    """Operating system that an LLVM triple names: linux, darwin, android or what the triple says."""
    triple = triple.lower()
    for name, words in (
        ("android", ("android",)),
        ("linux", ("linux",)),
        ("darwin", ("darwin", "macos", "apple")),
    ):
        if any(word in triple for word in words):
            return name
    return triple.split("-")[2] if triple.count("-") >= 2 else ""


def system() -> str:
    """The operating system that we run on, as system_of names it."""
    return "android" if hasattr(sys, "getandroidapilevel") else sys.platform


def features() -> frozenset[str] | None:
    """Processor features in /proc/cpuinfo's names that every core has; None = this platform does not tell."""
    if sys.platform == "darwin":
        return _darwin_features()
    # /proc/cpuinfo lists one core type after the other, may be closed to an app, and is the host's in an emulator
    told = _arm_features(*_auxiliary(_AT_HWCAP, _AT_HWCAP2)) if architecture() == "aarch64" else None
    return told or _linux_features(Path("/proc/cpuinfo"))


def _auxiliary(*kinds: int) -> list[int]:
    """Entries of the vector that the kernel gives to every process; zeros if the C library does not tell."""
    read = getattr(ctypes.CDLL(None), "getauxval", None)
    if read is None:
        return [0 for _ in kinds]
    read.restype, read.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return [int(read(kind)) for kind in kinds]


def _arm_features(hwcap: int, hwcap2: int) -> frozenset[str] | None:
    """Features by their bits in AT_HWCAP and AT_HWCAP2, those that all cores have; None = there are no bits."""
    words = ((hwcap, _HWCAP), (hwcap2, _HWCAP2))
    return frozenset(name for word, names in words for bit, name in names.items() if word >> bit & 1) or None


# Linux (5.16 and later) gives the 8 KiB of tile registers to a process that asks for them, before the first use
# (https://docs.kernel.org/arch/x86/xstate.html): arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILE_DATA = 158, 0x1023, 18
_TILE_FEATURES = frozenset(("amx_tile", "amx_int8", "amx_bf16"))


def require_permission(needed: Collection[str]) -> None:
    """Get the system's permission for processor features that need one, for all threads of this process.

    Args:
        needed: features in /proc/cpuinfo's names, all of which the processor has.

    Raises:
        LlmcError: the system refuses; kernels that use them would be ended with an illegal instruction.
    """
    asked = sorted(_TILE_FEATURES & set(needed))
    if not asked:
        return
    code = _request_tiles() if system() == "linux" else 38  # ENOSYS
    if code:
        raise LlmcError(
            "tiles-refused",
            f"The code needs the tile registers of {', '.join(asked)}; the processor has them, "
            f"but the system does not let this process use them: {os.strerror(code)}.",
            hint="Run on Linux 5.16 or later, outside of a sandbox that filters arch_prctl, "
            "or compile with --target cpu/x86-64-v4-bf16.",
        )


def _request_tiles() -> int:
    """0, or the error's number. Asking again is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.syscall
    call.restype = ctypes.c_long
    numbers = (ctypes.c_long(n) for n in (_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILE_DATA))
    return ctypes.get_errno() if call(*numbers) else 0


def _linux_features(path: Path) -> frozenset[str] | None:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    cores = [
        frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))
    ]
    return frozenset.intersection(*cores) if cores else None


def _darwin_features() -> frozenset[str] | None:
    try:
        text = subprocess.run(
            ["sysctl", "hw.optional", "machdep.cpu"], capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return None
    found: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        value = value.strip()
        if key in ("machdep.cpu.features", "machdep.cpu.leaf7_features", "machdep.cpu.extfeatures"):
            # e.g. AVX1.0 -> avx, SSE4.2 -> sse4_2
            found |= {w.lower().replace("avx1.0", "avx").replace(".", "_") for w in value.split()}
        elif value == "1":
            found |= set(_DARWIN_ARM.get(key.rpartition(".")[2], ()))
    return frozenset(found) or None


def default_threads() -> int:
    """Worker threads for kernels: the cores that this process may use, hyper-threads counted once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core_of(cpu) for cpu in allowed}
    return max(1, min(len(cores), _cgroup_cpus(Path("/sys/fs/cgroup/cpu.max"))))


def _core_of(cpu: int) -> str:
    """A name shared by the hyper-threads of one core."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(
            encoding="ascii"
        )
    except OSError:
        return str(cpu)


def _cgroup_cpus(path: Path) -> int:
    """Whole processors that the container's quota allows (cgroup v2); a large number without a quota."""
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return 1 << 30


def processor_name() -> str:
    """Model of the processor as the system names it."""
    for key in ("model name", "CPU part", "cpu"):
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
                if line.startswith(key):
                    return " ".join(line.partition(":")[2].split())
        except OSError:
            break
    return platform.processor() or platform.machine()


def cache_bytes() -> int:
    """Bytes of the last-level caches together; 32 MiB where the system does not tell."""
    found: dict[str, int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((index / "level").read_text(encoding="ascii"))
            size = (index / "size").read_text(encoding="ascii").strip()
            shared = (index / "shared_cpu_list").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if size[:-1].isdigit():
            found[f"{level}:{shared}"] = int(size[:-1]) << {"K": 10, "M": 20}.get(size[-1], 0)
    last = max((int(name.partition(":")[0]) for name in found), default=0)
    return sum(size for name, size in found.items() if name.startswith(f"{last}:")) or 32 << 20


def available_memory() -> int:
    """Bytes that can be allocated without swapping, within the container's limit."""
    return min(_meminfo(Path("/proc/meminfo")), _cgroup_memory(Path("/sys/fs/cgroup")))


def _meminfo(path: Path) -> int:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:  # macOS: half of the memory is a fair guess of what is available
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (OSError, ValueError):
        return 4 << 30


def _cgroup_memory(folder: Path) -> int:
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        return max(limit - int((folder / "memory.current").read_text(encoding="ascii")), 0)
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return 1 << 62
