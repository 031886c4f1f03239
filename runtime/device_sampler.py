"""Sampling on the device: parameters go in with a step, the kernels of llmc/schedules/gpu/sample.py run, tokens come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.runtime.device_memory import HostBuffer, ModelMemory, aligned
from llmc.runtime.library import Library
from llmc.runtime.sampler import Draw, not_finite
from llmc.sample_layout import FUNCTION, SampleConfig

_INPUTS = ("float32", "float64", "int32", "int32", "int32")  # types of PackedDraws.arrays
_SCRATCH = ("float32", "int32", "float64")


@dataclass(frozen=True)
class PackedDraws:
    """Arguments of the sampling function between the logits and the scratch memory, and its flags.

    Attributes:
        arrays: numbers f32[N, 3], shares f64[N, 2], tops i32[N], seen_start i32[N + 1], seen i32[M].
        flags: whether any row has a penalty, draws, has a top-k, has a top-p.
    """

    arrays: tuple[npt.NDArray[Any], ...]
    flags: tuple[int, int, int, int]


def packed_draws(draws: Sequence[Draw], vocab: int) -> PackedDraws:
    """What a batch of draws is for the device."""
    params = [draw.params for draw in draws]
    numbers = np.array([(p.temperature, p.min_p, p.repetition_penalty) for p in params], np.float32)
    shares = np.array([(d.share, 1 - d.params.top_p) for d in draws], np.float64)
    tops = np.array([min(p.top_k, vocab) if p.top_k else vocab for p in params], np.int32)
    start = np.zeros(len(draws) + 1, np.int32)
    np.cumsum([len(d.seen) for d in draws], out=start[1:])
    seen = np.concatenate([d.seen for d in draws]).astype(np.int32)
    drawn = [p for p in params if p.temperature > 0]
    flags = (
        int(len(seen) > 0),
        int(bool(drawn)),
        int(any(0 < p.top_k < vocab for p in drawn)),
        int(any(p.top_p < 1 for p in drawn)),
    )
    return PackedDraws((numbers, shares, tops, start, seen if len(seen) else np.zeros(1, np.int32)), flags)


class DeviceSampler:
    """Chooses tokens of logits on the device.

    Args:
        rows: most rows at a time.
        vocab: columns of the logits.

    Raises:
        LlmcError: the artifact has no such function, or the device's memory does not suffice.
    """

    def __init__(self, library: Library, memory: ModelMemory, rows: int, vocab: int) -> None:
        self._function = library.kernel(FUNCTION)
        self._memory, self._vocab = memory, vocab
        self._staging, self._results = HostBuffer(memory), HostBuffer(memory)
        what = "sampling"
        layout = SampleConfig(vocab)
        self._shapes = (layout.blocks, layout.ints, layout.doubles)
        self._scratch = [
            memory.empty((rows * size,), kind, what)
            for size, kind in zip(self._shapes, _SCRATCH, strict=True)
        ]
        self._tokens = memory.empty((rows,), "int32", what)
        self._inputs: Any = None
        self._size = 0

    def start(self, logits: Any, draws: Sequence[Draw]) -> npt.NDArray[np.int32]:
        """Give the choice of a token for each of the first rows of logits to the stream.

        Returns:
            i32[N]; the tokens, once the stream has been waited for.
        """
        packed = packed_draws(draws, self._vocab)
        memory, n = self._memory, len(draws)
        offsets, end = [], 0
        for array in packed.arrays:
            offsets.append(end)
            end = aligned(end + array.nbytes)
        if end > self._size:
            before, self._inputs = memory.nbytes, None
            self._inputs = memory.empty((2 * end // 4,), "int32", "sampling")
            memory.nbytes = before - self._size + 2 * end
            self._size = 2 * end
        staged = self._staging.array(end, np.uint8)
        for array, offset in zip(packed.arrays, offsets, strict=True):
            staged[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        memory.cudart.copy_in(self._inputs.data_ptr(), staged, memory.stream)
        inputs = [
            memory.view(self._inputs, array.shape, kind, offset)
            for array, kind, offset in zip(packed.arrays, _INPUTS, offsets, strict=True)
        ]
        scratch = [
            memory.view(tensor, (n, columns), kind, 0)
            for tensor, columns, kind in zip(self._scratch, self._shapes, _SCRATCH, strict=True)
        ]
        tokens = memory.view(self._tokens, (n,), "int32", 0)
        with memory.on_stream():
            self._function(logits, *inputs, *scratch, tokens, *packed.flags)
        out = self._results.array(n, np.int32)
        memory.cudart.copy_out(out, self._tokens.data_ptr(), memory.stream)
        return out

    @staticmethod
    def finish(tokens: npt.NDArray[np.int32]) -> list[int]:
        """The tokens of start(), after the stream has been waited for.

        Raises:
            LlmcError: the logits are not numbers.
        """
        found = [int(t) for t in tokens]
        bad = next((t for t in found if t < 0), None)
        if bad is not None:
            raise not_finite(-1 - bad)
        return found
