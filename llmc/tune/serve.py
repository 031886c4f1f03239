"""The processes behind the tuner: ``python -m llmc.tune.serve build|measure TARGET SOCKET``.

build    compiles candidates to libraries; as many processes as there are cores
measure  runs them: checks each against the reference, then times it in turns with the default schedule
"""

from __future__ import annotations

import ctypes
import json
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmc.schedules.records import Status
from llmc.schedules.tunable import Arguments, Bucket, Tunable
from llmc.targets.backend import Backend, get

_PR_SET_PDEATHSIG = 1
_SEED = 20_260_101
_LEAST_CALLS, _MOST_CALLS = 5, 60
_LONG, _LEAST_LONG_CALLS = 0.1, 3  # calls that take this many seconds are fewer
_SECONDS = 0.25  # time to measure one candidate for, of which the default gets half
_HOPELESS = 3.0  # times slower than the default: not measured to the end
Answer = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Answer questions until the other end of the socket closes."""
    kind, target, number = arguments
    _end_with_parent()
    backend, caps = get(target)
    service: Builder | Measurer = Builder(backend, caps) if kind == "build" else Measurer(backend, caps)
    with socket.socket(fileno=int(number)) as channel, channel.makefile("rwb") as stream:
        _reply(stream, {"ready": True})
        for line in stream:
            question = json.loads(line)
            try:
                answer = service.answer(question)
            except Exception as e:  # every failure of a candidate is an answer
                text = str(e).strip().splitlines()
                answer = {"failure": f"{type(e).__name__}: {text[-1] if text else 'no message'}"[:400]}
            _reply(stream, answer)


def _reply(stream: Any, answer: Answer) -> None:
    stream.write(json.dumps(answer).encode() + b"\n")
    stream.flush()


def _end_with_parent() -> None:
    """A kernel that hangs must not outlive the tuner (Linux; elsewhere the closed socket ends an idle worker)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tunable_named(backend: Backend, name: str) -> Tunable:
    return next(t for t in backend.tunables() if t.name == name)


class Builder:
    """Question: {rule, task, schedule, low, high, path}; writes the library."""

    def __init__(self, backend: Backend, caps: Any) -> None:
        import tvm

        from llmc.link import link_library

        self._tvm, self._link = tvm, link_library
        self.backend, self.caps = backend, caps
        self.target = backend.tvm_target(caps)

    def answer(self, question: dict[str, Any]) -> Answer:
        begin = time.perf_counter()
        tunable = tunable_named(self.backend, question["rule"])
        schedule = tunable.schedule_type(**question["schedule"])
        bucket = Bucket(question["low"], question["high"]) if question["low"] else None
        func = tunable.candidate(tunable.from_values(question["task"]), schedule, bucket, self.caps)
        module = self._tvm.IRModule({"k": func.with_attr("global_symbol", "k")})
        self._link(self._tvm.compile(module, target=self.target), Path(question["path"]))
        return {"seconds": time.perf_counter() - begin}


class Measurer:
    """Questions: {do: limits}; {do: prepare, rule, task, rows, path}; {do: measure, schedule, path}."""

    def __init__(self, backend: Backend, caps: Any) -> None:
        assert backend.runner is not None
        self.backend, self.caps = backend, caps
        self.runner = backend.runner(caps)
        self._job: _Prepared | None = None

    def answer(self, question: dict[str, Any]) -> Answer:
        steps: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "limits": self._limits,
            "prepare": self._prepare,
            "measure": self._measure,
        }
        return steps[question["do"]](question)

    def _limits(self, _: dict[str, Any]) -> Answer:
        limits = self.runner.limits()
        return {"read": limits.read, "peak": dict(limits.peak)}

    def _prepare(self, question: dict[str, Any]) -> Answer:
        """Inputs, reference and the default schedule of a task; what follows is about this task."""
        self._job = None  # free it first
        tunable = tunable_named(self.backend, question["rule"])
        self._job = _Prepared(self.runner, self.caps, tunable, question)
        return self._job.default_answer

    def _measure(self, question: dict[str, Any]) -> Answer:
        assert self._job is not None, "measure before prepare"
        return self._job.measure(
            question["schedule"], Path(question["path"]), question.get("seconds", _SECONDS)
        )


class _Prepared:
    """One task with so many rows: inputs, reference, and the default schedule to compare with."""

    def __init__(self, runner: Any, caps: Any, tunable: Tunable, question: dict[str, Any]) -> None:
        self.runner, self.caps, self.tunable = runner, caps, tunable
        self.task = tunable.from_values(question["task"])
        self.case = tunable.case(self.task, question["rows"], np.random.default_rng(_SEED))
        self.expected = tunable.reference(self.task, self.case)
        self._placed: tuple[Any, Arguments, Any] | None = None
        default = tunable.default(self.task, caps)
        self.default_arguments = tunable.arguments(self.task, default, self.case, caps)
        self.default_placed = runner.place(self.default_arguments)
        self.default_kernel = runner.load(Path(question["path"]))
        self._turn = 0
        status, error = self._check(self.default_kernel, self.default_arguments, self.default_placed)
        self.default_answer: Answer = {"status": status.value, "error": error}
        if status is Status.OK:
            times = self._times(self.default_kernel, self.default_placed, _SECONDS)
            self.default_answer.update(
                seconds=statistics.median(times), ratio=1.0, default=undisturbed(times)
            )

    def measure(self, values: dict[str, int], path: Path, seconds: float) -> Answer:
        tunable = self.tunable
        schedule = tunable.schedule_type(**values)
        shared = tuple(getattr(schedule, name) for name in tunable.shared)
        if self._placed is None or self._placed[0] != shared:
            arguments = tunable.arguments(self.task, schedule, self.case, self.caps)
            self._placed = None
            self._placed = (shared, arguments, self.runner.place(arguments))
        _, arguments, placed = self._placed
        kernel = self.runner.load(path)
        status, error = self._check(kernel, arguments, placed)
        if status is not Status.OK:
            return {"status": status.value, "error": error, "note": f"error {error:.3g} of what is allowed"}
        own, default = self._in_turns(kernel, placed, seconds)
        return {
            "status": status.value,
            "error": error,
            "seconds": statistics.median(own),
            "ratio": undisturbed(own) / undisturbed(default),
            "default": undisturbed(default),
        }

    def _check(self, kernel: Any, arguments: Arguments, placed: Any) -> tuple[Status, float]:
        """Whether the result is the reference's, and the largest error as a share of what is allowed."""
        self.runner.result(arguments, placed[0])  # clear
        self.runner.seconds(kernel, placed[0])
        found = self.runner.result(arguments, placed[0]).astype(np.float32)
        error = largest_error(found, self.expected, self.tunable.tolerance(self.task))
        return (Status.OK if error <= 1 else Status.WRONG), error

    def _times(self, kernel: Any, placed: Any, seconds: float) -> list[float]:
        kept: list[float] = []
        end = time.perf_counter() + seconds
        while _goes_on(kept, end):
            kept.append(self._next(kernel, placed))
        return kept

    def _in_turns(self, kernel: Any, placed: Any, seconds: float) -> tuple[list[float], list[float]]:
        """Times of a candidate and of the default, one call each in turn: a disturbance hits both."""
        own: list[float] = []
        default: list[float] = []
        end = time.perf_counter() + seconds
        while _goes_on(own, end):
            default.append(self._next(self.default_kernel, self.default_placed))
            own.append(self._next(kernel, placed))
            if len(own) == 2 and min(own) > _HOPELESS * max(default):
                break
        return own, default

    def _next(self, kernel: Any, placed: Any) -> float:
        self._turn += 1
        return float(self.runner.seconds(kernel, placed[self._turn % len(placed)]))


def _goes_on(times: list[float], end: float) -> bool:
    """Whether one more call is to be timed."""
    least = _LEAST_LONG_CALLS if times and min(times) > _LONG else _LEAST_CALLS
    return len(times) < least or (time.perf_counter() < end and len(times) < _MOST_CALLS)


def undisturbed(times: list[float]) -> float:
    """The lower quartile: what else runs on a machine only ever adds time, often to half of the calls."""
    return float(np.quantile(times, 0.25))


def largest_error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], tolerance: float) -> float:
    """Largest |found - expected| over tolerance * (|expected| + root mean square); infinite for what is not finite."""
    expected = expected.reshape(found.shape)
    scale = tolerance * (np.abs(expected) + np.sqrt(np.mean(np.square(expected, dtype=np.float64))) + 1e-30)
    error = float(np.max(np.abs(found - expected) / scale))
    return error if np.isfinite(error) else 1e30


if __name__ == "__main__":
    main(sys.argv[1:])
