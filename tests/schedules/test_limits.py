import dataclasses
import json
import subprocess

import numpy as np
import pytest

from llmc.errors import LlmcError
from llmc.limits import MachineLimits, measure, measured_limits
from llmc.schedules.limits import CHAINS, MULTIPLY_KINDS, STREAMS, UNROLL, multiply_kernel, read_kernel
from llmc.targets.cpu import limits


def test_the_reading_kernel_reads_everything(best, tools):
    caps = dataclasses.replace(best, threads=2)
    library = tools.build(caps, read=read_kernel(caps))
    source = np.arange(5 * 2 * STREAMS * caps.lanes_f32, dtype=np.int32) * 7919
    out = tools.tensor(np.zeros((2, caps.lanes_f32), np.int32))
    library["read"](tools.tensor(source), out)
    halves = source.reshape(2, -1, caps.lanes_f32).sum(axis=1, dtype=np.int32)
    assert np.array_equal(out.numpy(), halves)


def test_the_multiplying_kernels_do_all_that_is_counted(best, tools):
    caps = dataclasses.replace(best, threads=2)
    usable = [kind for kind in MULTIPLY_KINDS if kind.usable(caps)]
    library = tools.build(caps, **{k.operands: multiply_kernel(k, caps) for k in usable})
    ones = {
        "f32": np.float32(1).view(np.int32),
        "bf16": np.int32(0x3F803F80),
        "int8": np.int32(0x01010101),
    }
    for kind in usable:
        operands = np.full((2, caps.lanes_f32), ones[kind.operands], np.int32)
        out = tools.tensor(np.zeros((2, caps.lanes_f32), kind.dtype))
        library[kind.operands](tools.tensor(operands), out, 3)
        # every multiplication by one adds one
        assert np.all(out.numpy() == 3 * CHAINS * UNROLL * kind.per_lane)
        assert kind.operations(caps.lanes_f32) * 3 == 2 * out.numpy()[0].sum()


def check(found, best):
    assert MachineLimits.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.threads == 1 and found.read > 1e8
    assert set(found.multiply) == {k.operands for k in MULTIPLY_KINDS if k.usable(best)}
    assert all(rate > 1e8 for rate in found.multiply.values())


@pytest.mark.filterwarnings("ignore:this process already runs kernels")
def test_limits_of_this_machine(best, monkeypatch):
    small = {"_READ_BYTES": 1 << 25, "_REPEATS": 2, "_LOOP_SECONDS": 0.005}
    for name, value in small.items():
        monkeypatch.setattr(limits, name, value)
    check(measure(1), best)


@pytest.mark.slow
def test_limits_in_a_process_of_their_own(best):
    check(measured_limits(1), best)


def test_a_measurement_that_fails_says_why(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nOSError: no memory")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(LlmcError, match=r"OSError: no memory.*limits-failed"):
        measured_limits(1)
