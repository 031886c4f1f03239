"""Times on the GPU itself: events of the CUDA driver, through its C library; no toolkit, no torch.

A wait on the GPU goes ahead of what is timed. Meanwhile the host launches the first event, the kernels and the second
event, so that the time between the events holds no launch by the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

# CUdevice_attribute in cuda.h
MULTIPROCESSORS, CLOCK_KHZ, CACHE_BYTES = 16, 13, 38
# spins on the nanosecond timer of the GPU (PTX ISA, %globaltimer)
WAIT_PTX = """
.version 7.0
.target sm_75
.address_size 64
.visible .entry llmc_wait(.param .u64 nanoseconds)
{
  .reg .u64 %begin, %now, %wanted;
  .reg .pred %more;
  ld.param.u64 %wanted, [nanoseconds];
  mov.u64 %begin, %globaltimer;
AGAIN:
  mov.u64 %now, %globaltimer;
  sub.u64 %now, %now, %begin;
  setp.lt.u64 %more, %now, %wanted;
  @%more bra AGAIN;
  ret;
}
"""


class DriverError(RuntimeError):
    """A call of the driver failed; after errors of a kernel every later call of the process fails too."""


class DeviceClock:
    """Events on the first GPU's default stream, where TVM launches kernels.

    Args:
        library: the driver's C library; None = this machine's.

    Raises:
        DriverError: there is no GPU, or it cannot be used.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = ctypes.CDLL("libcuda.so.1")
            except OSError as e:
                raise DriverError(f"the NVIDIA driver cannot be loaded: {e}") from None
        self._cuda = library
        self._call("cuInit", 0)
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._events = tuple(ctypes.c_void_p() for _ in range(2))
        for event in self._events:
            self._call("cuEventCreate", ctypes.byref(event), 0)
        self._wait = ctypes.c_void_p()
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(WAIT_PTX.encode()))
        self._call("cuModuleGetFunction", ctypes.byref(self._wait), module, ctypes.c_char_p(b"llmc_wait"))

    def attribute(self, number: int) -> int:
        """A CUdevice_attribute."""
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def seconds(self, work: Callable[[], None], head_start: float) -> float:
        """Time of what `work` launches, between two events.

        Args:
            head_start: seconds that the GPU waits before, in which the host should have launched all of it.

        Raises:
            DriverError: a kernel failed.
        """
        begin, end = self._events
        if head_start > 0:
            self._launch_wait(int(head_start * 1e9))
        self._call("cuEventRecord", begin, None)
        work()
        self._call("cuEventRecord", end, None)
        self._call("cuEventSynchronize", end)
        milliseconds = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(milliseconds), begin, end)
        return milliseconds.value * 1e-3

    def copy_bandwidth(self, size: int = 1 << 30, turns: int = 8) -> float:
        """Bytes per second, read and written, of copies within the GPU's memory; the best of several."""
        pointers = [ctypes.c_uint64() for _ in range(2)]
        for pointer in pointers:
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        try:
            copy = lambda: self._call("cuMemcpyDtoDAsync_v2", *pointers, ctypes.c_size_t(size), None)  # noqa: E731
            copy()
            return 2 * size / min(self.seconds(copy, 5e-5) for _ in range(turns))
        finally:
            for pointer in pointers:
                self._call("cuMemFree_v2", pointer)

    def _launch_wait(self, nanoseconds: int) -> None:
        value = ctypes.c_uint64(nanoseconds)
        arguments = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(value), ctypes.c_void_p))
        sizes = (1, 1, 1, 1, 1, 1, 0)  # grid, block, shared memory
        self._call("cuLaunchKernel", self._wait, *sizes, None, arguments, None)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status != 0:
            raise DriverError(f"{name}: {self._error(status)}")

    def _error(self, status: int) -> str:
        text = ctypes.c_char_p()
        known = self._cuda.cuGetErrorString(status, ctypes.byref(text)) == 0 and text.value
        return text.value.decode() if known and text.value else f"error {status}"
