"""The last step of sampling: what top-p and min-p keep of a row of weights, and the place that the random number picks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.sample_layout import COLUMNS, PASSES, SampleConfig
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.sample_row import EACH, THREADS, Row, block_sum, f64


@dataclass(frozen=True)
class _Cut:
    """Where top-p cuts: weights below go, and the first `dropped` ones of equal weight."""

    weight: Any
    dropped: Any


def _cut(row: Row) -> _Cut:
    """After _count_ties, from what it left behind."""
    bits = row.args["ints"][row.states + 2 * (PASSES + 1) + PASSES]
    below = e.let(row.args["doubles"][row.below + PASSES])
    weight = e.let(T.reinterpret("float32", bits))
    ties = g.local(1, "int32")
    e.store(ties, 0, g.i32(0), 1)
    with e.loop(row.cfg.blocks) as s:
        e.store(ties, 0, ties[0] + row.args["ints"][row.ties + s], 1)
    fit = e.let(T.floor((row.spare - below) / tirx.Cast("float64", weight)))
    most = e.let(tirx.Cast("float64", ties[0] - 1))
    return _Cut(weight, e.let(g.i32(T.max(f64(0.0), T.min(fit, most)))))


class _Segments:
    """What top-p and min-p leave of a block's columns, which each thread sees 16 neighbouring ones of.

    Args:
        part: the block of the row.
        cut: of top-p; None = off.
    """

    def __init__(self, row: Row, part: Any, thread: Any, cut: _Cut | None) -> None:
        self.row, self.part, self.cut = row, part, cut
        self.least = e.let(row.number(1))
        self.before = g.shared(THREADS, "int32", "before") if cut else None
        self.ahead = g.local(1, "int32")  # ties in earlier blocks
        if cut is None or self.before is None:
            return
        e.store(self.ahead, 0, g.i32(0), 1)
        with e.loop(row.cfg.blocks) as s, g.when(s < part):
            e.store(self.ahead, 0, self.ahead[0] + row.args["ints"][row.ties + s], 1)
        count = g.local(1, "int32")
        e.store(count, 0, g.i32(0), 1)

        def one(column: Any, weight: Any) -> None:
            with g.when(weight == cut.weight):
                e.store(count, 0, count[0] + 1, 1)

        self._each(thread, one)
        e.store(self.before, thread, count[0], 1)
        g.barrier()

    def _each(self, segment: Any, body: Callable[[Any, Any], None]) -> None:
        with e.loop(EACH) as i:
            column = e.let(self.part * COLUMNS + e.i64(segment) * EACH + i)
            with g.when(column < self.row.cfg.vocab):
                body(column, e.let(self.row.args["logits"][self.row.first + column]))

    def visit(self, segment: Any, body: Callable[[Any, Any], None]) -> None:
        """body(column, weight) for what is kept of a segment, in order."""
        if self.cut is None or self.before is None:

            def plain(column: Any, weight: Any) -> None:
                with g.when(weight >= self.least):
                    body(column, weight)

            self._each(segment, plain)
            return
        cut, before = self.cut, self.before
        rank = g.local(1, "int32")
        e.store(rank, 0, self.ahead[0], 1)
        with e.loop(THREADS) as t, g.when(t < e.i64(segment)):
            e.store(rank, 0, rank[0] + before[t], 1)

        def one(column: Any, weight: Any) -> None:
            tie = e.let(weight == cut.weight)
            kept = T.Or(weight > cut.weight, T.And(tie, rank[0] >= cut.dropped))
            with g.when(T.And(kept, weight >= self.least)):
                body(column, weight)
            with g.when(tie):
                e.store(rank, 0, rank[0] + 1, 1)

        self._each(segment, one)


def _mass(segments: _Segments, thread: Any) -> Any:
    """Sum of what is kept of the thread's segment."""
    mass = g.local(1, "float64")
    e.store(mass, 0, f64(0.0), 1)
    segments.visit(thread, lambda column, weight: e.store(mass, 0, mass[0] + tirx.Cast("float64", weight), 1))
    return mass[0]


def draw_tokens(cfg: SampleConfig, args: dict[str, Any], n: Any, parts: Any, by_mass: bool) -> None:
    """Two launches: the sums of what is kept, and the place at which the running sum passes the random number."""

    def keep(row: Row, part: Any, thread: Any) -> None:
        with g.when(row.drawn):
            sums = g.shared(THREADS, "float64", "sums")
            segments = _Segments(row, part, thread, _cut(row) if by_mass else None)
            block_sum(sums, thread, _mass(segments, thread))
            with g.when(thread == 0):
                e.store(args["doubles"], row.kept + part, sums[0], 1)

    parts(keep)
    with g.launch(n, THREADS) as (number, thread):
        row = Row(cfg, args, number)
        with g.when(row.drawn):
            _choose(row, thread, _cut(row) if by_mass else None)


def _choose(row: Row, thread: Any, cut: _Cut | None) -> None:
    """Block, then segment, then column: the first behind which the running sum is above the target.

    Where rounding leaves no such one, the last one that has any weight.
    """
    masses = g.shared(THREADS, "float64", "masses")
    target = e.let(row.args["shares"][row.row * 2] * row.total(row.kept))
    block, before = _passing(row.cfg.blocks, lambda s: row.args["doubles"][row.kept + s], target, f64(0.0))
    segments = _Segments(row, e.let(e.i64(block)), thread, cut)
    e.store(masses, thread, _mass(segments, thread), 1)
    g.barrier()
    with g.when(thread == 0):
        segment, start = _passing(THREADS, lambda s: masses[s], target, before)
        running, found = g.local(1, "float64"), g.local(1, "int32")
        done = g.local(1, "int32")
        e.store(running, 0, start, 1)
        e.store(found, 0, row.args["tokens"][row.row], 1)
        e.store(done, 0, g.i32(0), 1)

        def one(column: Any, weight: Any) -> None:
            with g.when(T.And(done[0] == 0, weight > e.f32(0.0))):
                e.store(found, 0, g.i32(column), 1)
                e.store(running, 0, running[0] + tirx.Cast("float64", weight), 1)
                with g.when(running[0] > target):
                    e.store(done, 0, g.i32(1), 1)

        segments.visit(segment, one)
        e.store(row.args["tokens"], row.row, found[0], 1)


def _passing(count: int, value: Callable[[Any], Any], target: Any, start: Any) -> tuple[Any, Any]:
    """(index at which start + the running sum of values passes the target, the sum before it)."""
    running, before = g.local(1, "float64"), g.local(1, "float64")
    index, done = g.local(1, "int32"), g.local(1, "int32")
    e.store(running, 0, start, 1)
    e.store(before, 0, start, 1)
    e.store(index, 0, g.i32(0), 1)
    e.store(done, 0, g.i32(0), 1)
    with e.loop(count) as s:
        one = e.let(value(s))
        with g.when(T.And(done[0] == 0, one > f64(0.0))):
            e.store(index, 0, g.i32(s), 1)
            e.store(before, 0, running[0], 1)
            e.store(running, 0, running[0] + one, 1)
            with g.when(running[0] > target):
                e.store(done, 0, g.i32(1), 1)
    return e.let(index[0]), e.let(before[0])
