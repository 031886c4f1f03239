"""What the NVIDIA driver of this machine says, asked through its C library; needs no CUDA toolkit and no Python package."""

from __future__ import annotations

import ctypes
import ctypes.util
from dataclasses import dataclass

_NAMES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
# CUdevice_attribute in cuda.h
_MAJOR, _MINOR, _MULTIPROCESSORS, _SHARED = 75, 76, 16, 97


@dataclass(frozen=True)
class CudaDevice:
    """One GPU.

    Attributes:
        arch: of its compute capability, e.g. 90 for 9.0.
        memory: bytes.
        shared: bytes of shared memory that a block may take; 0 = not known.
    """

    index: int
    name: str
    arch: int
    multiprocessors: int
    memory: int
    shared: int = 0


@dataclass(frozen=True)
class CudaDriver:
    """The driver: the CUDA version that it implements (1000 * major + 10 * minor), and its devices.

    `problem` is empty, or a clause on why there is nothing to run on.
    """

    version: int
    devices: tuple[CudaDevice, ...]
    problem: str = ""

    @property
    def version_text(self) -> str:
        return f"{self.version // 1000}.{self.version % 1000 // 10}"


def query() -> CudaDriver:
    """Ask the driver; never raises."""
    library = None
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    if library is None:
        return CudaDriver(0, (), "there is no NVIDIA driver (libcuda.so.1 cannot be loaded)")
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    status = library.cuInit(0)
    if status != 0:
        return CudaDriver(
            version.value, (), f"the NVIDIA driver finds no usable GPU (cuInit gives error {status})"
        )
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    devices = tuple(_device(library, i) for i in range(count.value))
    return CudaDriver(version.value, devices, "" if devices else "the NVIDIA driver sees no GPU")


def _device(library: ctypes.CDLL, index: int) -> CudaDevice:
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    library.cuDeviceGet(ctypes.byref(handle), index)
    library.cuDeviceGetName(name, 256, handle)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
        return value.value

    arch = 10 * attribute(_MAJOR) + attribute(_MINOR)
    return CudaDevice(
        index,
        name.value.decode(errors="replace"),
        arch,
        attribute(_MULTIPROCESSORS),
        memory.value,
        attribute(_SHARED),
    )
