"""Where the time of a step goes: every call that the virtual machine makes, and what is spent around it.

The virtual machine calls an instrument before and after each call. Ours is a bare C callback that only reads the
clock: turning the arguments into Python objects would cost more than a small kernel. What is left, about 0.3
microseconds between the two readings of one call, is measured with calls that do nothing, and subtracted.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.errors import LlmcError
from llmc.runtime.engine import Engine, Floats, StepInputs
from llmc.runtime.library import Library, ffi
from llmc.runtime.stepper import Stepper

# a call that only returns a constant; its time is that of the instrument
_NOTHING = "vm.builtin.null_value"
# what is no kernel: the machine's own functions, and functions that compute shapes
_NOT_KERNELS = ("vm.", "shape_func")
# int32_t (void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) of tvm_ffi's c_api.h
_INSTRUMENT = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p
)


@dataclass(frozen=True)
class StepTimes:
    """Times of repeated equal steps, seconds, each the median over the steps.

    Attributes:
        function: the compiled function that ran.
        wall: per step, as the caller sees it, without the instrument.
        engine: of that, inside the compiled function.
        kernels: name -> (calls per step, seconds per step of all of them).
        vm_calls: calls per step that are no kernels: allocation, shapes, views.
        vm_bound: at most so much is spent in the virtual machine between kernels: measured call by call, with some of
            the instrument's own work.
    """

    function: str
    wall: float
    engine: float
    kernels: dict[str, tuple[int, float]]
    vm_calls: int
    vm_bound: float = math.inf

    @property
    def kernel_seconds(self) -> float:
        """Time of a step inside kernels."""
        return sum(seconds for _, seconds in self.kernels.values())

    @property
    def python_seconds(self) -> float:
        """Time of a step in Python: checks, page tables, the choice of the token."""
        return self.wall - self.engine

    @property
    def vm_seconds(self) -> float:
        """Time of a step in the virtual machine, between kernels.

        What is left of the compiled function's time; where other programs took a part of that, the bound.
        """
        return min(max(self.engine - self.kernel_seconds, 0.0), self.vm_bound)

    @property
    def overhead(self) -> float:
        """Share of a step that is not spent in kernels."""
        outside = self.python_seconds + self.vm_seconds
        return outside / (outside + self.kernel_seconds)


class Profiler:
    """Times the steps of a model.

    Args:
        stepper: of the model; its engine is wrapped while steps are measured.
        library: the loaded model.so that the engine calls.
    """

    def __init__(self, stepper: Stepper, library: Library) -> None:
        self._stepper, self._library = stepper, library
        self._stamps: list[int] = []
        self._callback = _clock(self._stamps)

    def run(self, step: Callable[[], object], repeats: int) -> StepTimes:
        """Call `step`, which must run the same compiled function with the same sizes each time.

        It is called 3 * repeats + 2 times: plain, and with the instrument, in turns.

        Raises:
            LlmcError: the calls differ from step to step, or a step runs several compiled functions.
        """
        timed = _TimedEngine(self._stepper.engine)
        self._stepper.engine = timed
        try:
            step()
            names = self._names(step)
            wall: list[float] = []
            engine: list[float] = []
            calls: list[npt.NDArray[np.int64]] = []
            for _ in range(repeats):
                for _ in range(2):  # the first after an instrumented step refills caches
                    timed.seconds.clear()
                    start = time.perf_counter()
                    step()
                    seconds = time.perf_counter() - start
                wall.append(seconds)
                engine.append(sum(timed.seconds))
                self._stamps.clear()
                self._library.instrument(self._callback)
                step()
                self._library.instrument(None)
                calls.append(self._durations(names))
            if len(timed.functions) != 1:
                raise LlmcError(
                    "profile-functions",
                    f"A step to be profiled must run one compiled function, found {sorted(timed.functions)}.",
                )
        finally:
            self._library.instrument(None)
            self._stepper.engine = timed.inner
        return _times(
            timed.functions.pop(), statistics.median(wall), statistics.median(engine), names, np.array(calls)
        )

    def _names(self, step: Callable[[], object]) -> list[str]:
        """What a step calls, in order."""
        names: list[str] = []

        def instrument(function: Any, name: str, before: bool, *rest: Any) -> int:
            if before:
                names.append(name)
            return 0

        self._library.instrument(ffi().convert(instrument))
        step()
        self._library.instrument(None)
        return names

    def _durations(self, names: list[str]) -> npt.NDArray[np.int64]:
        """Nanoseconds from each reading of the last step to the next: of the calls, and between them, in turns."""
        stamps = np.array(self._stamps)
        if len(stamps) != 2 * len(names):
            raise LlmcError(
                "profile-differs",
                f"Steps to be profiled must be equal; one makes {len(names)} calls, another {len(stamps) // 2}.",
            )
        return np.diff(stamps)


def _times(
    function: str, wall: float, engine: float, names: list[str], readings: npt.NDArray[np.int64]
) -> StepTimes:
    """Put a profile together, without the instrument's own time.

    Args:
        function: that ran.
        wall, engine: seconds of a plain step, and of that in the compiled function.
        names: of the calls of a step.
        readings: i64[steps, 2 * calls - 1] nanoseconds of the calls and of the gaps between them.
    """
    medians = np.median(readings, axis=0) * 1e-9
    calls, gaps = medians[::2], medians[1::2]
    nothing = [s for name, s in zip(names, calls, strict=True) if name == _NOTHING]
    cost = statistics.median(nothing) if nothing else float(calls.min(initial=0.0))
    kernels: dict[str, tuple[int, float]] = {}
    between = float(np.maximum(gaps - cost, 0.0).sum())
    for name, reading in zip(names, calls, strict=True):
        seconds = max(float(reading) - cost, 0.0)
        if name.startswith(_NOT_KERNELS):
            between += seconds
            continue
        count, total = kernels.get(name, (0, 0.0))
        kernels[name] = (count + 1, total + seconds)
    vm_calls = len(names) - sum(count for count, _ in kernels.values())
    return StepTimes(function, wall, engine, kernels, vm_calls, between)


def _clock(stamps: list[int]) -> Any:
    """A tvm function that appends the time in nanoseconds to `stamps`, whatever its arguments are."""
    append, now = stamps.append, time.perf_counter_ns

    def read(self: Any, args: Any, count: int, result: Any) -> int:
        append(now())
        return 0

    callback = _INSTRUMENT(read)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    return ffi().Function.__from_extern_c__(address, keep_alive_object=callback)


class _TimedEngine:
    """An engine that notes how long its calls take."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.seconds: list[float] = []
        self.functions: set[str] = set()

    def run(self, function: str, inputs: StepInputs) -> Floats:
        start = time.perf_counter()
        logits = self.inner.run(function, inputs)
        self.seconds.append(time.perf_counter() - start)
        self.functions.add(function)
        return logits

    def memory(self) -> dict[str, int]:
        return self.inner.memory()
