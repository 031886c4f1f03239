"""Choosing tokens from rows of logits: what llmc/runtime/sampler.py does on the host, for the same random numbers.

A row is shared by blocks of 4096 columns. The k-th largest score and the cut of top-p are found exactly, by their bits: eight
launches, each of which counts (or, for top-p, adds up) elements by their next four bits; a block begins by choosing the digit
of the launch before. Sums are float64 and every choice is a function of the row alone, so that a token does not depend on how
threads run. Method of the selection: Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.sample_layout import COLUMNS, DIGITS, PASSES, SampleConfig
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.sample_select import Selection

THREADS = 256
_EACH = COLUMNS // THREADS


class _Row:
    """One row, as the threads of a block see it: its parameters, and its parts of the scratch memory."""

    def __init__(self, cfg: SampleConfig, args: dict[str, Any], row: Any) -> None:
        self.cfg, self.args, self.row = cfg, args, row
        s = cfg.blocks
        self.first = e.let(row * cfg.vocab)
        ints, doubles = e.let(row * cfg.ints), e.let(row * cfg.doubles)
        self.best_index, self.counts, self.ties = ints, ints + s, ints + s * (1 + 2 * DIGITS)
        self.states = ints + s * (2 + 2 * DIGITS)
        self.sums, self.all = doubles, doubles + s * 2 * DIGITS
        self.kept = doubles + s * (2 * DIGITS + 1)
        self.below = doubles + s * (2 + 2 * DIGITS)

    def number(self, which: int) -> Any:
        """Temperature, min-p or penalty."""
        return self.args["numbers"][self.row * 3 + which]

    @property
    def drawn(self) -> Any:
        """Whether a token is drawn: not the likeliest, and the logits are numbers."""
        return T.And(self.number(0) > e.f32(0.0), self.args["tokens"][self.row] >= 0)

    def total(self, at: Any) -> Any:
        """Sum of one number of each block, in order."""
        value = g.local(1, "float64")
        e.store(value, 0, _f64(0.0), 1)
        with e.loop(self.cfg.blocks) as s:
            e.store(value, 0, value[0] + self.args["doubles"][at + s], 1)
        return e.let(value[0])

    @property
    def spare(self) -> Any:
        """What top-p may leave out of the sum of the weights."""
        return e.let(self.args["shares"][self.row * 2 + 1] * self.total(self.all))


def sample(cfg: SampleConfig, caps: Capabilities) -> Any:
    """The PrimFunc that chooses tokens[N] of the first N rows of logits[R, vocab], which it uses as scratch memory.

    Arguments: logits f32[R, vocab]; numbers f32[N, 3]: temperature (0 = the likeliest token), min-p, penalty; shares
    f64[N, 2]: random number, 1 - top-p; tops i32[N]: top-k (vocab = off); seen_start i32[N + 1] and seen i32[M]: different
    tokens that a penalty applies to, row after row; scratch floats f32[N, blocks], ints i32[N, ints], doubles
    f64[N, doubles]; tokens i32[N], negative (-1 - index) where the largest logit is not a finite number; then int64: whether
    any row has a penalty, draws, has a top-k, has a top-p.
    """
    built: list[Any] = []
    with e.kernel(built):
        r, n, m = e.dim("R"), e.dim("N"), e.dim("M")
        shapes: dict[str, tuple[list[Any], str]] = {
            "logits": ([r, cfg.vocab], "float32"),
            "numbers": ([n, 3], "float32"),
            "shares": ([n, 2], "float64"),
            "tops": ([n], "int32"),
            "seen_start": ([n + 1], "int32"),
            "seen": ([m], "int32"),
            "floats": ([n, cfg.blocks], "float32"),
            "ints": ([n, cfg.ints], "int32"),
            "doubles": ([n, cfg.doubles], "float64"),
            "tokens": ([n], "int32"),
        }
        tensors = {name: g.tensor(name, shape, dtype) for name, (shape, dtype) in shapes.items()}
        penalise, draw, by_count, by_mass = (
            e.scalar_arg(name) for name in ("penalise", "draw", "by_count", "by_mass")
        )
        with e.root():
            args = {name: e.flat(tensors[name], _size(shape)) for name, (shape, _) in shapes.items()}

            def parts(body: Callable[[_Row, Any, Any], None]) -> None:
                """A launch with a block for each 4096 columns of each row: body(row, block of the row, thread)."""
                with g.launch(n * cfg.blocks, THREADS) as (number, thread):
                    row = _Row(cfg, args, e.let(number // cfg.blocks))
                    body(row, e.let(number % cfg.blocks), thread)

            with g.when(penalise > 0), g.launch(n, THREADS) as (number, thread):
                _penalise(_Row(cfg, args, number), thread)
            parts(_largest_of_part)
            with g.launch(n, g.WARP) as (number, thread):
                _largest(_Row(cfg, args, number), thread)
            with g.when(draw > 0):
                with T.If(by_count > 0):
                    with T.Then():
                        with e.loop(PASSES) as p:
                            parts(lambda row, part, thread: _count(row, part, thread, p))
                        parts(lambda row, part, thread: _weigh(row, part, thread, True))
                    with T.Else():
                        parts(lambda row, part, thread: _weigh(row, part, thread, False))
                with T.If(by_mass > 0):
                    with T.Then():
                        with e.loop(PASSES) as p:
                            parts(lambda row, part, thread: _add_up(row, part, thread, p))
                        parts(_count_ties)
                        _draw(cfg, args, n, parts, True)
                    with T.Else():
                        _draw(cfg, args, n, parts, False)
    return built[0]


def _size(shape: list[Any]) -> Any:
    size = e.i64(1)
    for extent in shape:
        size = size * extent
    return size


def _f64(value: float) -> Any:
    return tirx.FloatImm("float64", value)


def _columns(row: _Row, part: Any, thread: Any, body: Callable[[Any], None]) -> None:
    """body(column) for the columns of a block that are the thread's, neighbours for neighbours."""
    with e.loop(_EACH) as i:
        column = e.let(part * COLUMNS + i * THREADS + e.i64(thread))
        with g.when(column < row.cfg.vocab):
            body(column)


def _penalise(row: _Row, thread: Any) -> None:
    """Tokens that occurred become less likely."""
    logits, start = row.args["logits"], row.args["seen_start"]
    penalty = e.let(row.number(2))

    def one(j: Any) -> None:
        at = e.let(row.first + e.i64(row.args["seen"][j]))
        old = e.let(logits[at])
        e.store(logits, at, T.if_then_else(old < e.f32(0.0), old * penalty, old / penalty), 1)

    first = e.let(e.i64(start[row.row]))
    g.strided(first + e.i64(thread), start[row.row + 1], THREADS, one)


def _first_largest(best: Any, index: Any, value: Any, number: Any) -> None:
    """Keep the larger one, of equal ones the first; the first NaN before all numbers, as numpy's argmax has it."""
    nan, old_nan = e.let(T.isnan(value)), e.let(T.isnan(best[0]))
    same = T.Or(T.And(nan, old_nan), value == best[0])
    larger = T.Or(T.And(nan, T.Not(old_nan)), value > best[0])
    with g.when(T.Or(T.And(T.Not(old_nan), larger), T.And(same, number < index[0]))):
        e.store(best, 0, value, 1)
        e.store(index, 0, number, 1)


def _across_warp(best: Any, index: Any) -> None:
    offset = g.WARP // 2
    while offset:
        value, number = e.let(g.across(best[0], offset)), e.let(g.across(index[0], offset))
        _first_largest(best, index, value, number)
        offset //= 2


def _fresh_best() -> tuple[Any, Any]:
    best, index = g.local(1), g.local(1, "int32")
    e.store(best, 0, e.f32(float("-inf")), 1)
    e.store(index, 0, g.i32(0x7FFFFFFF), 1)
    return best, index


def _largest_of_part(row: _Row, part: Any, thread: Any) -> None:
    """The largest logit of a block; logits become scores where a token is drawn."""
    logits = row.args["logits"]
    values, numbers = g.shared(THREADS // g.WARP), g.shared(THREADS // g.WARP, "int32", "numbers")
    best, index = _fresh_best()
    temperature = e.let(row.number(0))

    def one(column: Any) -> None:
        value = e.let(logits[row.first + column])
        _first_largest(best, index, value, g.i32(column))
        with g.when(temperature > e.f32(0.0)):
            e.store(logits, row.first + column, value / temperature, 1)

    _columns(row, part, thread, one)
    _across_warp(best, index)
    with g.when(thread % g.WARP == 0):
        e.store(values, thread // g.WARP, best[0], 1)
        e.store(numbers, thread // g.WARP, index[0], 1)
    g.barrier()
    with g.when(thread == 0):
        for w in range(1, THREADS // g.WARP):
            _first_largest(best, index, e.let(values[w]), e.let(numbers[w]))
        e.store(row.args["floats"], row.row * row.cfg.blocks + part, best[0], 1)
        e.store(row.args["ints"], row.best_index + part, index[0], 1)


def _largest(row: _Row, thread: Any) -> None:
    """The largest logit of a row: the token of a greedy row, and what the scores of others are taken from."""
    base = e.let(row.row * row.cfg.blocks)
    best, index = _fresh_best()

    def one(s: Any) -> None:
        _first_largest(
            best,
            index,
            e.let(row.args["floats"][base + s]),
            e.let(row.args["ints"][row.best_index + s]),
        )

    g.strided(thread, row.cfg.blocks, g.WARP, one)
    _across_warp(best, index)
    with g.when(thread == 0):
        finite = T.And(best[0] < e.f32(float("inf")), best[0] > e.f32(float("-inf")))
        e.store(row.args["tokens"], row.row, T.if_then_else(finite, index[0], g.i32(-1) - index[0]), 1)
        e.store(row.args["floats"], base, best[0], 1)


def _by_count(row: _Row, part: Any, thread: Any) -> Selection:
    return Selection(
        "int32",
        row.args["ints"],
        row.counts,
        part,
        row.cfg.blocks,
        thread,
        bits=(row.args["ints"], row.states),
        rest=(row.args["ints"], row.states + PASSES + 1),
        start=row.args["tops"][row.row],
        descending=True,
    )


def _by_mass(row: _Row, part: Any, thread: Any) -> Selection:
    return Selection(
        "float64",
        row.args["doubles"],
        row.sums,
        part,
        row.cfg.blocks,
        thread,
        bits=(row.args["ints"], row.states + 2 * (PASSES + 1)),
        rest=(row.args["doubles"], row.below),
        start=_f64(0.0),
        descending=False,
    )


def _count(row: _Row, part: Any, thread: Any, number: Any) -> None:
    """A pass of top-k."""
    with g.when(row.drawn):
        chosen = _by_count(row, part, thread)

        def all_of(add: Callable[[Any, Any], None]) -> None:
            def one(column: Any) -> None:
                add(_ordered(row.args["logits"][row.first + column]), g.i32(1))

            _columns(row, part, thread, one)

        chosen.run(number, all_of)


def _add_up(row: _Row, part: Any, thread: Any, number: Any) -> None:
    """A pass of top-p."""
    with g.when(row.drawn):
        chosen = _by_mass(row, part, thread)
        chosen.limit = row.spare

        def all_of(add: Callable[[Any, Any], None]) -> None:
            def one(column: Any) -> None:
                weight = e.let(row.args["logits"][row.first + column])
                add(T.reinterpret("uint32", weight), tirx.Cast("float64", weight))

            _columns(row, part, thread, one)

        chosen.run(number, all_of)


def _ordered(value: Any) -> Any:
    """Bits of a float32, larger for a larger number."""
    bits = e.let(T.reinterpret("uint32", value))
    top = g.u32(0x80000000)
    return T.if_then_else(bits >= top, T.bitwise_xor(bits, g.u32(0xFFFFFFFF)), T.bitwise_or(bits, top))


def _unordered(bits: Any) -> Any:
    """The float32 of _ordered's bits."""
    top = g.u32(0x80000000)
    back = T.if_then_else(bits >= top, T.bitwise_xor(bits, top), T.bitwise_xor(bits, g.u32(0xFFFFFFFF)))
    return e.let(T.reinterpret("float32", back))


def _weigh(row: _Row, part: Any, thread: Any, by_count: bool) -> None:
    """Scores become weights, exp(score - largest), 0 for what top-k leaves out; their sum."""
    with g.when(row.drawn):
        logits = row.args["logits"]
        sums = g.shared(THREADS, "float64", "sums")
        largest = e.let(row.args["floats"][row.row * row.cfg.blocks] / row.number(0))
        least = e.f32(float("-inf"))
        if by_count:
            chosen = _by_count(row, part, thread)
            bits, _ = chosen.finish()
            least = _unordered(bits)
        total = g.local(1, "float64")
        e.store(total, 0, _f64(0.0), 1)

        def one(column: Any) -> None:
            score = e.let(logits[row.first + column])
            weight = e.let(T.if_then_else(score >= least, T.exp(score - largest), e.f32(0.0)))
            e.store(logits, row.first + column, weight, 1)
            e.store(total, 0, total[0] + tirx.Cast("float64", weight), 1)

        _columns(row, part, thread, one)
        _block_sum(sums, thread, total[0])
        with g.when(thread == 0):
            e.store(row.args["doubles"], row.all + part, sums[0], 1)


def _block_sum(sums: Any, thread: Any, value: Any) -> None:
    """sums[0] of thread 0 becomes the sum of all threads' values."""
    e.store(sums, thread, value, 1)
    half = THREADS // 2
    while half:
        g.barrier()
        with g.when(thread < half):
            e.store(sums, thread, sums[thread] + sums[thread + half], 1)
        half //= 2


@dataclass(frozen=True)
class _Cut:
    """Where top-p cuts: weights below go, and the first `dropped` ones of equal weight."""

    weight: Any
    dropped: Any


def _cut(row: _Row) -> _Cut:
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
    return _Cut(weight, e.let(g.i32(T.max(_f64(0.0), T.min(fit, most)))))


def _count_ties(row: _Row, part: Any, thread: Any) -> None:
    """How many weights of a block are equal to the cut of top-p."""
    with g.when(row.drawn):
        chosen = _by_mass(row, part, thread)
        chosen.limit = row.spare
        bits, _ = chosen.finish()
        counts = g.shared(THREADS, "int32", "counts")
        count = g.local(1, "int32")
        e.store(count, 0, g.i32(0), 1)

        def one(column: Any) -> None:
            weight = e.let(row.args["logits"][row.first + column])
            with g.when(T.reinterpret("uint32", weight) == bits):
                e.store(count, 0, count[0] + 1, 1)

        _columns(row, part, thread, one)
        _block_sum(counts, thread, count[0])
        with g.when(thread == 0):
            e.store(row.args["ints"], row.ties + part, counts[0], 1)


class _Segments:
    """What top-p and min-p leave of a block's columns, which each thread sees 16 neighbouring ones of.

    Args:
        part: the block of the row.
        cut: of top-p; None = off.
    """

    def __init__(self, row: _Row, part: Any, thread: Any, cut: _Cut | None) -> None:
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
        with e.loop(_EACH) as i:
            column = e.let(self.part * COLUMNS + e.i64(segment) * _EACH + i)
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
    e.store(mass, 0, _f64(0.0), 1)
    segments.visit(thread, lambda column, weight: e.store(mass, 0, mass[0] + tirx.Cast("float64", weight), 1))
    return mass[0]


def _draw(cfg: SampleConfig, args: dict[str, Any], n: Any, parts: Any, by_mass: bool) -> None:
    """Two launches: the sums of what is kept, and the place at which the running sum passes the random number."""

    def keep(row: _Row, part: Any, thread: Any) -> None:
        with g.when(row.drawn):
            sums = g.shared(THREADS, "float64", "sums")
            segments = _Segments(row, part, thread, _cut(row) if by_mass else None)
            _block_sum(sums, thread, _mass(segments, thread))
            with g.when(thread == 0):
                e.store(args["doubles"], row.kept + part, sums[0], 1)

    parts(keep)
    with g.launch(n, THREADS) as (number, thread):
        row = _Row(cfg, args, number)
        with g.when(row.drawn):
            _choose(row, thread, _cut(row) if by_mass else None)


def _choose(row: _Row, thread: Any, cut: _Cut | None) -> None:
    """Block, then segment, then column: the first behind which the running sum is above the target.

    Where rounding leaves no such one, the last one that has any weight.
    """
    masses = g.shared(THREADS, "float64", "masses")
    target = e.let(row.args["shares"][row.row * 2] * row.total(row.kept))
    block, before = _passing(row.cfg.blocks, lambda s: row.args["doubles"][row.kept + s], target, _f64(0.0))
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
        with g.when(T.And(done[0] == 0, one > _f64(0.0))):
            e.store(index, 0, g.i32(s), 1)
            e.store(before, 0, running[0], 1)
            e.store(running, 0, running[0] + one, 1)
            with g.when(running[0] > target):
                e.store(done, 0, g.i32(1), 1)
    return e.let(index[0]), e.let(before[0])
