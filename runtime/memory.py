"""Memory that kernels read fast: huge-page backed anonymous memory, mapped files, and how much of it is resident."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
HUGE_PAGE = 2 << 20
_WALK = 1 << 30  # bytes per mincore call
ALIGN = 64  # bytes; compiled kernels may use aligned vector loads on every argument


def advise(mapping: mmap.mmap, *names: str) -> None:
    """madvise for each of `names` (e.g. "MADV_HUGEPAGE") that this platform knows; advice only, never an error."""
    for name in names:
        option = getattr(mmap, name, None)
        if option is None or not hasattr(mapping, "madvise"):
            continue
        try:
            mapping.madvise(option)
        except OSError:  # e.g. a kernel built without transparent huge pages
            continue


def huge_zeros(nbytes: int) -> Bytes:
    """uint8[nbytes], zero, private, on huge pages where the kernel has them; takes memory only when written to.

    The first byte lies on a huge page if nbytes is at least one, else on a page.
    """
    slack = HUGE_PAGE if nbytes >= HUGE_PAGE else 0
    # by default Python shares anonymous memory with child processes, and Linux gives shared memory no huge pages
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    mapping = mmap.mmap(-1, max(nbytes + slack, 1), **private)
    if slack:
        advise(mapping, "MADV_HUGEPAGE")
    whole = np.frombuffer(mapping, np.uint8)  # keeps the mapping alive
    start = -whole.ctypes.data % HUGE_PAGE if slack else 0
    return whole[start : start + nbytes]


def map_file(path: Path) -> Bytes:
    """The bytes of a file, mapped read-only; writing to the array would crash the process.

    numpy marks the array writable all the same: a read-only array cannot be handed over by DLPack.

    Raises:
        OSError: the file cannot be opened or mapped.
    """
    with path.open("rb") as f:
        size = path.stat().st_size
        if size == 0:
            return np.zeros(0, np.uint8)
        mapping = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ)
    advise(mapping, "MADV_HUGEPAGE", "MADV_WILLNEED")
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    raw: Any = (ctypes.c_uint8 * size).from_address(address)
    raw.mapping = mapping  # lives as long as any view of the array
    return np.ctypeslib.as_array(raw)


def aligned_zeros(count: int) -> npt.NDArray[np.int32]:
    """int32[count], zero, aligned to ALIGN bytes."""
    raw = np.zeros(count * 4 + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + count * 4].view(np.int32)


def resident_bytes(array: npt.NDArray[Any]) -> int:
    """Bytes of the array's pages that are in memory; all of them on a platform without mincore."""
    page = mmap.PAGESIZE
    start = array.ctypes.data // page * page
    end = -(-(array.ctypes.data + array.nbytes) // page) * page
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None:
        return array.nbytes
    pages = 0
    for at in range(start, end, _WALK):
        size = min(_WALK, end - at)
        flags = np.zeros(size // page, np.uint8)
        if mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), ctypes.c_void_p(flags.ctypes.data)):
            return array.nbytes
        pages += int(np.count_nonzero(flags & 1))
    return min(pages * page, array.nbytes)


def process_rss() -> int:
    """Resident bytes of this process; its peak where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak_rss()
    return pages * resource.getpagesize()


def peak_rss() -> int:
    """Largest resident set of this program so far, bytes; the kernel's figure may lag a little behind."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        # getrusage would count what the process that started this one held
        return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
