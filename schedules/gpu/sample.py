"""Choosing tokens from rows of logits: what llmc/runtime/sampler.py does on the host, for the same random numbers.

A row is shared by blocks of 4096 columns. The k-th largest score and the cut of top-p are found exactly, by their bits: eight
launches, each of which counts (or, for top-p, adds up) elements by their next four bits; a block begins by choosing the digit
of the launch before. Sums are float64 and every choice is a function of the row alone, so that a token does not depend on how
threads run. Method of the selection: Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.sample_layout import PASSES, SampleConfig
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.sample_draw import draw_tokens
from llmc.schedules.gpu.sample_row import THREADS, Row, block_sum, columns, f64
from llmc.schedules.gpu.sample_select import Selection


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

            def parts(body: Callable[[Row, Any, Any], None]) -> None:
                """A launch with a block for each 4096 columns of each row: body(row, block of the row, thread)."""
                with g.launch(n * cfg.blocks, THREADS) as (number, thread):
                    row = Row(cfg, args, e.let(number // cfg.blocks))
                    body(row, e.let(number % cfg.blocks), thread)

            with g.when(penalise > 0), g.launch(n, THREADS) as (number, thread):
                _penalise(Row(cfg, args, number), thread)
            parts(_largest_of_part)
            with g.launch(n, g.WARP) as (number, thread):
                _largest(Row(cfg, args, number), thread)
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
                        draw_tokens(cfg, args, n, parts, True)
                    with T.Else():
                        draw_tokens(cfg, args, n, parts, False)
    return built[0]


def _size(shape: list[Any]) -> Any:
    size = e.i64(1)
    for extent in shape:
        size = size * extent
    return size


def _penalise(row: Row, thread: Any) -> None:
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


def _largest_of_part(row: Row, part: Any, thread: Any) -> None:
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

    columns(row, part, thread, one)
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


def _largest(row: Row, thread: Any) -> None:
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


def _by_count(row: Row, part: Any, thread: Any) -> Selection:
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


def _by_mass(row: Row, part: Any, thread: Any) -> Selection:
    return Selection(
        "float64",
        row.args["doubles"],
        row.sums,
        part,
        row.cfg.blocks,
        thread,
        bits=(row.args["ints"], row.states + 2 * (PASSES + 1)),
        rest=(row.args["doubles"], row.below),
        start=f64(0.0),
        descending=False,
    )


def _count(row: Row, part: Any, thread: Any, number: Any) -> None:
    """A pass of top-k."""
    with g.when(row.drawn):
        chosen = _by_count(row, part, thread)

        def all_of(add: Callable[[Any, Any], None]) -> None:
            def one(column: Any) -> None:
                add(_ordered(row.args["logits"][row.first + column]), g.i32(1))

            columns(row, part, thread, one)

        chosen.run(number, all_of)


def _add_up(row: Row, part: Any, thread: Any, number: Any) -> None:
    """A pass of top-p."""
    with g.when(row.drawn):
        chosen = _by_mass(row, part, thread)
        chosen.limit = row.spare

        def all_of(add: Callable[[Any, Any], None]) -> None:
            def one(column: Any) -> None:
                weight = e.let(row.args["logits"][row.first + column])
                add(T.reinterpret("uint32", weight), tirx.Cast("float64", weight))

            columns(row, part, thread, one)

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


def _weigh(row: Row, part: Any, thread: Any, by_count: bool) -> None:
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
        e.store(total, 0, f64(0.0), 1)

        def one(column: Any) -> None:
            score = e.let(logits[row.first + column])
            weight = e.let(T.if_then_else(score >= least, T.exp(score - largest), e.f32(0.0)))
            e.store(logits, row.first + column, weight, 1)
            e.store(total, 0, total[0] + tirx.Cast("float64", weight), 1)

        columns(row, part, thread, one)
        block_sum(sums, thread, total[0])
        with g.when(thread == 0):
            e.store(row.args["doubles"], row.all + part, sums[0], 1)


def _count_ties(row: Row, part: Any, thread: Any) -> None:
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

        columns(row, part, thread, one)
        block_sum(counts, thread, count[0])
        with g.when(thread == 0):
            e.store(row.args["ints"], row.ties + part, counts[0], 1)
