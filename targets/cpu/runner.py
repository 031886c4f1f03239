"""Runs candidates of the tuner on this machine's processor."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from llmc.caps import Capabilities
from llmc.host import cache_bytes, require_permission
from llmc.runtime.library import tensor_view, use_threads
from llmc.runtime.memory import huge_zeros
from llmc.schedules.tunable import Arguments
from llmc.targets.cpu.limits import measure
from llmc.targets.runner import Limits, Runner, argument_lists

_MOST_BYTES = 1 << 30  # of all copies of a cold argument
_MOST_COPIES = 256
_ALIGN = 4096  # of each copy
_CACHES = 4  # caches are not strictly last-in-first-out, so twice their size would not do


class CpuRunner(Runner):
    """Kernels as functions of a loaded library; weights on huge pages, as the runtime maps them."""

    def __init__(self, caps: Capabilities, target: Any) -> None:
        self.caps, self.target = caps, target
        require_permission(caps.features)
        # TVM by itself would take half of the processors for hyper-threads
        self.threads = use_threads(None)
        # one thread runs in this one, whose processor time does not count what else runs on the machine
        self._clock = time.thread_time if self.threads == 1 else time.perf_counter

    def limits(self) -> Limits:
        read, rates = measure(replace(self.caps, threads=self.threads), self.target)
        plain = rates["f32"]
        # what there is no instruction for is widened first
        names = (("float32", "f32"), ("float16", "f16"), ("bfloat16", "bf16"), ("int8", "int8"))
        return Limits(read, {dtype: rates.get(name, plain) for dtype, name in names})

    def load(self, path: Path) -> Any:
        return tvm.runtime.load_module(str(path))["k"]

    def copies(self, array: np.ndarray[Any, Any]) -> Sequence[Any]:
        return _tensors(array, self._count(array.nbytes))

    def place(
        self, arguments: Arguments, cold: Mapping[int, Sequence[Any]] | None = None
    ) -> Sequence[Sequence[Any]]:
        made: dict[int, Sequence[Any]] = dict(cold or {})
        missing = [i for i in arguments.cold if i not in made]
        count = self._count(sum(arguments.values[i].nbytes for i in missing))
        made.update({i: _tensors(arguments.values[i], count) for i in missing})
        return argument_lists(arguments, made, lambda array: _tensors(array, 1)[0])

    def _count(self, size: int) -> int:
        """Copies of `size` bytes that are several times the cache: the next turn finds nothing of the last one in it."""
        if not size:
            return 1
        return max(1, min(-(-_CACHES * cache_bytes() // size), _MOST_BYTES // size, _MOST_COPIES))

    def result(self, arguments: Arguments, placed: Sequence[Any]) -> np.ndarray[Any, Any]:
        out = placed[arguments.out]
        found = np.array(out.numpy())
        out.copyfrom(arguments.values[arguments.out])
        return found

    def seconds(self, kernel: Any, placed: Sequence[Any]) -> float:
        begin = self._clock()
        kernel(*placed)
        return self._clock() - begin


def _tensors(array: np.ndarray[Any, Any], copies: int) -> list[Any]:
    """tvm tensors over copies of an array, one behind the other on huge pages."""
    step = -(-array.nbytes // _ALIGN) * _ALIGN
    raw = huge_zeros(step * copies)
    source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for i in range(copies):
        raw[i * step : i * step + array.nbytes] = source
    parts = (raw[i * step : i * step + array.nbytes] for i in range(copies))
    return [tensor_view(part, array.shape, str(array.dtype)) for part in parts]
