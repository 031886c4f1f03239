"""What this machine can do at most: bytes read and multiplications per second, measured with compiled kernels.

The kernels are made for the machine at hand, in memory: no C++ driver is needed, but TVM's compiler is imported. To
keep it out of a process that runs a model, `measured_limits` measures in one of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.errors import LlmcError

# far more than any last-level cache; halved until it takes no more than an eighth of the memory
_READ_BYTES = 1 << 30
_REPEATS = 7
# seconds of one measurement of a multiply loop
_LOOP_SECONDS = 0.1


@dataclass(frozen=True)
class MachineLimits:
    """Limits that were measured, all of `threads` threads together.

    Attributes:
        threads: that ran.
        read: bytes per second from memory.
        multiply: operand type (f32, bf16, int8) -> multiplications plus additions per second, of registers.
    """

    threads: int
    read: float
    multiply: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> MachineLimits:
        return MachineLimits(**values)


def measured_limits(threads: int) -> MachineLimits:
    """Measure in a process of its own; takes a few seconds.

    Raises:
        LlmcError: it failed, with the last line of what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "llmc.limits", str(threads)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise LlmcError(
            "limits-failed",
            f"The machine's limits could not be measured: {said[-1] if said else f'code {done.returncode}'}.",
            hint="Without --roofline no limits are needed.",
            context={"output": done.stderr},
        )
    return MachineLimits.from_json(json.loads(done.stdout.strip().splitlines()[-1]))


def measure(threads: int) -> MachineLimits:
    """Measure in this process, whose thread pool gets `threads` threads.

    Best of several runs each: whatever else the machine does can only slow a run down.
    """
    from llmc.runtime.library import use_threads

    use_threads(threads)
    import tvm

    from llmc.host import require_permission
    from llmc.schedules.limits import multiply_kernel, multiply_kinds, read_kernel
    from llmc.targets.cpu.backend import BACKEND

    caps = dataclasses.replace(BACKEND.capabilities(""), threads=threads)
    require_permission(caps.features)
    kinds = multiply_kinds(caps)
    kernels = {kind.operands: multiply_kernel(kind, caps) for kind in kinds} | {"read": read_kernel(caps)}
    functions = {f"limit_{name}": _named(tir, f"limit_{name}") for name, tir in kernels.items()}
    library = tvm.compile(tvm.IRModule(functions), target=BACKEND.tvm_target(caps))
    multiply = {
        kind.operands: _multiply_rate(
            library[f"limit_{kind.operands}"], kind.dtype, kind.operations(caps.lanes_f32), caps
        )
        for kind in kinds
    }
    return MachineLimits(threads, _read_rate(library["limit_read"], caps), multiply)


def _named(tir: Any, name: str) -> Any:
    return tir.with_attr("global_symbol", name)


def _multiply_rate(function: Callable[..., Any], dtype: str, operations: int, caps: Any) -> float:
    """Operations per second of all threads."""
    import numpy as np

    operands = _tensor((2, caps.lanes_f32), "int32")
    out = _tensor((caps.threads, caps.lanes_f32), dtype)
    np.from_dlpack(operands)[:] = (
        0  # any value does: no core multiplies faster or slower for it, but denormals
    )

    def seconds(rounds: int) -> float:
        start = time.perf_counter()
        function(operands, out, rounds)
        return time.perf_counter() - start

    rounds = 1000
    while (took := seconds(rounds)) < _LOOP_SECONDS:
        rounds = int(rounds * max(2.0, min(20.0, 1.1 * _LOOP_SECONDS / took)))
    best = min(seconds(rounds) for _ in range(_REPEATS))
    return operations * rounds * caps.threads / best


def _read_rate(function: Callable[..., Any], caps: Any) -> float:
    """Bytes per second of all threads together."""
    import numpy as np

    from llmc import host
    from llmc.runtime.library import tensor_view
    from llmc.runtime.memory import huge_zeros

    size = _READ_BYTES
    while size > host.available_memory() // 8 and size > 1 << 26:
        size //= 2
    piece = caps.threads * 16 * caps.vector_bytes
    size -= size % piece
    raw = huge_zeros(size)
    raw[:: os.sysconf("SC_PAGE_SIZE")] = 1  # untouched pages are all the same page of zeros
    source = tensor_view(raw, (size // 4,), "int32")
    out = _tensor((caps.threads, caps.lanes_f32), "int32")
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function(source, out)
        best = min(best, time.perf_counter() - start)
    total = int(np.from_dlpack(out).sum())
    expected = -(-size // os.sysconf("SC_PAGE_SIZE"))
    if total != expected:
        raise LlmcError("limits-wrong", f"The reading kernel found {total} marked pages of {expected}.")
    return size / best


def _tensor(shape: tuple[int, ...], dtype: str) -> Any:
    """Zeros, aligned as kernels expect."""
    import numpy as np

    from llmc.runtime.library import tensor_view
    from llmc.runtime.memory import huge_zeros

    return tensor_view(huge_zeros(4 * int(np.prod(shape))), shape, dtype)


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1])).to_json()))
