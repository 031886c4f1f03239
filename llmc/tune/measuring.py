"""The measuring process: checks candidates against a reference, then times them in turns with the default schedule."""

from __future__ import annotations

import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from llmc.schedules.records import Status
from llmc.schedules.tunable import Arguments, Tunable, key_of
from llmc.schedules.tune_data import Array
from llmc.targets.backend import Backend

_SEED = 20_260_101
_LEAST_CALLS, _MOST_CALLS = 5, 60
_LONG, _LEAST_LONG_CALLS = 0.1, 3  # calls that take this many seconds are fewer
_SECONDS = 0.25  # time to measure one candidate for, of which the default gets half
_HOPELESS = 1.5  # times slower than the best known: not measured to the end
_BEHIND = 1.12  # the same after _LEAST_CALLS calls
_KEPT_BYTES = 5 << 27  # of weights, and of inputs with references
_KEPT_COPIES = 5 << 28  # bytes of packed weights where kernels read them
_ELSEWHERE = np.empty(0, np.uint8)  # stands for a weight whose copies are placed already
Answer = dict[str, Any]
T = TypeVar("T")


class Measurer:
    """Questions: {do: limits}; {do: prepare, rule, task, rows, path}; {do: measure, schedule, path[, best]}."""

    def __init__(self, backend: Backend, caps: Any) -> None:
        assert backend.runner is not None
        self.caps = caps
        self.tunables = {tunable.name: tunable for tunable in backend.tunables()}
        self.runner = backend.runner(caps)
        self.ends_with_failure = self.runner.errors_stay
        # the scheduler comes back to a task again and again, for other rows and other layouts
        self._weights: Kept[dict[str, Array]] = Kept(_KEPT_BYTES)
        self._copies: Kept[Sequence[Any]] = Kept(_KEPT_COPIES)
        self._jobs: Kept[Prepared] = Kept(_KEPT_BYTES)
        self._job: Prepared | None = None

    def answer(self, question: dict[str, Any]) -> Answer:
        steps: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "limits": self._limits,
            "prepare": self._prepare,
            "measure": self._measure,
        }
        return steps[question["do"]](question)

    def copies(self, tunable: Tunable, task: Any, schedule: Any, weights: dict[str, Array]) -> Sequence[Any]:
        """The weights in the layout of a schedule, where kernels read them."""
        shared = [int(getattr(schedule, name)) for name in tunable.shared]
        size = 0

        def make() -> Sequence[Any]:
            nonlocal size
            packed = tunable.pack(task, schedule, weights, self.caps)
            made = self.runner.copies(packed)
            size = packed.nbytes * len(made)
            return made

        return self._copies.get(_key(tunable, task) + str(shared), make, lambda _: size)

    def _limits(self, _: dict[str, Any]) -> Answer:
        limits = self.runner.limits()
        return {"read": limits.read, "peak": dict(limits.peak)}

    def _prepare(self, question: dict[str, Any]) -> Answer:
        """Inputs, reference and the default schedule of a task; what follows is about this task."""
        tunable = self.tunables[question["rule"]]
        task, rows = tunable.from_values(question["task"]), int(question["rows"])
        clock = Stopwatch()

        def weights() -> dict[str, Array]:
            return tunable.weights(task, np.random.default_rng(_SEED))

        held = self._weights.get(_key(tunable, task), weights, lambda w: sum(map(_size, w.values())))
        clock.lap("weights")
        self._job = self._jobs.get(
            f"{_key(tunable, task)} {rows}",
            lambda: Prepared(self, tunable, task, rows, held, Path(question["path"]), clock),
            lambda job: job.size,
        )
        return {**self._job.default_answer, "spent": clock.laps}

    def _measure(self, question: dict[str, Any]) -> Answer:
        assert self._job is not None, "measure before prepare"
        return self._job.measure(
            question["schedule"],
            Path(question["path"]),
            question.get("seconds", _SECONDS),
            question.get("best", 0.0),
        )


class Prepared:
    """One task with so many rows: inputs, reference, and the default schedule to compare with.

    Attributes:
        default_answer: what measuring the default schedule gave.
    """

    def __init__(
        self,
        owner: Measurer,
        tunable: Tunable,
        task: Any,
        rows: int,
        weights: dict[str, Array],
        default: Path,
        clock: Stopwatch,
    ) -> None:
        self._owner, self._runner, self._tunable, self._task = owner, owner.runner, tunable, task
        self._weights = weights
        self._held: dict[tuple[int, ...], tuple[Arguments, Any]] = {}
        self._inputs = tunable.inputs(task, rows, np.random.default_rng(_SEED + 1))
        clock.lap("inputs")
        self._expected = tunable.reference(task, {**weights, **self._inputs})
        self._allowed = allowed_error(self._expected, tunable.tolerance(task))
        clock.lap("reference")
        self._default = tunable.default(task, owner.caps)
        self._kernel = self._runner.load(default)
        self._turn = 0
        arguments, placed = self._place(self._default, clock)
        status, error = self._check(self._kernel, arguments, placed)
        clock.lap("checking")
        self.default_answer: Answer = {"status": status.value, "error": error}
        if status is Status.OK:
            times = self._times(self._kernel, placed, _SECONDS)
            self.default_answer.update(
                seconds=statistics.median(times), ratio=1.0, default=undisturbed(times)
            )
            clock.lap("timing")

    @property
    def size(self) -> int:
        """Bytes of its own."""
        return sum(map(_size, (*self._inputs.values(), self._expected, self._allowed)))

    def measure(self, values: dict[str, int], path: Path, seconds: float, best: float) -> Answer:
        """Check and time a candidate.

        Args:
            best: ratio that makes a candidate the best; one that is clearly above it is not measured to the end.
        """
        clock = Stopwatch()
        schedule = self._tunable.schedule_type(**values)
        _, default_placed = self._place(self._default, clock)
        arguments, placed = self._place(schedule, clock)
        kernel = self._runner.load(path)
        clock.lap("loading")
        status, error = self._check(kernel, arguments, placed)
        clock.lap("checking")
        if status is not Status.OK:
            return {"status": status.value, "error": error, "note": f"error {error:.3g} of what is allowed"}
        own, default = self._in_turns(kernel, placed, default_placed, seconds, best)
        clock.lap("timing")
        return {
            "spent": clock.laps,
            "status": status.value,
            "error": error,
            "seconds": statistics.median(own),
            "ratio": undisturbed(own) / undisturbed(default),
            "default": undisturbed(default),
        }

    def _place(self, schedule: Any, clock: Stopwatch) -> tuple[Arguments, Any]:
        """Arguments of a schedule's kernel, where the device reads them."""
        owner, tunable, case = self._owner, self._tunable, {**self._weights, **self._inputs}
        if self._weights:
            copies = owner.copies(tunable, self._task, schedule, self._weights)
            clock.lap("packing")
            arguments = tunable.arguments(self._task, schedule, case, owner.caps, _ELSEWHERE)
            placed = self._runner.place(arguments, {arguments.cold[0]: copies})
        else:
            arguments, placed = self._own(schedule, case)
        clock.lap("placing")
        return arguments, placed

    def _own(self, schedule: Any, case: dict[str, Array]) -> tuple[Arguments, Any]:
        """Arguments that share nothing with other jobs: those of the default and of the last candidate are kept."""
        key = tuple(int(getattr(schedule, name)) for name in self._tunable.shared)
        usual = tuple(int(getattr(self._default, name)) for name in self._tunable.shared)
        if key not in self._held:
            self._held = {k: v for k, v in self._held.items() if k == usual}
            arguments = self._tunable.arguments(self._task, schedule, case, self._owner.caps)
            self._held[key] = arguments, self._runner.place(arguments)
        return self._held[key]

    def _check(self, kernel: Any, arguments: Arguments, placed: Any) -> tuple[Status, float]:
        """Whether the result is the reference's, and the largest error as a share of what is allowed."""
        self._runner.result(arguments, placed[0])  # clear
        self._runner.seconds(kernel, placed[0])
        found = self._runner.result(arguments, placed[0]).astype(np.float32)
        error = relative_error(found, self._expected, self._allowed)
        return (Status.OK if error <= 1 else Status.WRONG), error

    def _times(self, kernel: Any, placed: Any, seconds: float) -> list[float]:
        kept: list[float] = []
        end = time.perf_counter() + seconds
        while _goes_on(kept, end):
            kept.append(self._next(kernel, placed))
        return kept

    def _in_turns(
        self, kernel: Any, placed: Any, default_placed: Any, seconds: float, best: float
    ) -> tuple[list[float], list[float]]:
        """Times of a candidate and of the default, one call each in turn: a disturbance hits both."""
        own: list[float] = []
        default: list[float] = []
        end = time.perf_counter() + seconds
        while _goes_on(own, end):
            default.append(self._next(self._kernel, default_placed))
            own.append(self._next(kernel, placed))
            behind = {2: _HOPELESS, _LEAST_CALLS: _BEHIND}.get(len(own))
            if behind and best and min(own) > behind * best * min(default):
                break
        return own, default

    def _next(self, kernel: Any, placed: Any) -> float:
        self._turn += 1
        return float(self._runner.seconds(kernel, placed[self._turn % len(placed)]))


class Kept(Generic[T]):
    """What was made last, up to so many bytes; the newest is kept whatever its size."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[str, tuple[T, int]] = OrderedDict()

    def get(self, key: str, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """What is held for the key, else what `make` makes."""
        if key not in self._held:
            # room first: two of the largest at a time may be too much
            self._drop(self._most // 2)
            made = make()
            self._held[key] = made, size(made)
            self._drop(self._most)
        self._held.move_to_end(key)
        return self._held[key][0]

    def _drop(self, most: int) -> None:
        while len(self._held) > 1 and sum(size for _, size in self._held.values()) > most:
            self._held.popitem(last=False)


class Stopwatch:
    """Where time goes.

    Attributes:
        laps: name -> seconds.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What was done since the last lap."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def _key(tunable: Tunable, task: Any) -> str:
    return key_of({"rule": tunable.name, "task": tunable.to_values(task)})


def _size(array: Array) -> int:
    return int(array.nbytes)


def _goes_on(times: list[float], end: float) -> bool:
    """Whether one more call is to be timed."""
    least = _LEAST_LONG_CALLS if times and min(times) > _LONG else _LEAST_CALLS
    return len(times) < least or (time.perf_counter() < end and len(times) < _MOST_CALLS)


def undisturbed(times: list[float]) -> float:
    """The lower quartile: what else runs on a machine only ever adds time, often to half of the calls."""
    return float(np.quantile(times, 0.25))


def allowed_error(expected: Array, tolerance: float) -> Array:
    """float32 tolerance * (|expected| + root mean square)."""
    mean_square = float(np.mean(np.square(expected, dtype=np.float64)))
    return np.asarray(tolerance * (np.abs(expected) + mean_square**0.5 + 1e-30), np.float32)


def relative_error(found: Array, expected: Array, allowed: Array) -> float:
    """Largest |found - expected| / allowed; very large for what is not finite."""
    shape = found.shape
    error = float(np.max(np.abs(found - expected.reshape(shape)) / allowed.reshape(shape)))
    return error if np.isfinite(error) else 1e30


def largest_error(found: Array, expected: Array, tolerance: float) -> float:
    """Largest |found - expected| over tolerance * (|expected| + root mean square)."""
    return relative_error(found, expected, allowed_error(expected, tolerance))
