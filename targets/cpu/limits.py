"""The limits of a CPU that kernels run into, measured: reading memory, and multiply-adds on registers.

The kernels are those of schedules/limits.py, made for the machine at hand in memory: no C++ driver is needed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm

from llmc import host
from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.runtime.library import tensor_view
from llmc.runtime.memory import huge_zeros
from llmc.schedules.limits import multiply_kernel, multiply_kinds, read_kernel

# far more than any last-level cache; halved until it takes no more than an eighth of the memory
_READ_BYTES = 1 << 30
_REPEATS = 7
# seconds of one measurement of a multiply loop
_LOOP_SECONDS = 0.1


def measure(caps: Capabilities, target: Any) -> tuple[float, dict[str, float]]:
    """Bytes read per second, and operand type (f32, bf16, int8) -> multiplications plus additions per second.

    All of `caps.threads` threads together, which this process must run (runtime.library.use_threads). Best of several
    runs each: whatever else the machine does can only slow a run down.
    """
    host.require_permission(caps.features)
    kinds = multiply_kinds(caps)
    kernels = {kind.operands: multiply_kernel(kind, caps) for kind in kinds} | {"read": read_kernel(caps)}
    functions = {
        f"limit_{name}": tir.with_attr("global_symbol", f"limit_{name}") for name, tir in kernels.items()
    }
    library = tvm.compile(tvm.IRModule(functions), target=target)
    multiply = {
        kind.operands: _multiply_rate(
            library[f"limit_{kind.operands}"], kind.dtype, kind.operations(caps.lanes_f32), caps
        )
        for kind in kinds
    }
    return _read_rate(library["limit_read"], caps), multiply


def _multiply_rate(function: Callable[..., Any], dtype: str, operations: int, caps: Any) -> float:
    """Operations per second of all threads."""
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
    return tensor_view(huge_zeros(4 * int(np.prod(shape))), shape, dtype)
