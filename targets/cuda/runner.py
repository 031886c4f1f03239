"""Runs candidates of the tuner on this machine's GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc import cuda_driver
from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.runtime import cuda
from llmc.schedules.tunable import Arguments
from llmc.targets.cuda.clock import CACHE_BYTES, CLOCK_KHZ, MULTIPROCESSORS, DeviceClock
from llmc.targets.cuda.library import load_library
from llmc.targets.runner import Limits, Runner, argument_lists

_MOST_BYTES = 4 << 30  # of all copies of a cold argument
_MOST_COPIES = 256
_CACHES = 2  # times the second-level cache that all copies together are, at least
_SHORT = 4e-5  # seconds; events tell half a microsecond, so that shorter kernels are run several times
_MOST_CALLS = 16
_KEPT = 4  # kernels whose number of calls is remembered: the default's and the candidate's
_LAUNCH = 1.5e-5  # seconds that the host takes to launch a kernel of several launches, at most

# multiply-adds per clock and multiprocessor, dense, with float32 sums (CUDA programming guide, throughput of arithmetic
# instructions; matrix units from the architectures' white papers): major, minor -> dtype -> multiply-adds
_FLOAT32 = {(7, 5): 64, (8, 0): 64}
_UNITS = {(7, 5): 256, (8, 0): 1024, (8, 6): 256, (8, 9): 256, (9, 0): 2048, (10, 0): 4096, (12, 0): 256}


class _Turn(Sequence[Any]):
    """An argument list, and those that a repeated call goes on with."""

    def __init__(self, lists: Sequence[Sequence[Any]], first: int) -> None:
        self.lists, self.first = lists, first

    def __getitem__(self, index: Any) -> Any:
        return self.lists[self.first][index]

    def __len__(self) -> int:
        return len(self.lists[self.first])


class CudaRunner(Runner):
    """Kernels through TVM's CUDA runtime, timed by the driver's events; each call finds the next copy of the weights.

    Raises:
        LlmcError: there is no GPU, or none for the code.
    """

    # an error of a kernel stays: every later call of the process fails
    errors_stay = True

    def __init__(self, caps: Capabilities, clock: DeviceClock | None = None) -> None:
        driver = cuda_driver.query()
        if not driver.devices:
            raise LlmcError(
                "no-cuda-device",
                f"Kernels for {caps.preset} are measured on a GPU, and {driver.problem}.",
                hint="Measure on another machine: llmc tune --export-candidates FILE here and --measure FILE there, "
                "or --rpc HOST:PORT.",
            )
        self._gpu = driver.devices[0]
        cuda.load_runtime()
        self._clock = clock or DeviceClock()
        self._memory = cuda.DeviceMemory()
        self._calls: list[tuple[Any, int]] = []  # kernels of late, and how often a measurement calls them

    def limits(self) -> Limits:
        """The copy's bandwidth is measured; the peak is computed from the clock, and no kernel quite reaches it."""
        cycles = self._clock.attribute(MULTIPROCESSORS) * self._clock.attribute(CLOCK_KHZ) * 1e3
        return Limits(self._clock.copy_bandwidth(), peak(self._gpu.arch, cycles))

    def load(self, path: Path) -> Any:
        return load_library(path, self._gpu)["k"]

    def copies(self, array: np.ndarray[Any, Any]) -> Sequence[Any]:
        return self._tensors(array, self._count(array.nbytes))

    def place(
        self, arguments: Arguments, cold: Mapping[int, Sequence[Any]] | None = None
    ) -> Sequence[Sequence[Any]]:
        made: dict[int, Sequence[Any]] = dict(cold or {})
        missing = [i for i in arguments.cold if i not in made]
        count = self._count(sum(arguments.values[i].nbytes for i in missing))
        made.update({i: self._tensors(arguments.values[i], count) for i in missing})
        lists = argument_lists(arguments, made, lambda array: self._tensors(array, 1)[0])
        return [_Turn(lists, n) for n in range(len(lists))]

    def result(self, arguments: Arguments, placed: Sequence[Any]) -> np.ndarray[Any, Any]:
        out = arguments.values[arguments.out]
        found = self._memory.get(placed[arguments.out], out.shape, out.dtype)
        self._memory.put(placed[arguments.out], np.ascontiguousarray(out))
        return found

    def seconds(self, kernel: Any, placed: Any) -> float:
        """One call, as the GPU sees it; short ones are the mean of several, each on the next copy of the weights."""
        known = next((calls for of, calls in self._calls if of is kernel), 0)
        if known:
            return self._run(kernel, placed, known)
        took = self._run(kernel, placed, 1)
        calls = max(1, min(_MOST_CALLS, int(_SHORT / max(took, 1e-6))))
        self._calls = [*self._calls[1 - _KEPT :], (kernel, calls)]
        return took

    def _run(self, kernel: Any, placed: Any, calls: int) -> float:
        lists, first = placed.lists, placed.first

        def work() -> None:
            for i in range(calls):
                kernel(*lists[(first + i) % len(lists)])

        return self._clock.seconds(work, (calls + 1) * _LAUNCH) / calls

    def _count(self, size: int) -> int:
        if not size:
            return 1
        cache = max(self._clock.attribute(CACHE_BYTES), 1 << 20)
        return max(1, min(1 - (-_CACHES * cache // size), _MOST_BYTES // size, _MOST_COPIES))

    def _tensors(self, array: np.ndarray[Any, Any], copies: int) -> list[Any]:
        source = np.ascontiguousarray(array)
        made = []
        for _ in range(copies):
            tensor = self._memory.empty(array.shape, str(array.dtype), "a candidate's arguments")
            self._memory.put(tensor, source)
            made.append(tensor)
        return made


def peak(arch: int, cycles: float) -> dict[str, float]:
    """dtype -> operations per second of an architecture, for so many cycles of all multiprocessors per second.

    A type without a matrix unit is computed as float32.
    """
    version = divmod(arch, 10)
    nearest = max((v for v in _UNITS if v <= version), default=(7, 5))
    plain = 2 * _FLOAT32.get(version, 128) * cycles
    units = 2 * _UNITS[nearest] * cycles
    has_units = version >= (8, 0)
    return {
        "float32": plain,
        "float16": units,
        "bfloat16": units if has_units else plain,
        "int8": 2 * units if has_units else plain,
    }
