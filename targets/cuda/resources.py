"""What a kernel takes of a multiprocessor, from the assembler's report, and the limits that it may not exceed."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmc.artifact import DeviceKernel
from llmc.errors import LlmcError

_COMPILING = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")

STATIC_SHARED = 48 * 1024  # bytes of shared memory that a kernel may declare (CUDA programming guide, 20.6)
_SPILLS = 1024  # bytes per thread; more means that a schedule is wrong for the architecture


def parse(log: str) -> tuple[DeviceKernel, ...]:
    """The kernels of a ``ptxas -v`` report, in its order.

    The report names a kernel, then its stack frame and spills, then its registers and shared memory.
    """
    found: list[DeviceKernel] = []
    name, arch, stores, loads, stack = "", "", 0, 0, 0
    for line in log.splitlines():
        if match := _COMPILING.search(line):
            name, arch = match[1], match[2]
        elif match := _FRAME.search(line):
            stack, stores, loads = (int(v) for v in match.groups())
        elif (match := _REGISTERS.search(line)) and name:
            shared = _SHARED.search(line)
            found.append(
                DeviceKernel(name, arch, int(match[1]), int(shared[1]) if shared else 0, stack, stores, loads)
            )
            name, stores, loads, stack = "", 0, 0, 0
    return tuple(found)


def check(
    kernels: Iterable[DeviceKernel],
    threads: dict[str, int],
    dynamic: dict[str, int] | None = None,
    shared: int = 0,
) -> None:
    """Raise if a kernel cannot be launched, or spills so much that it must be a mistake.

    Args:
        threads: kernel -> threads of a block.
        dynamic: kernel -> bytes of shared memory that its launch asks for, beside those that it declares.
        shared: most bytes of both together that the architecture has for a block.

    Raises:
        LlmcError: "kernel-limits".
    """
    for k in kernels:
        block = threads.get(k.name, 1)
        # registers are handed out to whole warps, 256 at a time (CUDA occupancy calculator)
        warps = -(-block // 32)
        taken = warps * (-(-k.registers * 32 // 256) * 256)
        whole = k.shared_bytes + (dynamic or {}).get(k.name, 0)
        problems = [
            (whole > shared > 0, f"{whole} bytes of shared memory; a block may have {shared}"),
            (taken > 65536, f"{k.registers} registers in {block} threads; a multiprocessor has 65536"),
            (
                k.shared_bytes > STATIC_SHARED,
                f"{k.shared_bytes} bytes of shared memory, {STATIC_SHARED} allowed",
            ),
            (k.spill_bytes > _SPILLS, f"{k.spill_bytes} bytes of spilled registers, {_SPILLS} allowed"),
        ]
        for wrong, what in problems:
            if wrong:
                raise LlmcError(
                    "kernel-limits",
                    f"The kernel {k.name} takes {what} ({k.arch}).",
                    hint="This is a bug of llmc's schedules; please report it with the model and the target.",
                )
