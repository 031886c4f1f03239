"""Memory of the simulated GPU, with bounds, alignment and races checked on every access.

A race is two threads that touch one address, at least one of them writing, without a barrier of their block between
the two accesses (threads of different blocks have none). The detector keeps for each address the last writer and the
last readers with the number of barriers that their block had passed; nothing depends on the order in which the
simulator happens to run threads, so code that is only right because of lockstep execution is found too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.simulate.errors import failure

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

_NONE = -1
_MANY = -2


@dataclass
class Lanes:
    """The threads that run side by side: n = blocks * block_size lanes, a block's threads together.

    Attributes:
        first_block: number of the first of these blocks in the grid.
        blocks, block_size: how many, and threads of each.
        barriers: i64[blocks]; barriers that each block has passed.
        warp_barriers: i64[n]; barriers of its warp that each thread has passed.
        clocks: ordering.Clocks in kernels with counting barriers, whose threads meet in other ways too; else None.
        shared: shared memory, in the order of its addresses.
    """

    first_block: int
    blocks: int
    block_size: int
    clocks: Any = None

    def __post_init__(self) -> None:
        self.n = self.blocks * self.block_size
        self.block: Ints = np.repeat(np.arange(self.blocks), self.block_size)
        self.thread: Ints = np.tile(np.arange(self.block_size), self.blocks)
        self.lane: Ints = np.arange(self.n)
        self.shared: list[Memory] = []
        self.barriers: Ints = np.zeros(self.blocks, np.int64)
        self.warp_barriers: Ints = np.zeros(self.n, np.int64)
        # a warp never spans two blocks
        warps = -(-self.block_size // 32)
        self.warp: Ints = self.block * warps + self.thread // 32

    def place(self, memory: Memory) -> None:
        """Give shared memory an address, behind what there is."""
        used = [m.address + m.data.shape[1] for m in self.shared]
        memory.address = -(-max(used, default=0) // 1024) * 1024
        self.shared.append(memory)

    def name(self, thread: int) -> str:
        """A thread as people count: its block and its number within."""
        return f"block {thread // self.block_size}, thread {thread % self.block_size}"


class Shadow:
    """Who touched each granule of a memory last."""

    def __init__(self, rows: int, granules: int) -> None:
        shape = (rows, granules)
        self.writer = np.full(shape, _NONE, np.int64)
        self.write_time = np.zeros(shape, np.int64)
        self.write_warp_time = np.zeros(shape, np.int64)
        self.reader = np.full(shape, _NONE, np.int64)  # thread, or _MANY
        self.reader_block = np.full(shape, _NONE, np.int64)  # block, or _MANY
        self.reader_warp = np.full(shape, _NONE, np.int64)  # warp, or _MANY
        self.read_time = np.zeros(shape, np.int64)
        self.read_warp_time = np.zeros(shape, np.int64)


class Memory:
    """A global tensor, or the shared memory of one name in every running block.

    Args:
        name: for messages.
        data: u8[rows, bytes]; one row for global memory, one per block for shared memory.
        granule: bytes of the smallest element that the kernel takes it as.
        shared: whether rows belong to blocks.
        watch: whether races can occur at all (somebody writes it).
        make: of the shadow that watches: Shadow, or in kernels with counting barriers ordering.OrderedShadow.

    Attributes:
        address: of shared memory, in the block's.
        barriers: byte -> bulk.CountingBarrier.
    """

    def __init__(
        self, name: str, data: Array, granule: int, shared: bool, watch: bool, make: Any = None
    ) -> None:
        self.name, self.data, self.granule, self.shared = name, data, granule, shared
        self.address = 0
        self.barriers: dict[int, Any] = {}
        self._views: dict[Any, Array] = {}
        self.shadow: Any = None
        if watch:
            self.shadow = (make or Shadow)(data.shape[0], -(-data.shape[1] // granule))

    def forget(self, make: Any = None) -> None:
        """All accesses so far lie behind a point that every thread waits for."""
        if self.shadow is not None:
            self.shadow = (make or Shadow)(*self.shadow.writer.shape)

    def touch_by(self, units: Ints, actors: Any, lanes: Lanes, write: bool, statement: Any) -> None:
        """Record accesses to granules by agents that need not be threads: ordering.Actors."""
        if self.shadow is not None and units.size:
            self.shadow.touch(self, units, actors, lanes.clocks, write, statement)

    def view(self, dtype: Any) -> Array:
        """The memory as elements of a type: [rows, elements]."""
        if dtype not in self._views:
            size = self.data.shape[1] // dtype.itemsize * dtype.itemsize
            self._views[dtype] = self.data[:, :size].view(dtype)
        return self._views[dtype]

    def check(self, index: Ints, count: int, lanes: Lanes, active: Ints, statement: Any) -> None:
        """Raise if an index (of active lanes, first axis) lies outside of `count` elements."""
        if index.size == 0:
            return
        low, high = index.min(), index.max()
        if low < 0 or high >= count:
            at = np.argwhere((index < 0) | (index >= count))[0]
            bad = int(index[tuple(at)])
            thread = lanes.first_block * lanes.block_size + int(active[at[0]])
            raise failure(
                "bounds",
                f"{lanes.name(thread)} accesses element {bad} of {self.name}, which has {count}",
                statement,
                buffer=self.name,
                element=bad,
            )

    def touch(
        self, index: Ints, itemsize: int, lanes: Lanes, active: Ints, write: bool, statement: Any
    ) -> None:
        """Record accesses of active lanes to elements of `itemsize` bytes: index [m] or [m, lanes of a vector]."""
        shadow = self.shadow
        if shadow is None or index.size == 0:
            return
        per = max(1, itemsize // self.granule)
        units: Ints = index.reshape(len(index), -1) * itemsize // self.granule
        if per > 1:
            units = (units[:, :, None] + np.arange(per)).reshape(len(index), -1)
        if lanes.clocks is not None:
            self.touch_by(units, lanes.clocks.actors(active), lanes, write, statement)
            return
        width = units.shape[1]
        lane = np.repeat(active, width)
        units = units.reshape(-1)
        block = lanes.block[lane]
        row = block if self.shared else np.zeros_like(block)
        me = lanes.first_block * lanes.block_size + lane
        my_block = lanes.first_block + block
        my_warp = my_block * 1024 + lanes.thread[lane] // 32
        now, warp_now = lanes.barriers[block], lanes.warp_barriers[lane]
        at = (row, units)
        writer = shadow.writer[at]
        clash = (writer != _NONE) & (writer != me)
        if clash.any():
            same_block = writer // lanes.block_size == my_block
            ordered = same_block & (shadow.write_time[at] < now)
            writer_warp = my_block * 1024 + writer % lanes.block_size // 32
            ordered |= same_block & (writer_warp == my_warp) & (shadow.write_warp_time[at] < warp_now)
            clash &= ~ordered
            if clash.any():
                self._race(clash, writer, me, units, itemsize, lanes, write, True, statement)
        if write:
            reader, reader_block = shadow.reader[at], shadow.reader_block[at]
            clash = (reader != _NONE) & (reader != me)
            if clash.any():
                ordered = (reader_block == my_block) & (shadow.read_time[at] < now)
                ordered |= (shadow.reader_warp[at] == my_warp) & (shadow.read_warp_time[at] < warp_now)
                clash &= ~ordered
                if clash.any():
                    self._race(clash, reader, me, units, itemsize, lanes, write, False, statement)
            shadow.writer[at] = me
            lost = shadow.writer[at] != me  # another thread wrote the same address in the same statement
            if lost.any():
                self._race(lost, shadow.writer[at], me, units, itemsize, lanes, write, True, statement)
            shadow.write_time[at], shadow.write_warp_time[at] = now, warp_now
            shadow.reader[at] = shadow.reader_block[at] = shadow.reader_warp[at] = _NONE
            return
        # a read: the first, one of the same thread, or one of many
        stale = (shadow.reader_block[at] == my_block) & (shadow.read_time[at] < now)
        fresh = (shadow.reader[at] == _NONE) | stale
        old = (shadow.reader[at], shadow.reader_block[at], shadow.reader_warp[at])
        shadow.reader[at] = np.where(fresh | (old[0] == me), me, _MANY)
        shadow.reader_block[at] = np.where(fresh | (old[1] == my_block), my_block, _MANY)
        shadow.reader_warp[at] = np.where(fresh | (old[2] == my_warp), my_warp, _MANY)
        for table, mine in (
            (shadow.reader, me),
            (shadow.reader_block, my_block),
            (shadow.reader_warp, my_warp),
        ):
            lost = table[at] != mine  # several lanes in one statement: the last one stands there
            if lost.any():
                table[row[lost], units[lost]] = _MANY
        shadow.read_time[at], shadow.read_warp_time[at] = now, warp_now

    def _race(
        self,
        clash: Array,
        other: Ints,
        me: Ints,
        units: Ints,
        itemsize: int,
        lanes: Lanes,
        write: bool,
        other_wrote: bool,
        statement: Any,
    ) -> None:
        first = int(np.argmax(clash))
        element = int(units[first]) * self.granule // itemsize
        known = int(other[first])
        who = lanes.name(known) if known >= 0 else "several threads"
        kind = f"{'written' if write else 'read'} by {lanes.name(int(me[first]))}"
        raise failure(
            "race",
            f"{'Shared' if self.shared else 'Global'} buffer {self.name}, element {element} (byte "
            f"{element * itemsize}), is {kind} and {'written' if other_wrote else 'read'} by {who} "
            f"with no barrier between",
            statement,
            buffer=self.name,
            element=element,
            threads=(known, int(me[first])),
        )


class Registers:
    """Memory private to each thread: [elements, lanes].

    An element that was never written reads as a NaN (of integers: as a large number), so that it cannot pass unseen.
    """

    def __init__(self, name: str, size: int, dtype: Any, n: int) -> None:
        self.name = name
        if np.issubdtype(dtype, np.integer):
            self.data = np.full((size, n), np.iinfo(dtype).max // 3, dtype)
        elif dtype == np.bool_:
            self.data = np.zeros((size, n), dtype)
        else:
            self.data = np.full((size, n), np.nan, dtype)
