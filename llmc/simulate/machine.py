"""The state of the threads that run: registers, masks, and the loads, stores and barriers on them.

A value is a numpy array: () if all threads have the same, [n] one per thread, [n, l] or [1, l] vectors of l elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc.simulate.errors import failure
from llmc.simulate.memory import Array, Ints, Lanes, Memory, Registers
from llmc.simulate.strands import Strands

WARP = 32


@dataclass(frozen=True)
class Pointer:
    """Address of an element, as intrinsics take it."""

    memory: Memory | Registers
    dtype: Any
    index: Any


@dataclass
class Counts:
    """What a launch did, summed over all blocks."""

    blocks: int = 0
    threads: int = 0
    barriers: int = 0
    shared_bytes: int = 0


@dataclass
class Machine:
    """Threads of some blocks in lockstep.

    Attributes:
        lanes: the threads.
        values: variables by number.
        mask: bool[n]; which threads execute; None = all.
        node: the statement being executed, for messages.
        pending: asynchronous copies that have been issued, and are in no group yet (see intrinsics.py).
        groups: groups of them that have not been waited for, oldest first.
        products: products of matrix units that are under way (see warpgroup.py).
        strands, strand: the parts of the block that run side by side, if there are several, and which one this is.
    """

    lanes: Lanes
    values: list[Any]
    counts: Counts
    mask: Array | None = None
    node: Any = None
    pending: list[Any] = field(default_factory=list)
    groups: list[list[Any]] = field(default_factory=list)
    products: Any = None
    strands: Strands | None = None
    strand: int = 0

    def part(self, mask: Array, strands: Strands, strand: int) -> Machine:
        """The machine of some of its threads, that goes its own way from here on."""
        return Machine(
            self.lanes, list(self.values), self.counts, mask, self.node, strands=strands, strand=strand
        )

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Let other threads run until `ready`.

        Raises:
            SimulationError: no other can run.
        """
        if self.strands is not None:
            self.strands.wait_until(self.strand, ready, self.node, what)
        elif not ready():
            raise failure("deadlock", f"All threads wait for {what}", self.node)

    @property
    def active(self) -> Ints:
        """Numbers of the lanes that execute."""
        return self.lanes.lane if self.mask is None else np.flatnonzero(self.mask)

    def spread(self, value: Any) -> Array:
        """A value with its own row for every thread."""
        value = np.asarray(value)
        if value.ndim == 0:
            return np.broadcast_to(value, (self.lanes.n,))
        return (
            value
            if value.shape[0] == self.lanes.n
            else np.broadcast_to(value, (self.lanes.n, *value.shape[1:]))
        )

    def narrowed(self, condition: Array) -> Array | None:
        """The mask of those active threads for which a condition holds; None = of none."""
        mask = condition if self.mask is None else condition & self.mask
        return mask if mask.any() else None

    # -- memory ------------------------------------------------------------------------------------------------------

    def load(self, memory: Memory | Registers, dtype: Any, index: Any, contiguous: bool) -> Any:
        """Elements of a memory at `index` ([n], () or vectors), under the mask."""
        index = np.asarray(index)
        if isinstance(memory, Registers):
            return self._load_registers(memory, index)
        view = memory.view(dtype)
        if index.ndim == 0 and not memory.shared and memory.shadow is None:
            if not 0 <= index < view.shape[1]:
                memory.check(index.reshape(1), view.shape[1], self.lanes, self.active[:1], self.node)
            return view[0, index]
        active = self.active
        wanted = self.spread(index)[active]
        self._check(memory, dtype, view, wanted, active, contiguous)
        memory.touch(wanted, dtype.itemsize, self.lanes, active, False, self.node)
        found = view[self._rows(memory, active, wanted), wanted]
        if self.mask is None:
            return found
        out = np.zeros((self.lanes.n, *wanted.shape[1:]), dtype)
        out[active] = found
        return out

    def store(self, memory: Memory | Registers, dtype: Any, index: Any, value: Any, contiguous: bool) -> None:
        """Write elements under the mask."""
        index, value = np.asarray(index), np.asarray(value)
        if isinstance(memory, Registers):
            self._store_registers(memory, index, value)
            return
        view = memory.view(dtype)
        active = self.active
        wanted = self.spread(index)[active]
        self._check(memory, dtype, view, wanted, active, contiguous)
        memory.touch(wanted, dtype.itemsize, self.lanes, active, True, self.node)
        view[self._rows(memory, active, wanted), wanted] = self.spread(value)[active]

    def _rows(self, memory: Memory, active: Ints, index: Ints) -> Any:
        if not memory.shared:
            return 0
        rows = self.lanes.block[active]
        return rows if index.ndim == 1 else rows[:, None]

    def _check(
        self, memory: Memory, dtype: Any, view: Array, index: Ints, active: Ints, contiguous: bool
    ) -> None:
        memory.check(index, view.shape[1], self.lanes, active, self.node)
        if index.ndim == 1 or not contiguous or index.size == 0:
            return
        # a vector is one access of all of its bytes, which must lie on a multiple of their number
        size = index.shape[1] * dtype.itemsize
        if size > 16:
            raise failure(
                "unsupported", f"A vector of {size} bytes is accessed; at most 16 go at once", self.node
            )
        wrong = index[:, 0] * dtype.itemsize % size != 0
        if wrong.any():
            at = int(np.argmax(wrong))
            thread = self.lanes.first_block * self.lanes.block_size + int(active[at])
            raise failure(
                "alignment",
                f"{self.lanes.name(thread)} accesses {size} bytes of {memory.name} at byte "
                f"{int(index[at, 0]) * dtype.itemsize}, which is no multiple of {size}",
                self.node,
            )

    def _load_registers(self, memory: Registers, index: Array) -> Any:
        data = memory.data
        self._check_registers(memory, index)
        if index.ndim == 0:
            return data[index].copy()
        if index.ndim == 2:
            if index.shape[0] == 1:
                return data[index[0]].T
            return data[index, self.lanes.lane[:, None]]
        safe = index if self.mask is None else np.where(self.mask, index, 0)
        return data[safe, self.lanes.lane]

    def _store_registers(self, memory: Registers, index: Array, value: Array) -> None:
        data = memory.data
        self._check_registers(memory, index)
        if index.ndim == 0:
            row = data[int(index)]  # a view
            np.copyto(row, value, where=True if self.mask is None else self.mask)
            return
        active = self.active
        lanes = active if index.ndim == 1 else active[:, None]
        data[self.spread(index)[active], lanes] = self.spread(value)[active]

    def _check_registers(self, memory: Registers, index: Array) -> None:
        size = memory.data.shape[0]
        checked = index if index.ndim == 0 or self.mask is None else self.spread(index)[self.mask]
        if checked.size and (checked.min() < 0 or checked.max() >= size):
            raise failure(
                "bounds",
                f"Element {int(checked.min() if checked.min() < 0 else checked.max())} of the local buffer "
                f"{memory.name} is accessed, which has {size}",
                self.node,
                buffer=memory.name,
            )

    # -- cooperation of threads --------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """All threads of a block meet (bar.sync)."""
        lanes = self.lanes
        if lanes.clocks is not None:
            lanes.clocks.meet(self.active, lanes.block_size)
        if self.mask is None:
            lanes.barriers += 1
            self.counts.barriers += lanes.blocks
            return
        here = self.mask.reshape(lanes.blocks, lanes.block_size).sum(1)
        bad = (here != 0) & (here != lanes.block_size)
        if bad.any():
            block = int(np.argmax(bad))
            raise failure(
                "barrier",
                f"{here[block]} of {lanes.block_size} threads of block {lanes.first_block + block} reach a barrier",
                self.node,
            )
        lanes.barriers += here != 0
        self.counts.barriers += int((here != 0).sum())

    def warp_barrier(self) -> None:
        """All threads of a warp meet (bar.warp.sync)."""
        self.whole_warps("a warp's barrier")
        if self.lanes.clocks is not None:
            self.lanes.clocks.meet(self.active, WARP)
        self.lanes.warp_barriers[self.active] += 1

    def whole_warps(self, what: str) -> None:
        """Raise unless all threads of each warp execute, or none."""
        if self.mask is None:
            return
        lanes = self.lanes
        here = np.bincount(lanes.warp, weights=self.mask)
        size = np.bincount(lanes.warp)
        bad = (here != 0) & (here != size)
        if bad.any():
            warp = int(np.argmax(bad))
            thread = lanes.first_block * lanes.block_size + int(np.argmax(lanes.warp == warp))
            raise failure(
                "barrier",
                f"{int(here[warp])} of {int(size[warp])} threads of the warp of {lanes.name(thread)} reach {what}",
                self.node,
            )

    def shuffle(self, kind: str, value: Any, operand: Any, width: int) -> Any:
        """A value of another thread of the warp: kind "idx", "up", "down" or "xor" (PTX shfl.sync)."""
        value = self.spread(value)
        lanes = self.lanes
        lane = lanes.thread % WARP
        segment = lane // width * width
        other = self.spread(operand).astype(np.int64)
        source = {
            "idx": lambda: segment + other % width,
            "up": lambda: lane - other,
            "down": lambda: lane + other,
            "xor": lambda: lane ^ other,
        }[kind]()
        source = np.where((source < segment) | (source >= segment + width), lane, source)
        position = lanes.block * lanes.block_size + lanes.thread // WARP * WARP + source
        active = self.active
        missing = (lanes.thread // WARP * WARP + source)[active] >= lanes.block_size
        if self.mask is not None:
            inside = np.minimum(position[active], lanes.n - 1)
            missing |= ~self.mask[inside]
        if missing.any():
            thread = lanes.first_block * lanes.block_size + int(active[np.argmax(missing)])
            raise failure(
                "shuffle", f"{lanes.name(thread)} reads from a thread that does not take part", self.node
            )
        return value[np.minimum(position, lanes.n - 1)]
