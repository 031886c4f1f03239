"""The NVIDIA side of the runtime: which of an artifact's kernels fit this machine, and TVM's part of it.

Only TVM's small CUDA runtime library and the driver are used; no toolkit, no torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from llmc import cuda_driver
from llmc.artifact import DeviceCode, DeviceImage, Manifest
from llmc.cuda_driver import CudaDevice, CudaDriver
from llmc.errors import LlmcError
from llmc.runtime import cudart
from llmc.runtime.library import ffi

_VERSION = re.compile(r"(\d+)\.(\d+)")  # of the compiler, as the manifest names it
CUDA, CPU = 2, 1  # DLDeviceType
LOWER = (
    "Free the GPU, load with a smaller max_memory or kv_pages, or compile with a smaller max_step_tokens or "
    "max_batch, or with quantized weights."
)
_LEAST_DRIVER = 13000  # TVM's CUDA runtime is built for CUDA 13


def choose_image(manifest: Manifest, driver: CudaDriver | None = None) -> DeviceImage | None:
    """The kernels of an artifact that this machine's GPU runs; None for an artifact without device code.

    Args:
        driver: what is there; default: ask.

    Raises:
        LlmcError: no driver or GPU, a driver that is too old, or no code for this GPU.
    """
    if manifest.device is None:
        return None
    driver = driver or cuda_driver.query()
    preset = manifest.target.preset
    if not driver.devices:
        raise LlmcError(
            "no-cuda-device",
            f"The artifact is for {preset}, and {driver.problem}.",
            hint="Run it on a machine with such a GPU, or compile the model with --target cpu.",
        )
    if driver.version < _LEAST_DRIVER:
        raise LlmcError(
            "cuda-driver-too-old",
            f"The artifact needs a driver for CUDA {_LEAST_DRIVER // 1000}.0 or newer (580 or newer); "
            f"this machine's implements CUDA {driver.version_text}.",
            hint="Update the NVIDIA driver.",
        )
    device = driver.devices[0]
    fitting = [image for image in manifest.device.images if runs_on(image.arch, device)]
    if not fitting:
        archs = ", ".join(image.arch for image in manifest.device.images)
        raise LlmcError(
            "wrong-gpu",
            f"The artifact holds code for {archs}; this machine's {device.name} is sm_{device.arch}.",
            hint=f"Compile the model with --target cuda/sm_{device.arch} (several: cuda/sm_80,sm_{device.arch}).",
        )
    # machine code before PTX, the newest architecture, and of two of one number the one with its own features
    chosen = max(fitting, key=lambda image: (image.format != "ptx", _number(image.arch), image.arch))
    _check_ptx(chosen, manifest.device, driver)
    _check_shared(chosen, manifest.device, device)
    return chosen


def _check_ptx(image: DeviceImage, code: DeviceCode, driver: CudaDriver) -> None:
    """A driver translates PTX of its own CUDA version and of older ones."""
    found = _VERSION.search(code.compiler)
    wanted = 1000 * int(found[1]) + 10 * int(found[2]) if found else _LEAST_DRIVER
    if image.format == "ptx" and driver.version < wanted:
        device = driver.devices[0]
        raise LlmcError(
            "cuda-driver-too-old",
            f"The artifact has no machine code for this machine's {device.name} (sm_{device.arch}), and its PTX needs a "
            f"driver for CUDA {wanted // 1000}.{wanted % 1000 // 10}; this machine's implements CUDA "
            f"{driver.version_text}.",
            hint=f"Update the NVIDIA driver, or compile the model with --target cuda/sm_{device.arch}.",
        )


def _check_shared(image: DeviceImage, code: DeviceCode, device: CudaDevice) -> None:
    """GPUs differ in the shared memory that a block may take, also within a major version; PTX asks for what its code does."""
    mine = [k for k in code.kernels if _number(k.arch) == _number(image.arch)]
    largest = max(mine, key=lambda k: k.shared_bytes, default=None)
    if largest is not None and device.shared and largest.shared_bytes > device.shared:
        raise LlmcError(
            "wrong-gpu",
            f"The artifact's kernel {largest.name} for {image.arch} takes {largest.shared_bytes} bytes of shared memory; "
            f"this machine's {device.name} (sm_{device.arch}) has {device.shared} for a block.",
            hint=f"Compile the model with --target cuda/sm_{device.arch}.",
        )


def runs_on(arch: str, device: CudaDevice) -> bool:
    """Whether machine code for an architecture runs on a device: the same major version and no newer minor one.

    Code with the suffix ``a`` runs on exactly its architecture; PTX (``compute_90``) on its own and all newer ones (CUDA
    programming guide, 5.4).
    """
    number = _number(arch)
    if arch.startswith("compute_"):
        return number <= device.arch
    if arch.endswith("a"):
        return number == device.arch
    return number // 10 == device.arch // 10 and number <= device.arch


def _number(arch: str) -> int:
    return int("".join(c for c in arch if c.isdigit()))


def load_runtime() -> None:
    """Make TVM's CUDA device and module loader known.

    Raises:
        LlmcError: the CUDA runtime library that it links to is not installed.
    """
    tvm_ffi = ffi()
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        return
    spec = importlib.util.find_spec("tvm")
    assert spec is not None and spec.submodule_search_locations
    library = Path(next(iter(spec.submodule_search_locations))) / "lib" / "libtvm_runtime_cuda.so"
    try:
        cudart.open_library()
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as e:
        raise LlmcError(
            "no-cuda-runtime",
            f"TVM's CUDA runtime cannot be loaded: {e}.",
            hint="Install it: pip install 'llmc-compiler[cuda]'.",
        ) from None


def module_from(raw: bytes) -> Any:
    """TVM's module of kernels from a file that the compiler wrote (targets/cuda/build.py)."""
    return ffi().get_global_func("ffi.Module.load_from_bytes.cuda")(raw)


class DeviceMemory:
    """Tensors on one device, copied as they are asked for; counts what it hands out.

    Args:
        kind: CUDA; CPU for tests of this class.
    """

    def __init__(self, kind: int = CUDA, index: int = 0) -> None:
        tvm_ffi = ffi()
        self._ffi = tvm_ffi
        self.device = tvm_ffi.device("cuda" if kind == CUDA else "cpu", index)
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._from_bytes = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._to_bytes = tvm_ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        self.nbytes = 0

    def empty(self, shape: Sequence[int], dtype: str, what: str) -> Any:
        """An uninitialised tensor.

        Args:
            what: it is for, in the message of an error.

        Raises:
            LlmcError: the device's memory does not suffice, with the numbers.
        """
        kind = self._ffi.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * int(kind.itemsize)
        try:
            tensor = self._allocate(self._ffi.Shape(list(shape)), kind, self.device, None)
        except RuntimeError as e:
            raise self.exhausted(what, size, e) from None
        self.nbytes += size
        return tensor

    def exhausted(self, what: str, size: int = 0, cause: Exception | None = None) -> LlmcError:
        """The error of a memory that does not suffice.

        Args:
            what: the memory is for.
            size: bytes that it takes; 0 = not known.
        """
        free, total = cudart.Cudart().memory()
        needed = f"{size} bytes for {what}" if size else f"memory for {what}"
        return LlmcError(
            "out-of-device-memory",
            f"The GPU's memory does not suffice: {needed}, {free} of {total} bytes are free, {self.nbytes} are "
            "taken by this model.",
            hint=LOWER,
            context={"needed": size, "free": free, "total": total, "cause": str(cause or "")},
        )

    def put(self, tensor: Any, array: npt.NDArray[Any]) -> None:
        """Copy a C-contiguous array of the same number of bytes to a tensor."""
        self._from_bytes(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)

    def get(self, tensor: Any, shape: Sequence[int], dtype: Any) -> npt.NDArray[Any]:
        """A copy of a tensor on the host; waits for the kernels that write it."""
        out = np.empty(shape, dtype)
        self._to_bytes(tensor, ctypes.c_void_p(out.ctypes.data), out.nbytes)
        return cast("npt.NDArray[Any]", out)
