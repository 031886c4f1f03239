"""The profile of a step: every kernel is found and timed, and nothing stays behind."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from llmc.errors import LlmcError
from llmc.runtime.model import Model, load
from llmc.runtime.profile import StepTimes, _times


@pytest.fixture
def model(artifact: Path) -> Model:
    return load(artifact)


def test_a_step_is_taken_apart(model: Model) -> None:
    profiler = model.profiler()
    with model.new_sequence() as seq:
        model.step([(seq, [1, 2, 3])])
        times = profiler.run(lambda: model.step([(seq, [5])]), 4)
        length = seq.length
    assert length == 3 + 3 * 4 + 2
    assert times.function == "decode"
    assert {name: calls for name, (calls, _) in times.kernels.items()} == {"append": 1, "attend": 1}
    # the toy's attention takes most of its step, whatever else this machine does
    assert times.kernels["attend"][1] > times.kernels["append"][1] >= 0
    assert 0 < times.engine <= times.wall
    assert times.python_seconds == pytest.approx(times.wall - times.engine)
    assert times.vm_calls > 0


def test_results_are_the_same_during_and_after_a_profile(model: Model) -> None:
    expected = model.logits([3, 1, 4, 1, 5])
    found = []
    model.profiler().run(lambda: found.append(model.logits([3, 1, 4, 1, 5])), 2)
    assert len(found) == 8 and all(np.array_equal(got, expected) for got in found)
    assert np.array_equal(model.logits([3, 1, 4, 1, 5]), expected)


def test_an_instrument_is_removed(model: Model) -> None:
    calls = []
    profiler = model.profiler()

    def broken() -> None:
        model.logits([1])
        calls.append(1)
        if len(calls) == 2:  # while the names are noted
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        profiler.run(broken, 1)
    before = len(profiler._stamps)
    model.logits([1, 2])
    assert len(profiler._stamps) == before


def test_unequal_steps_are_refused(model: Model) -> None:
    turn = iter(range(100))
    with pytest.raises(LlmcError, match=r"must be equal.*profile-differs"):
        model.profiler().run(lambda: [model.logits([1, 2]) for _ in range(1 + next(turn) // 4)], 1)
    with pytest.raises(LlmcError, match=r"\['decode', 'step'\].*profile-functions"):
        model.profiler().run(lambda: model.logits([1, 2, 3], prefill=2), 1)


def test_the_instruments_own_time_is_subtracted() -> None:
    names = ["vm.builtin.null_value", "a", "shape_func", "b", "a", "vm.builtin.null_value"]
    calls, gap = [1, 5, 9, 0, 7, 1], 3
    readings = np.array([[x for call in calls for x in (call, gap)][:-1]] * 3) * 10**9
    times = _times("step", 50.0, 40.0, names, readings)
    assert times.kernels == {"a": (2, pytest.approx(10.0)), "b": (1, 0.0)}
    assert times.vm_calls == 3
    assert times.vm_bound == pytest.approx(5 * (3 - 1) + (9 - 1))
    assert times.vm_seconds == times.vm_bound  # 30 s are left, which other programs took


def test_overhead_is_what_is_not_in_kernels() -> None:
    times = StepTimes("decode", 10.0, 9.0, {"a": (2, 5.0), "b": (1, 3.0)}, 4)
    assert (times.kernel_seconds, times.python_seconds, times.vm_seconds) == (8.0, 1.0, 1.0)
    assert times.overhead == pytest.approx(0.2)


def test_kernel_times_are_those_of_the_clock(model: Model) -> None:
    """The sum of the kernels cannot be more than the whole, and is most of it where one kernel does all the work."""
    times = model.profiler().run(lambda: model.logits([1] * 32), 3)
    start = time.perf_counter()
    model.logits([1] * 32)
    assert times.kernel_seconds < 20 * (time.perf_counter() - start)
    assert times.function == "step"
