"""A row of logits on its way to a token, as the threads of a block see it, and what they do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.sample_layout import COLUMNS, DIGITS, SampleConfig
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g

THREADS = 256
EACH = COLUMNS // THREADS


class Row:
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
        e.store(value, 0, f64(0.0), 1)
        with e.loop(self.cfg.blocks) as s:
            e.store(value, 0, value[0] + self.args["doubles"][at + s], 1)
        return e.let(value[0])

    @property
    def spare(self) -> Any:
        """What top-p may leave out of the sum of the weights."""
        return e.let(self.args["shares"][self.row * 2 + 1] * self.total(self.all))


def f64(value: float) -> Any:
    return tirx.FloatImm("float64", value)


def columns(row: Row, part: Any, thread: Any, body: Callable[[Any], None]) -> None:
    """body(column) for the columns of a block that are the thread's, neighbours for neighbours."""
    with e.loop(EACH) as i:
        column = e.let(part * COLUMNS + i * THREADS + e.i64(thread))
        with g.when(column < row.cfg.vocab):
            body(column)


def block_sum(sums: Any, thread: Any, value: Any) -> None:
    """sums[0] of thread 0 becomes the sum of all threads' values."""
    e.store(sums, thread, value, 1)
    half = THREADS // 2
    while half:
        g.barrier()
        with g.when(thread < half):
            e.store(sums, thread, sums[thread] + sums[thread + half], 1)
        half //= 2
