"""Decode steps on a device: captured once as a CUDA graph for each number of sequences, then replayed.

A replay is one call of the driver where a step has some hundred launches. Captured through the stream interface of the
CUDA runtime (docs/design/013-cuda-runtime.md says why not by TVM's pass).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llmc import knobs
from llmc.runtime.cudart import CudaError
from llmc.runtime.device_inputs import BatchBuffer
from llmc.runtime.device_memory import HostBuffer, ModelMemory
from llmc.runtime.engine import StepInputs

_STEP = 16  # from so many sequences on, numbers of sequences are multiples of it


def buckets(max_batch: int) -> tuple[int, ...]:
    """Numbers of sequences that decode steps are filled up to: powers of two, then multiples of 16."""
    small = [1, 2, 4, 8]
    return (*(n for n in (*small, *range(_STEP, max_batch, _STEP)) if n < max_batch), max_batch)


@dataclass
class _Captured:
    """A graph, the logits that it writes, and the state of TVM's memory pool that it was captured in."""

    executable: int
    logits: Any
    epoch: int


class Scratch:
    """Counts how often TVM may have freed what lies idle in its pool of device memory, which graphs go on using.

    The pool is one per process and device: all models share it.
    """

    epoch = 0

    @classmethod
    def may_be_freed(cls) -> None:
        """Graphs that were captured so far must not be replayed."""
        cls.epoch += 1


class DecodeSteps:
    """Runs decode steps of any number of sequences up to a limit.

    Args:
        memory: of the device.
        staging: where inputs are packed.
        call: runs the compiled function `decode` on input tensors and returns its logits, all on the device.
        max_batch, groups, width: most sequences, groups of the KV plan, most pages of a sequence.
    """

    def __init__(
        self,
        memory: ModelMemory,
        staging: HostBuffer,
        call: Callable[[Sequence[Any]], Any],
        max_batch: int,
        groups: int,
        width: int,
    ) -> None:
        self._memory, self._staging, self._call = memory, staging, call
        self._groups, self._width = groups, width
        self._sizes = buckets(max_batch)
        self._buffers: dict[int, BatchBuffer] = {}
        self._graphs: dict[int, _Captured] = {}
        self._capture = knobs.cuda_graphs()

    def run(self, inputs: StepInputs) -> Any:
        """Logits f32[n, V] on the device, n the number of sequences filled up; valid until the next step.

        Raises:
            LlmcError: the device's memory does not suffice.
        """
        count = len(inputs.context_len)
        size = next(n for n in self._sizes if n >= count)
        if size not in self._buffers:
            self._buffers[size] = BatchBuffer(self._memory, self._staging, size, self._groups, self._width)
        buffer = self._buffers[size]
        buffer.put(inputs)
        if not self._capture:
            return self._call(buffer.tensors)
        found = self._graphs.get(size)
        if found is None or found.epoch != Scratch.epoch:
            self._drop(size)
            # a run of its own first: it loads kernels and leaves memory in TVM's pool, which a capture cannot take anew
            self._call(buffer.tensors)
            try:
                self._graphs[size] = self._captured(buffer)
            except (CudaError, RuntimeError) as e:
                self._capture = False
                warnings.warn(
                    f"decode steps run without CUDA graphs, which makes small models slower: {_first_line(e)}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return self._call(buffer.tensors)
        self._memory.cudart.launch(self._graphs[size].executable, self._memory.stream)
        return self._graphs[size].logits

    def _captured(self, buffer: BatchBuffer) -> _Captured:
        """A graph of the step on a buffer's tensors."""
        made: list[Any] = []
        cudart = self._memory.cudart
        executable = cudart.capture(self._memory.stream, lambda: made.append(self._call(buffer.tensors)))
        return _Captured(executable, made[0], Scratch.epoch)

    def _drop(self, size: int) -> None:
        old = self._graphs.pop(size, None)
        if old is not None:
            self._memory.cudart.wait(self._memory.stream)
            self._memory.cudart.drop(old.executable)

    def __del__(self) -> None:
        for size in list(getattr(self, "_graphs", ())):
            with suppress(CudaError):  # of a device that has failed nothing can be freed
                self._drop(size)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
