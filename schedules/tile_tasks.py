"""How kernels on tile registers share rows and weight blocks out to threads, and what they do with finished sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.tile_product import PAIR, TileProduct, TileSchedule
from llmc.schedules.tiles import ROWS, Tiles


def tile_schedule(schedule: Any, columns: int = 256) -> TileSchedule:
    """The tile fields of a kernel's schedule or config; `columns` where it leaves them open."""
    return TileSchedule(
        schedule.tile_rows,
        schedule.tile_columns or columns,
        schedule.tile_unroll,
        bool(schedule.tile_prefetch),
        bool(schedule.tile_wide),
    )


@dataclass(frozen=True)
class Task:
    """Rows [first, first + count) times a weight block, in a thread whose unit is configured."""

    tiles: Tiles
    block: Any
    first: Any
    count: Any


@contextmanager
def tasks(product: TileProduct, blocks: int, t: Any, text: str) -> Iterator[Task]:
    """The parallel loop over all blocks times all of t rows, about equally many each and in whole pairs of row tiles.

    Args:
        text: LLVM functions that the body needs.
    """
    tiles, most = product.tiles(), product.most
    row_blocks = e.let((t + (most - 1)) // most)
    each = e.let(((t + row_blocks - 1) // row_blocks + (PAIR - 1)) // PAIR * PAIR)
    with tiles.launch(blocks * row_blocks, text) as task:
        first = e.let(task % row_blocks * each)
        count = e.let(T.max(e.i64(0), T.min(each, t - first)))
        yield Task(tiles, e.let(task // row_blocks), first, count)


def by_height(t: Any, least: int, limit: int, rows: int, body: Callable[[int], None]) -> None:
    """body(most rows of a task) for t rows: one tile of them where they fit in it, else whole pairs.

    Args:
        least: of t.
        limit: bound of t, which is asserted; 0 = none.
    """
    if limit:
        with T.Assert(t <= e.i64(limit), "this kernel is for fewer rows"):
            pass
    if limit and limit <= ROWS:
        body(ROWS)
        return
    whole = -(-rows // PAIR) * PAIR
    whole = min(whole, -(-limit // PAIR) * PAIR) if limit else whole
    if least > ROWS:
        body(whole)
        return
    with T.If(t <= ROWS):
        with T.Then():
            body(ROWS)
        with T.Else():
            body(whole)


@dataclass(frozen=True)
class Results:
    """Where sums go once they are complete: through the epilogue to y."""

    epilogue: Epilogue
    caps: Capabilities
    y: Any
    bias: Any
    residual: Any

    def store(self, task: Task, r: Any, sums: Any, at: Callable[[int], Any]) -> None:
        """Row r of a task, whose vector v of sums begins at sums[at(v)]."""
        self.epilogue.store(
            lambda _, v: e.load(sums, at(v), ROWS),
            lambda _, v, i: sums[at(v) + i],
            [e.let(task.first + r)],
            task.block,
            self.y,
            self.caps,
            self.bias,
            self.residual,
        )
