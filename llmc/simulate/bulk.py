"""Models of barriers that count and of bulk copies (llmc/schedules/gpu/bulk.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.simulate.errors import failure
from llmc.simulate.intrinsics import model
from llmc.simulate.machine import Machine, Pointer
from llmc.simulate.memory import Array, Ints, Memory
from llmc.simulate.ordering import Clocks, async_actors

_BYTES = np.dtype(np.uint8)


class CountingBarrier:
    """One barrier, in every running block.

    Attributes:
        takes: i64[blocks]; arrivals of a phase; 0 = not initialised.
        left, bytes_left: arrivals and bytes that the phase still waits for.
        phase: number of the phase that has not ended.
        begun: what those who arrived in it knew and showed, i32[2, blocks, agents]; ended: of the last phase of each parity.
        made_by, made_at: the thread that initialised it, and when.
    """

    def __init__(self, blocks: int, agents: int) -> None:
        self.takes, self.left, self.bytes_left, self.phase = (np.zeros(blocks, np.int64) for _ in range(4))
        self.begun: Array = np.zeros((2, blocks, agents), np.int32)
        self.ended: Array = np.zeros((2, 2, blocks, agents), np.int32)
        self.made_by, self.made_at = np.zeros(blocks, np.int64), np.zeros(blocks, np.int32)

    def settle(self, block: Ints) -> None:
        """End the phase of blocks in which everything has come."""
        b = np.unique(block)
        b = b[(self.left[b] == 0) & (self.bytes_left[b] == 0) & (self.takes[b] > 0)]
        parity = self.phase[b] % 2
        self.ended[:, parity, b] = self.begun[:, b]
        self.phase[b] += 1
        self.left[b] = self.takes[b]


def _clocks(m: Machine) -> Clocks:
    clocks = m.lanes.clocks
    assert isinstance(clocks, Clocks)
    return clocks


def _barriers(m: Machine, pointer: Pointer, active: Ints) -> list[tuple[CountingBarrier, Ints]]:
    """(barrier, those of the active lanes that use it)."""
    memory = pointer.memory
    assert isinstance(memory, Memory)
    at = m.spread(pointer.index).astype(np.int64)[active] * pointer.dtype.itemsize
    if not memory.shared or (at % 8).any():
        raise failure("alignment", f"A barrier lies at byte {int(at[0])} of {memory.name}", m.node)
    memory.check(at + 7, memory.data.shape[1], m.lanes, active, m.node)
    found = []
    for byte in np.unique(at):
        barrier = memory.barriers.get(int(byte))
        if barrier is None:
            barrier = memory.barriers[int(byte)] = CountingBarrier(m.lanes.blocks, _clocks(m).agents)
        found.append((barrier, active[at == byte]))
    return found


def _ready(m: Machine, barrier: CountingBarrier, users: Ints, seen: Array) -> None:
    """Raise unless the users know that the barrier was initialised."""
    block = m.lanes.block[users]
    made = (barrier.takes[block] > 0) & (
        seen[np.arange(len(users)), barrier.made_by[block]] >= barrier.made_at[block]
    )
    if not made.all():
        lane = int(users[np.argmin(made)])
        thread = m.lanes.first_block * m.lanes.block_size + lane
        raise failure(
            "race", f"{m.lanes.name(thread)} uses a barrier that is not initialised for certain", m.node
        )


@model("llmc_barrier_init")
def _init(m: Machine, pointer: Pointer, arrivals: Any) -> None:
    clocks, counts = _clocks(m), m.spread(arrivals)
    for barrier, users in _barriers(m, pointer, m.active):
        block, thread = clocks.at(users)
        barrier.takes[block] = barrier.left[block] = counts[users]
        barrier.made_by[block] = thread
        barrier.made_at[block] = clocks.known[block, thread, thread]


@model("llmc_async_fence")
def _async_fence(m: Machine) -> None:
    _clocks(m).show(m.active)


@model("llmc_barrier_arrive")
def _arrive(m: Machine, pointer: Pointer, count: Any = 0) -> None:
    clocks, sizes = _clocks(m), m.spread(count)
    for barrier, users in _barriers(m, pointer, m.active):
        block, thread = clocks.at(users)
        _ready(m, barrier, users, clocks.known[block, thread])
        np.add.at(barrier.bytes_left, block, sizes[users])
        np.subtract.at(barrier.left, block, 1)
        if (barrier.left[block] < 0).any():
            raise failure("barrier", "More threads arrive at a barrier than one of its phases takes", m.node)
        passed = clocks.release(users)
        for i in range(2):
            np.maximum.at(barrier.begun[i], block, passed[i])
        barrier.settle(block)


@model("llmc_barrier_expect")
def _expect(m: Machine, pointer: Pointer, count: Any) -> None:
    _arrive(m, pointer, count)


@model("llmc_barrier_wait")
def _wait(m: Machine, pointer: Pointer, phase: Any) -> None:
    clocks, phases, active = _clocks(m), m.spread(phase), m.active
    used = _barriers(m, pointer, active)

    def ready() -> bool:
        return all(
            (barrier.phase[m.lanes.block[users]] % 2 != phases[users]).all() for barrier, users in used
        )

    for barrier, users in used:
        _ready(m, barrier, users, clocks.known[clocks.at(users)])
    m.wait_until(ready, "the end of a phase of a barrier")
    for barrier, users in used:
        block = m.lanes.block[users]
        clocks.acquire(users, *(barrier.ended[i, phases[users], block] for i in range(2)))


@model("llmc_bulk_copy")
def _copy(m: Machine, to: Pointer, source: Pointer, count: Any, barrier: Pointer) -> None:
    """The copy is made at once; nobody may rely on it who has not waited for the barrier."""
    clocks, active = _clocks(m), m.active
    sizes = m.spread(count)[active]
    size = int(sizes[0])
    if (sizes != size).any() or size % 16 or size <= 0:
        raise failure("alignment", f"A bulk copy has {sorted(set(sizes.tolist()))} bytes", m.node)
    block, thread = clocks.at(active)
    # each copy has a time of its own: none knows of the others
    times = np.zeros(len(active), np.int32)
    for i, b in enumerate(block):
        clocks.work[b, -1] += 1
        times[i] = clocks.work[b, -1]
    visible, known = clocks.visible(active), clocks.known[block, thread].copy()
    agents = np.full((len(active), 1), clocks.copies)
    actors = async_actors(block, agents, times[:, None], visible, known)
    data = None
    for pointer, write in ((source, False), (to, True)):
        memory = pointer.memory
        assert isinstance(memory, Memory)
        at = m.spread(pointer.index).astype(np.int64)[active] * pointer.dtype.itemsize
        if (at % 16).any():
            raise failure(
                "alignment", f"A bulk copy begins at byte {int(at[at % 16 != 0][0])} of {memory.name}", m.node
            )
        index = at[:, None] + np.arange(size)
        memory.check(index, memory.data.shape[1], m.lanes, active, m.node)
        memory.touch_by(index[:, :: memory.granule] // memory.granule, actors, m.lanes, write, m.node)
        view = memory.view(_BYTES)
        row: Any = block[:, None] if memory.shared else 0
        if write:
            view[row, index] = data
        else:
            data = view[row, index]
    for used, users in _barriers(m, barrier, active):
        mine = np.isin(active, users)
        _ready(m, used, users, visible[mine])
        np.subtract.at(used.bytes_left, block[mine], size)
        for i, table in enumerate((clocks.known, clocks.shown)):
            passed = table[block[mine], thread[mine]].copy()
            passed[:, clocks.copies] = times[mine]
            np.maximum.at(used.begun[i], block[mine], passed)
        used.settle(block[mine])


def _registers(m: Machine) -> None:
    """A hint to the hardware; the assembler checks it."""
    m.whole_warps("setmaxnreg")


for _count in range(24, 257, 8):
    for _how in ("inc", "dec"):
        model(f"llmc_registers_{_how}_{_count}")(_registers)
