"""The two limits of a CPU that kernels run into: reading memory, and multiply-adds on registers. Measured with TIR."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities, TileUnit
from llmc.runtime.memory import huge_zeros
from llmc.schedules import emit as e
from llmc.schedules.limits import TILE_KINDS, multiply_kernel

_READ_BYTES = 256 << 20
_TURNS = 20_000
_TILE_TURNS = 5_000
_CHAINS = 12  # independent sums: more than latency times throughput of any multiply-add unit
_ROUNDS = 9


def read_bandwidth(caps: Capabilities, target: Any) -> float:
    """Bytes per second that all threads read together, best of several rounds; memory on huge pages."""
    kernel = _build(_sum_kernel(caps), target)
    memory = huge_zeros(_READ_BYTES)
    memory[::4096] = 1  # make every page real
    data = tvm.runtime.from_dlpack(memory.view(np.int32))
    out = tvm.runtime.tensor(np.zeros(_PARTS, np.int32))
    return _READ_BYTES / _best(lambda: kernel(data, out))


def peak(caps: Capabilities, target: Any, threads: int) -> dict[str, float]:
    """dtype -> operations per second of all threads on registers."""
    found = {}
    out = tvm.runtime.tensor(np.zeros(threads * 16, np.float32))
    one = tvm.runtime.tensor(np.ones(caps.lanes_f32, np.float32))
    for dtype, per_lane in (("float32", 2), ("bfloat16", 4)):
        if dtype == "bfloat16" and not caps.has_bf16_dot:
            continue
        kernel = _build(_multiply_kernel(caps, threads, dtype == "bfloat16"), target)
        operations = per_lane * caps.lanes_f32 * _CHAINS * _TURNS * threads
        found[dtype] = operations / _best(lambda kernel=kernel: kernel(one, out))  # type: ignore[misc]
    if caps.tiles is not TileUnit.NONE:
        kind = TILE_KINDS[0]
        kernel = _build(multiply_kernel(kind, replace(caps, threads=threads)), target)
        arguments = [
            tvm.runtime.tensor(np.zeros(shape, dtype))
            for shape, dtype in (((2, caps.lanes_f32), np.int32), ((threads, caps.lanes_f32), np.float32))
        ]
        operations = kind.operations(caps.lanes_f32) * _TILE_TURNS * threads
        found["bfloat16"] = operations / _best(lambda: kernel(*arguments, _TILE_TURNS))
    # what there is no instruction for is widened first
    return {"bfloat16": found["float32"], "float16": found["float32"], **found}


_PARTS = 64  # tasks of the reading kernel


def _sum_kernel(caps: Capabilities) -> Any:
    lanes, count = caps.lanes_f32, _READ_BYTES // 4
    built: list[Any] = []
    with e.kernel(built):
        x = e.tensor("x", [count], "int32")
        y = e.tensor("y", [_PARTS], "int32")
        with e.root():
            xf, yf = e.flat(x, count), e.flat(y, _PARTS)
            with e.parallel(_PARTS, caps) as part:
                sums = [e.scratch(lanes, "int32") for _ in range(8)]
                for s in sums:
                    e.store(s, 0, e.const("int32", 0, lanes), lanes)
                base = e.let(part * (count // _PARTS))
                with e.loop(count // _PARTS // (8 * lanes)) as i:
                    for j, s in enumerate(sums):
                        at = base + (i * 8 + j) * lanes
                        e.store(s, 0, e.load(s, 0, lanes) + e.load(xf, at, lanes), lanes)
                total = e.load(sums[0], 0, lanes)
                for s in sums[1:]:
                    total = total + e.load(s, 0, lanes)
                total = e.let(total)
                whole = e.scratch(lanes, "int32")
                e.store(whole, 0, total, lanes)
                folded = whole[0]
                for j in range(1, lanes):
                    folded = folded + whole[j]
                e.store(yf, part, folded, 1)
    return built[0]


def _multiply_kernel(caps: Capabilities, threads: int, dot: bool) -> Any:
    lanes = caps.lanes_f32
    built: list[Any] = []
    with e.kernel(built):
        x = e.tensor("x", [lanes], "float32")
        y = e.tensor("y", [threads * 16], "float32")
        with e.root():
            xf, yf = e.flat(x, lanes), e.flat(y, threads * 16)
            with e.parallel(threads, caps) as thread:
                factor = e.let(e.load(xf, 0, lanes))
                bits = e.let(T.reinterpret(e.vec("int32", lanes), factor))
                sums = [e.scratch(lanes) for _ in range(_CHAINS)]
                for j, s in enumerate(sums):
                    e.store(s, 0, e.splat(float(j), lanes), lanes)
                with e.loop(_TURNS):
                    for s in sums:
                        now = e.load(s, 0, lanes)
                        made = e.dot_bf16(now, bits, bits) if dot else now * factor + factor
                        e.store(s, 0, made, lanes)
                total = e.load(sums[0], 0, lanes)
                for s in sums[1:]:
                    total = total + e.load(s, 0, lanes)
                e.store(yf, thread * 16, e.fold(total, lanes, lambda a, b: a + b), 1)
    return built[0]


def _build(func: Any, target: Any) -> Any:
    module = tvm.IRModule({"k": func.with_attr("global_symbol", "k")})
    return tvm.compile(module, target=target)["k"]


def _best(call: Callable[[], Any]) -> float:
    call()
    least = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - begin)
    return least
