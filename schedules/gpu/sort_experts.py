"""Rows in the order of their experts: a stable counting sort on the device, and how a warp finds its tile in the result.

All expert linears of a layer share one sort, whose result is the plan (schedules/experts.py). A block counts and places up
to CHUNK rows: its threads are pairs of an expert and a segment of the chunk, and each looks through its segment for its
expert. There are no atomics, so that rows of an expert stay in their order and results do not depend on timing.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.experts import SortConfig, plan_size
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.rows import Rows

CHUNK = 1024  # rows of a block; up to so many are one launch
_MOST_THREADS = 512
_LEAST_THREADS = 128
_SEGMENTS = 16  # of a chunk, at most: a thread adds up an expert's counts over them
_NOBODY = -1  # expert of what is not a row


def sort_experts(cfg: SortConfig, caps: Capabilities) -> Any:
    """The PrimFunc (ids[N], plan int32 [experts + 1 + N])."""
    built: list[Any] = []
    with e.kernel(built):
        count = e.dim("N")
        ids = g.tensor("ids", [count], cfg.ids_dtype)
        plan = g.tensor("plan", [plan_size(count, cfg.experts)], "int32")
        with e.root():
            source, target = e.flat(ids, count), e.flat(plan, plan_size(count, cfg.experts))
            with T.If(count <= CHUNK):
                with T.Then(), g.launch(1, _Chunk.threads_for(cfg.experts)) as (number, thread):
                    _Chunk(cfg, source, count, number, thread).place(target, None, e.i64(1))
                with T.Else():
                    chunks = e.ceildiv(count, CHUNK)
                    counts = e.workspace(chunks * cfg.experts, "int32")
                    with g.launch(chunks, _Chunk.threads_for(cfg.experts)) as (number, thread):
                        _Chunk(cfg, source, count, number, thread).count(counts)
                    with g.launch(chunks, _Chunk.threads_for(cfg.experts)) as (number, thread):
                        _Chunk(cfg, source, count, number, thread).place(target, counts, chunks)
    return built[0]


class _Chunk:
    """A block of threads with its rows, whose experts lie in shared memory."""

    def __init__(self, cfg: SortConfig, ids: Any, count: Any, number: Any, thread: Any) -> None:
        self.experts, self.thread, self.number = cfg.experts, thread, number
        self.threads = self.threads_for(cfg.experts)
        self.segments = self.segments_for(cfg.experts)
        self.first = g.held(g.i32(number * CHUNK))
        rows = g.held(T.min(g.i32(count) - self.first, g.i32(CHUNK)))
        # of a segment; segments lie an element apart more, so that threads of several read other banks
        self.length = g.held(T.truncdiv(rows + (self.segments - 1), g.i32(self.segments)))
        self.ids = g.shared(CHUNK + 2 * self.segments, "int32", "ids")
        self.found = g.shared(self.segments * self.experts, "int32", "found")

        def bring(i: Any) -> None:
            row = e.let(g.i32(i))
            inside = T.min(row, rows - 1)
            expert = g.i32(ids[e.i64(self.first + inside)])
            at = e.let(row + T.truncdiv(row, self.length))
            e.store(self.ids, at, T.Select(row < rows, expert, g.i32(_NOBODY)), 1)

        g.strided(thread, self.length * self.segments, self.threads, bring)
        g.barrier()
        self._each_pair(self._look)
        g.barrier()

    @staticmethod
    def segments_for(experts: int) -> int:
        return max(1, min(_SEGMENTS, _MOST_THREADS // experts))

    @staticmethod
    def threads_for(experts: int) -> int:
        pairs = _Chunk.segments_for(experts) * experts
        return min(_MOST_THREADS, max(_LEAST_THREADS, -(-pairs // g.WARP) * g.WARP))

    def _each_pair(self, body: Any) -> None:
        """body(number of the pair, segment, expert); neighbouring threads have neighbouring experts."""

        def one(i: Any) -> None:
            pair = e.let(g.i32(i))
            body(pair, e.let(pair // self.experts), e.let(pair % self.experts))

        g.strided(self.thread, self.segments * self.experts, self.threads, one)

    def _rows_of(self, segment: Any, expert: Any, body: Any) -> None:
        """body(row of the segment) for those that go to the expert, in order."""
        first = g.held(segment * (self.length + 1))
        with g.loop(self.length) as i, g.when(self.ids[first + i] == expert):
            body(i)

    def _look(self, pair: Any, segment: Any, expert: Any) -> None:
        """How many rows of a segment go to an expert."""
        many = g.local(1, "int32")
        e.store(many, 0, g.i32(0), 1)
        self._rows_of(segment, expert, lambda _: e.store(many, 0, many[0] + 1, 1))
        e.store(self.found, pair, many[0], 1)

    def _add_segments(self, expert: Any) -> Any:
        """What segments before each have of an expert, in place of what each has; returns the sum of all."""
        many = [g.held(self.found[s * self.experts + expert]) for s in range(self.segments)]
        before = g.local(1, "int32")
        e.store(before, 0, g.i32(0), 1)
        for s, value in enumerate(many):
            e.store(self.found, s * self.experts + expert, before[0], 1)
            e.store(before, 0, before[0] + value, 1)
        return before[0]

    def count(self, counts: Any) -> None:
        """The rows of each expert in this chunk: counts[chunk, expert]."""

        def total(i: Any) -> None:
            register = g.local(1, "int32")
            e.store(register, 0, g.i32(0), 1)
            for s in range(self.segments):
                e.store(register, 0, register[0] + self.found[s * self.experts + i], 1)
            e.store(counts, self.number * self.experts + i, register[0], 1)

        g.strided(self.thread, self.experts, self.threads, total)

    def place(self, plan: Any, counts: Any, chunks: Any) -> None:
        """Write the chunk's rows to their places in the plan, and by the first chunk where experts begin.

        Args:
            counts: of all chunks; None = this is the only one.
        """
        totals = g.shared(self.experts, "int32", "totals")
        if counts is not None:
            earlier = self._earlier(counts, chunks, totals)

        def add(i: Any) -> None:
            here = self._add_segments(i)
            if counts is None:
                e.store(totals, i, here, 1)

        g.strided(self.thread, self.experts, self.threads, add)
        g.barrier()
        self._scan(totals, plan)
        g.barrier()

        def put(pair: Any, segment: Any, expert: Any) -> None:
            at = g.local(1, "int32")
            first = totals[expert] + self.found[pair]
            if counts is not None:
                first = first + earlier[expert]
            e.store(at, 0, first + (self.experts + 1), 1)

            def one(i: Any) -> None:
                e.store(plan, e.i64(at[0]), self.first + segment * self.length + i, 1)
                e.store(at, 0, at[0] + 1, 1)

            self._rows_of(segment, expert, one)

        self._each_pair(put)

    def _earlier(self, counts: Any, chunks: Any, totals: Any) -> Any:
        """Shared: each expert's rows in the chunks before this one; into `totals` those of all chunks."""
        parts = [g.shared(self.segments * self.experts, "int32", name) for name in ("before", "all")]
        earlier = g.shared(self.experts, "int32", "earlier")

        def add(pair: Any, segment: Any, expert: Any) -> None:
            sums = [g.local(1, "int32") for _ in parts]
            for register in sums:
                e.store(register, 0, g.i32(0), 1)

            def one(chunk: Any) -> None:
                value = g.held(counts[chunk * self.experts + expert])
                e.store(sums[1], 0, sums[1][0] + value, 1)
                with g.when(chunk < self.number):
                    e.store(sums[0], 0, sums[0][0] + value, 1)

            g.strided(segment, chunks, self.segments, one)
            for part, register in zip(parts, sums, strict=True):
                e.store(part, pair, register[0], 1)

        self._each_pair(add)
        g.barrier()

        def total(i: Any) -> None:
            for part, target in zip(parts, (earlier, totals), strict=True):
                register = g.local(1, "int32")
                e.store(register, 0, g.i32(0), 1)
                for s in range(self.segments):
                    e.store(register, 0, register[0] + part[s * self.experts + i], 1)
                e.store(target, i, register[0], 1)

        g.strided(self.thread, self.experts, self.threads, total)
        return earlier

    def _scan(self, totals: Any, plan: Any) -> None:
        """totals[expert] = rows of the experts before it, by the first warp; the first chunk writes them to the plan."""
        with g.when(self.thread < g.WARP):
            per = -(-self.experts // g.WARP)
            mine = [e.let(self.thread * per + i) for i in range(per)]
            many = []
            for expert in mine:
                value = g.local(1, "int32")
                e.store(value, 0, g.i32(0), 1)
                with g.when(expert < self.experts):
                    e.store(value, 0, totals[expert], 1)
                many.append(value)
            before = g.local(1, "int32")
            e.store(before, 0, before_lane(self.thread, [m[0] for m in many])[0], 1)
            for expert, value in zip(mine, many, strict=True):
                with g.when(expert < self.experts):
                    e.store(totals, expert, before[0], 1)
                    with g.when(self.number == 0):
                        e.store(plan, e.i64(expert), before[0], 1)
                e.store(before, 0, before[0] + value[0], 1)
            with g.when(T.And(self.number == 0, self.thread == g.WARP - 1)):
                e.store(plan, e.i64(self.experts), before[0], 1)


def before_lane(lane: Any, values: list[Any]) -> tuple[Any, Any]:
    """(sum of the values of the warp's threads before this one, sum of all), int32."""
    own = values[0]
    for value in values[1:]:
        own = own + value
    own = g.held(own)
    sums = g.local(1, "int32")
    e.store(sums, 0, own, 1)
    offset = 1
    while offset < g.WARP:
        other = g.held(T.tvm_warp_shuffle_up(g.u32(0xFFFFFFFF), sums[0], offset, g.WARP, g.WARP))
        e.store(sums, 0, sums[0] + T.Select(lane >= offset, other, g.i32(0)), 1)
        offset *= 2
    total = T.tvm_warp_shuffle(g.u32(0xFFFFFFFF), sums[0], g.WARP - 1, g.WARP, g.WARP)
    return g.held(sums[0] - own), g.held(total)


class ExpertTiles:
    """Tiles of up to `size` rows of one expert, numbered over all experts. All methods need whole warps.

    Args:
        plan: flat.
        thread: its lane finds its share of the experts.
    """

    def __init__(self, plan: Any, experts: int, size: int, thread: Any) -> None:
        self.experts, self.size = experts, size
        self._plan = plan
        self._lane = g.held(T.truncmod(thread, g.i32(g.WARP)))
        self._per = -(-experts // g.WARP)

    @staticmethod
    def most(count: Any, experts: int, size: int) -> Any:
        """Tiles that there can be."""
        return e.ceildiv(count, size) + experts

    def _each(self, body: Any) -> None:
        """body(expert, where its rows begin, where they end, its tiles) for the lane's share of the experts, in order."""
        with g.loop(self._per) as i:
            expert = g.held(T.min(self._lane * self._per + i, g.i32(self.experts)))
            begin, end = (g.held(self._plan[e.i64(T.min(expert + j, g.i32(self.experts)))]) for j in range(2))
            body(expert, begin, end, g.held(T.truncdiv(end - begin + (self.size - 1), g.i32(self.size))))

    def _before(self) -> tuple[Any, Any]:
        """(tiles of the lanes before this one, of all)."""
        own = g.local(1, "int32")
        e.store(own, 0, g.i32(0), 1)
        self._each(lambda expert, begin, end, tiles: e.store(own, 0, own[0] + tiles, 1))
        return before_lane(self._lane, [own[0]])

    def total(self) -> Any:
        """Number of tiles, int32."""
        return self._before()[1]

    def find(self, number: Any) -> tuple[Any, Rows]:
        """(expert, its rows from tile `number` on); expert -1 if there is no such tile."""
        left = g.local(1, "int32")
        e.store(left, 0, number - self._before()[0], 1)
        found, first, last = (g.local(1, "int32") for _ in range(3))
        for register in (found, first, last):
            e.store(register, 0, g.i32(-1), 1)

        def look(expert: Any, begin: Any, end: Any, tiles: Any) -> None:
            with g.when(T.And(left[0] >= 0, left[0] < tiles)):
                e.store(found, 0, expert, 1)
                e.store(first, 0, begin + left[0] * self.size, 1)
                e.store(last, 0, end, 1)
            e.store(left, 0, left[0] - tiles, 1)

        self._each(look)
        # one thread has found it, at most
        for register in (found, first, last):
            g.warp_reduce(register, T.max)
        behind = self.experts + 1
        return found[0], Rows(e.i64(first[0] + behind), e.i64(last[0] + behind), self._plan)
