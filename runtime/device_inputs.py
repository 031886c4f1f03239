"""A step's integers on their way to the device: packed in pinned memory, one copy, views of one device buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmc.runtime.device_memory import HostBuffer, ModelMemory, aligned
from llmc.runtime.engine import StepInputs
from llmc.runtime.pages import Int32s

_ITEM = 4


class StepBuffer:
    """The place of a step of any size; its tensors are valid until the next one.

    Args:
        staging: where the arrays are packed; nothing may be under way from it.
    """

    def __init__(self, memory: ModelMemory, staging: HostBuffer) -> None:
        self._memory, self._staging = memory, staging
        self._tensor: Any = None
        self._size = 0

    def put(self, arrays: Sequence[Int32s]) -> list[Any]:
        """Tensors i32 of the arrays' shapes, whose content is under way.

        Raises:
            LlmcError: the device's memory does not suffice.
        """
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end = aligned(end + array.nbytes)
        if end > self._size:
            before = self._memory.nbytes
            self._tensor = None  # before the larger one is made
            self._tensor = self._memory.empty((2 * end // _ITEM,), "int32", "a step's inputs")
            self._memory.nbytes = before - self._size + 2 * end
            self._size = 2 * end
        packed = self._staging.array(end // _ITEM, np.int32)
        for offset, array in zip(offsets, arrays, strict=True):
            packed[offset // _ITEM : offset // _ITEM + array.size] = array.reshape(-1)
        self._memory.cudart.copy_in(self._tensor.data_ptr(), packed, self._memory.stream)
        view = self._memory.view
        return [view(self._tensor, a.shape, "int32", o) for a, o in zip(arrays, offsets, strict=True)]


class BatchBuffer:
    """The fixed place of decode steps of one number of sequences, for a graph that is replayed.

    Block tables have the most columns that there can be, of which only those in use are copied.

    Args:
        size: sequences; a step of fewer ones is filled up with sequences of one token on page 0, whose results nobody
            reads.
        groups: of the KV plan.
        width: columns of a block table.
        staging: where the arrays are packed; nothing may be under way from it.

    Attributes:
        tensors: the inputs, in the order of StepInputs.in_order().
    """

    def __init__(self, memory: ModelMemory, staging: HostBuffer, size: int, groups: int, width: int) -> None:
        self.size, self._width = size, width
        self._memory, self._staging = memory, staging
        # input_ids, positions, query_start, context_len, slots of each group, logit_rows
        counts = [size, size, size + 1, size, *([size] * groups), size]
        self._offsets, end = [], 0
        for count in counts:
            self._offsets.append(end)
            end = aligned(end + count * _ITEM)
        self._end = end
        self._tables = []
        for _ in range(groups):
            self._tables.append(end)
            end = aligned(end + size * width * _ITEM)
        self._tensor = memory.empty((end // _ITEM,), "int32", f"the inputs of {size} sequences")
        views = [
            memory.view(self._tensor, (count,), "int32", offset)
            for count, offset in zip(counts, self._offsets, strict=True)
        ]
        tables = [memory.view(self._tensor, (size, width), "int32", offset) for offset in self._tables]
        *first, last = views
        pairs = [tensor for pair in zip(tables, first[4:], strict=True) for tensor in pair]
        self.tensors = [*first[:4], *pairs, last]

    def put(self, inputs: StepInputs) -> None:
        """Begin to copy the inputs of a decode step of at most `size` sequences."""
        used, size = len(inputs.context_len), self.size
        widths = [table.shape[1] for table in inputs.block_tables]
        packed = self._staging.array(self._end // _ITEM + size * sum(widths), np.int32)

        def part(number: int, values: Int32s, rest: int) -> None:
            first = self._offsets[number] // _ITEM
            packed[first : first + used] = values[:used]
            packed[first + used : first + size] = rest

        part(0, inputs.input_ids, 0)
        part(1, inputs.positions, 0)
        start = self._offsets[2] // _ITEM
        packed[start : start + size + 1] = np.arange(size + 1, dtype=np.int32)
        part(3, inputs.context_len, 1)
        for g, slots in enumerate(inputs.slots):
            part(4 + g, slots, 0)
        rows = self._offsets[-1] // _ITEM
        packed[rows : rows + size] = np.arange(size, dtype=np.int32)
        cudart, stream, base = self._memory.cudart, self._memory.stream, self._tensor.data_ptr()
        at = self._end // _ITEM
        cudart.copy_in(base, packed[:at], stream)
        for table, width, offset in zip(inputs.block_tables, widths, self._tables, strict=True):
            staged = packed[at : at + size * width].reshape(size, width)
            staged[:used], staged[used:] = table, 0
            at += size * width
            cudart.copy_rows_in(base + offset, self._width * _ITEM, staged, stream)
