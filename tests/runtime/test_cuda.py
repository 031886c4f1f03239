"""The parts of the CUDA runtime that need no GPU."""

from __future__ import annotations

import numpy as np

from llmc.cuda_driver import CudaDevice, query
from llmc.runtime.cuda import CPU, DeviceMemory, runs_on
from llmc.runtime.device_decode import buckets


def test_tensors_to_a_device_and_back() -> None:
    memory = DeviceMemory(CPU)
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = memory.empty((3, 4), "float32", "a test")
    memory.put(tensor, array)
    np.testing.assert_array_equal(memory.get(tensor, (3, 4), np.float32), array)
    assert memory.nbytes == 48


def test_which_code_runs_where() -> None:
    def device(arch: int) -> CudaDevice:
        return CudaDevice(0, "x", arch, 1, 1)

    runs = {("sm_80", 86), ("sm_80", 80), ("sm_90", 90), ("sm_90a", 90), ("sm_86", 89), ("compute_90", 120)}
    not_here = {("sm_80", 90), ("sm_86", 80), ("sm_90a", 100), ("sm_100", 90), ("compute_90", 89)}
    assert all(runs_on(arch, device(number)) for arch, number in runs)
    assert not any(runs_on(arch, device(number)) for arch, number in not_here)


def test_the_driver_is_asked_without_raising() -> None:
    driver = query()
    assert bool(driver.devices) != bool(driver.problem)


def test_numbers_of_sequences_that_have_a_graph() -> None:
    assert buckets(1) == (1,)
    assert buckets(5) == (1, 2, 4, 5)
    assert buckets(16) == (1, 2, 4, 8, 16)
    assert buckets(40) == (1, 2, 4, 8, 16, 32, 40)
