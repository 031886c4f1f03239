"""What happens before what, in kernels whose threads meet at counting barriers and whose copies and products are asynchronous.

Barriers of a whole block divide time into slices, and memory.Shadow needs no more than their number. Here every agent has a
clock: each thread, the matrix units of each warp, and the copy engine of a block. A thread knows for each agent up to which
time it has seen its work (vector clocks: C. Fidge, "Timestamps in message-passing systems that preserve the partial
ordering", 1988; for race detection: C. Flanagan and S. Freund, "FastTrack", 2009). Two accesses are a race unless the later
agent knows the time of the earlier one.

Threads see each other's memory in one way, the copy engine and the matrix units in another (PTX ISA, "Proxies"): what a thread
wrote is shown to them only by its async fence. `shown` holds up to which time that was done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.simulate.errors import failure
from llmc.simulate.memory import Array, Ints, Lanes

_WARP = 32
_NONE = -1


class Clocks:
    """Clocks of the agents of some blocks.

    Attributes:
        agents: of a block: threads, then matrix units of its warps, then the copy engine.
        known: i32[blocks, threads, agents]; a thread's own column is its time.
        shown: the same of what copies and matrix units may see, too.
        work: i32[blocks, warps + 1]; how much the matrix units and the copy engine have begun.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.threads = lanes.block_size
        self.warps = -(-self.threads // _WARP)
        self.agents = self.threads + self.warps + 1
        self.copies = self.agents - 1
        shape = (lanes.blocks, self.threads, self.agents)
        self.known: Array = np.zeros(shape, np.int32)
        self.shown: Array = np.zeros(shape, np.int32)
        self.work: Array = np.zeros((lanes.blocks, self.warps + 1), np.int32)
        self._advance(np.arange(lanes.n))

    def at(self, active: Ints) -> tuple[Ints, Ints]:
        """(block, thread) of lanes."""
        return self.lanes.block[active], self.lanes.thread[active]

    def _advance(self, active: Ints) -> None:
        block, thread = self.at(active)
        self.known[block, thread, thread] += 1

    def meet(self, active: Ints, group: int) -> None:
        """Threads wait for each other in groups of `group` neighbours of a block."""
        block, thread = self.at(active)
        groups = np.unique(block * self.threads + thread // group * group)
        for first in groups:
            b, t = divmod(int(first), self.threads)
            part = slice(t, t + group)
            for table in (self.known, self.shown):
                table[b, part] = table[b, part].max(0)
        self._advance(active)

    def show(self, active: Ints) -> None:
        """An async fence of each thread."""
        at = self.at(active)
        self.shown[at] = np.maximum(self.shown[at], self.known[at])
        self._advance(active)

    def release(self, active: Ints) -> tuple[Array, Array]:
        """What threads pass on: (known, shown) i32[active, agents]."""
        at = self.at(active)
        passed = self.known[at].copy(), self.shown[at].copy()
        self._advance(active)
        return passed

    def acquire(self, active: Ints, known: Array, shown: Array) -> None:
        """Threads learn: i32[active, agents]."""
        at = self.at(active)
        self.known[at] = np.maximum(self.known[at], known)
        self.shown[at] = np.maximum(self.shown[at], shown)

    def visible(self, active: Ints) -> Array:
        """What copies or products that threads begin may rely on: i32[active, agents]."""
        at = self.at(active)
        seen = self.known[at].copy()
        seen[:, : self.threads] = self.shown[at][:, : self.threads]
        return seen

    def actors(self, active: Ints) -> Actors:
        """Lanes that access memory themselves."""
        return _threads_as_actors(self, active)

    def name(self, agent: int) -> str:
        """An agent, given by its number over all blocks, as people count."""
        block, inside = divmod(agent, self.agents)
        if inside < self.threads:
            return f"block {block}, thread {inside}"
        if inside == self.copies:
            return f"a bulk copy of block {block}"
        return f"the matrix units of block {block}, warp {inside - self.threads}"


@dataclass(frozen=True)
class Actors:
    """Who accesses memory at the same time: one per row of an index.

    Attributes:
        block: i64[n], counted from the first running one.
        agents: per actor those who do it (matrix units of several warps read together), counted in the block.
        times: of their clocks.
        knows: agents i64[n, m] of the actor's block -> the times that the actor has seen, i32[n, m].
        knows_readers: the same for those who read; an async fence plays no part there.
    """

    block: Ints
    agents: Array
    times: Array
    knows: Callable[[Array], Array]
    knows_readers: Callable[[Array], Array]


def _threads_as_actors(clocks: Clocks, active: Ints) -> Actors:
    """Lanes that access memory themselves."""
    block, thread = clocks.at(active)
    times = clocks.known[block, thread, thread]

    def knows(agents: Array) -> Array:
        found: Array = clocks.known[block[:, None], thread[:, None], agents]
        return found

    return Actors(block, thread[:, None], times[:, None], knows, knows)


def async_actors(block: Ints, agents: Array, times: Array, visible: Array, known: Array) -> Actors:
    """Copies or products, begun by threads that had seen so much."""
    rows = np.arange(len(block))[:, None]
    return Actors(block, agents, times, lambda a: visible[rows, a], lambda a: known[rows, a])


class OrderedShadow:
    """Who touched each granule of a memory last, by clocks.

    Readers are kept as numbers of sets, since many agents read the same and few sets occur.
    """

    def __init__(self, rows: int, granules: int) -> None:
        self.writer = np.full((rows, granules), _NONE, np.int64)
        self.write_time = np.zeros((rows, granules), np.int32)
        self.readers = np.zeros((rows, granules), np.int32)
        self._sets: list[dict[int, int]] = [{}]
        self._numbers: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}

    def touch(
        self, memory: Any, units: Array, actors: Actors, clocks: Clocks, write: bool, statement: Any
    ) -> None:
        """Record accesses: units [n, granules of each]."""
        block = actors.block
        row = (block if memory.shared else np.zeros_like(block))[:, None]
        first_agent = (clocks.lanes.first_block + block) * clocks.agents
        writer, time = self.writer[row, units], self.write_time[row, units]
        self._check(memory, units, actors, clocks, writer, time, actors.knows, write, True, statement)
        if not write:
            self._add_readers(row, units, actors, first_agent)
            return
        readers = self.readers[row, units]
        for number in np.unique(readers):
            for agent, when in self._sets[number].items():
                who = np.where(readers == number, agent, _NONE)
                times = np.full(units.shape, when, np.int32)
                self._check(
                    memory, units, actors, clocks, who, times, actors.knows_readers, write, False, statement
                )
        me = np.broadcast_to((first_agent + actors.agents[:, 0])[:, None], units.shape)
        self.writer[row, units] = me
        lost = self.writer[row, units] != me  # another one wrote the same in the same statement
        if lost.any():
            at = tuple(np.argwhere(lost)[0])
            self._race(
                memory, units, actors, clocks, at, int(self.writer[row, units][at]), True, True, statement
            )
        self.write_time[row, units] = actors.times[:, :1]
        self.readers[row, units] = 0

    def _check(
        self,
        memory: Any,
        units: Array,
        actors: Actors,
        clocks: Clocks,
        other: Array,
        time: Array,
        knows: Callable[[Array], Array],
        write: bool,
        other_wrote: bool,
        statement: Any,
    ) -> None:
        if (other == _NONE).all():
            return
        block = clocks.lanes.first_block + actors.block[:, None]
        inside = np.where(other == _NONE, 0, other % clocks.agents)
        ordered = (other // clocks.agents == block) & (knows(inside) >= time)
        clash = (other != _NONE) & ~ordered
        if clash.any():
            at = tuple(np.argwhere(clash)[0])
            self._race(memory, units, actors, clocks, at, int(other[at]), write, other_wrote, statement)

    def _race(
        self,
        memory: Any,
        units: Array,
        actors: Actors,
        clocks: Clocks,
        at: Any,
        other: int,
        write: bool,
        other_wrote: bool,
        statement: Any,
    ) -> None:
        first = (clocks.lanes.first_block + int(actors.block[at[0]])) * clocks.agents
        me = first + int(actors.agents[at[0], 0])
        byte = int(units[at]) * memory.granule
        is_async = me % clocks.agents >= clocks.threads
        unseen = is_async and other_wrote and other % clocks.agents < clocks.threads
        lacking = "no barrier, or no async fence, between" if unseen else "no barrier between"
        raise failure(
            "race",
            f"{'Shared' if memory.shared else 'Global'} buffer {memory.name}, byte {byte}, is "
            f"{'written' if write else 'read'} by {clocks.name(me)} and {'written' if other_wrote else 'read'} by "
            f"{clocks.name(other)} with {lacking}",
            statement,
            buffer=memory.name,
            byte=byte,
        )

    def _add_readers(self, row: Array, units: Array, actors: Actors, first_agent: Ints) -> None:
        rows = np.broadcast_to(row, units.shape)
        for i in range(len(units)):
            at = (rows[i], units[i])
            agents = (int(first_agent[i]) + actors.agents[i]).tolist()
            added = tuple(zip(agents, actors.times[i].tolist(), strict=True))
            old = self.readers[at]
            for number in np.unique(old):
                new = self._with(int(number), added)
                self.readers[at] = np.where(old == number, new, self.readers[at])

    def _with(self, number: int, added: tuple[tuple[int, int], ...]) -> int:
        """The number of a set with some more readers; of one agent the last time counts."""
        key = (number, added)
        found = self._numbers.get(key)
        if found is None:
            found = len(self._sets)
            self._sets.append({**self._sets[number], **dict(added)})
            self._numbers[key] = found
        return found
