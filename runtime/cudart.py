"""What the runtime asks of NVIDIA's runtime library beside what TVM passes on: streams, pinned memory, copies, graphs.

Through ctypes, because the library is there in any case: TVM's CUDA runtime is linked against it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
LIBRARY = "libcudart.so.13"
_NON_BLOCKING = 1  # cudaStreamNonBlocking: no waiting for the default stream
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: what other threads do does not end a capture
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class CudaError(RuntimeError):
    """A call of the library failed.

    Attributes:
        status: its cudaError_t.
    """

    def __init__(self, call: str, status: int, text: str) -> None:
        super().__init__(f"{call} fails with error {status}: {text}")
        self.status = status


def open_library() -> None:
    """Load the library for all that ask for it: the one that is loaded or on the loader's path, else the one from pip.

    Raises:
        OSError: there is none.
    """
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        spec = importlib.util.find_spec("nvidia")
        places = spec.submodule_search_locations if spec is not None else None
        found = [Path(p) / "cu13" / "lib" / LIBRARY for p in places or ()]
        here = next((path for path in found if path.is_file()), None)
        if here is None:
            raise
        ctypes.CDLL(str(here), mode=ctypes.RTLD_GLOBAL)


class Cudart:
    """The library, once it is loaded; the calls act on the device that is current, the first one."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            self._library.cudaGetLastError()  # it is reported here, and not again at the next call
            text = self._library.cudaGetErrorString(status).decode(errors="replace")
            raise CudaError(name, status, text)

    def memory(self) -> tuple[int, int]:
        """(free, all) bytes of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def stream(self) -> int:
        """A new stream, which waits for no other one."""
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        return int(stream.value or 0)

    def end_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def wait_all(self) -> None:
        """Until all that was given to the device is done, by whomever."""
        self._call("cudaDeviceSynchronize")

    def wait(self, stream: int) -> None:
        """Until all that was given to the stream is done.

        Raises:
            CudaError: also if one of these operations failed.
        """
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def pinned(self, nbytes: int) -> Bytes:
        """Host memory that copies read and write while the host goes on; freed with the array."""
        at = ctypes.c_void_p()
        size = max(nbytes, 1)
        self._call("cudaMallocHost", ctypes.byref(at), ctypes.c_size_t(size))
        raw = (ctypes.c_uint8 * size).from_address(int(at.value or 0))
        weakref.finalize(raw, self._library.cudaFreeHost, at)
        return np.ctypeslib.as_array(raw)

    def copy_in(self, to: int, source: npt.NDArray[np.generic], stream: int) -> None:
        """Begin to copy a contiguous array to a device address; pinned memory must stay as it is until it is done."""
        size = ctypes.c_size_t(source.nbytes)
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source.ctypes.data),
            size,
            ctypes.c_int(_TO_DEVICE),
            ctypes.c_void_p(stream),
        )

    def copy_rows_in(self, to: int, pitch: int, source: npt.NDArray[np.generic], stream: int) -> None:
        """copy_in of the rows of a matrix to rows that are `pitch` bytes apart."""
        rows, width = source.shape[0], source.shape[1] * source.itemsize
        self._call(
            "cudaMemcpy2DAsync",
            ctypes.c_void_p(to),
            ctypes.c_size_t(pitch),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_size_t(width),
            ctypes.c_size_t(width),
            ctypes.c_size_t(rows),
            ctypes.c_int(_TO_DEVICE),
            ctypes.c_void_p(stream),
        )

    def copy_out(self, target: npt.NDArray[np.generic], source: int, stream: int) -> None:
        """Begin to copy from a device address to a contiguous array."""
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_void_p(source),
            ctypes.c_size_t(target.nbytes),
            ctypes.c_int(_TO_HOST),
            ctypes.c_void_p(stream),
        )

    def capture(self, stream: int, work: Callable[[], object]) -> int:
        """What `work` gives to the stream, as an executable graph; nothing of it runs.

        Raises:
            CudaError: it does something that a graph cannot hold.
        """
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(stream), ctypes.c_int(_THREAD_LOCAL))
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            work()
        finally:
            # the stream must not stay in capture, whatever happens
            ended = self._library.cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
        if ended != 0 or not graph.value:
            self._library.cudaGetLastError()
            text = self._library.cudaGetErrorString(ended).decode(errors="replace")
            raise CudaError("cudaStreamEndCapture", ended, text)
        try:
            self._call("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._library.cudaGraphDestroy(graph)
        return int(executable.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        """Give the operations of an executable graph to a stream."""
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def drop(self, graph: int) -> None:
        """Free an executable graph that is not running."""
        self._library.cudaGraphExecDestroy(ctypes.c_void_p(graph))
