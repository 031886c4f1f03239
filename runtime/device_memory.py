"""Tensors in a GPU's memory, copies to and from them, and what is said when the memory does not suffice."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from llmc.runtime.cuda import DeviceMemory
from llmc.runtime.cudart import Bytes, CudaError, Cudart
from llmc.runtime.device_view import tensor_at

_PART = 16 << 20  # bytes of a pinned buffer for weights
_ALIGN = 256
_MOST_VIEWS = 1024


class ModelMemory(DeviceMemory):
    """The memory of the first GPU, and the stream that the work of all models goes through.

    The stream is not the default one, which cannot be captured. It is one for the process, because TVM's pool of scratch
    memory is: what one model's kernels are still using may be handed to another one, whose kernels must come later.
    The CUDA runtime must be loaded (cuda.load_runtime).

    Attributes:
        nbytes: of the tensors that it has handed out.
        cudart: the library's calls.
        turn: held while a step is given to the stream, so that the steps of two models do not mix.
    """

    turn = threading.RLock()
    _stream: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[tuple[int, tuple[int, ...], str], Any] = {}
        self.cudart = Cudart()
        with self.turn:
            if not ModelMemory._stream:
                ModelMemory._stream = self.cudart.stream()

    @property
    def stream(self) -> int:
        """The stream."""
        return ModelMemory._stream

    def on_stream(self) -> Any:
        """A context in which this thread's kernels go to the stream."""
        return self._ffi.use_raw_stream(self.device, self.stream)

    def view(self, tensor: Any, shape: Sequence[int], dtype: str, offset: int) -> Any:
        """A tensor over the bytes of another one from `offset` on, which must outlive it."""
        key = (tensor.data_ptr() + offset, tuple(shape), dtype)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            found = self._views[key] = tensor_at(*key)
        return found

    def require(self, size: int, what: str) -> None:
        """Raise now if so many bytes are not free, before half of the work is done.

        Raises:
            LlmcError: with the numbers.
        """
        if size > self.cudart.memory()[0]:
            raise self.exhausted(what, size)

    def fill(self, tensors: Iterable[tuple[Any, Bytes]]) -> None:
        """Copy bytes to tensors: through two pinned buffers, one of which is filled while the other one is copied."""
        buffers = [self.cudart.pinned(_PART) for _ in range(2)]
        streams = [self.cudart.stream() for _ in buffers]
        turn = 0
        for tensor, raw in tensors:
            for begin in range(0, raw.nbytes, _PART):
                part = raw[begin : begin + _PART]
                self.cudart.wait(streams[turn])
                staged = buffers[turn][: part.nbytes]
                staged[:] = part
                self.cudart.copy_in(tensor.data_ptr() + begin, staged, streams[turn])
                turn = 1 - turn
        for stream in streams:
            self.cudart.wait(stream)
            self.cudart.end_stream(stream)


class HostBuffer:
    """Pinned memory that grows; a step's data lie in it one behind the other."""

    def __init__(self, memory: ModelMemory) -> None:
        self._memory = memory
        self._raw: Bytes = np.zeros(0, np.uint8)

    def array(self, count: int, dtype: Any, offset: int = 0) -> npt.NDArray[Any]:
        """`count` elements from byte `offset` on.

        Of a buffer that is too small, nothing must be under way from or to it: it is replaced.
        """
        end = offset + count * np.dtype(dtype).itemsize
        if end > self._raw.nbytes:
            old, self._raw = self._raw, self._memory.cudart.pinned(max(2 * end, 1 << 16))
            self._raw[: old.nbytes] = old
        return cast("npt.NDArray[Any]", self._raw[offset:end].view(dtype))


def aligned(offset: int) -> int:
    """The next place for an array."""
    return -(-offset // _ALIGN) * _ALIGN


def is_exhausted(error: Exception) -> bool:
    """Whether TVM's runtime, or the library, failed for lack of memory."""
    if isinstance(error, CudaError):
        return error.status == 2
    return "out of memory" in str(error)
