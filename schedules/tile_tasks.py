"""How kernels on tile registers share rows and weight blocks out to threads, and what they do with finished sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.tile_product import PAIR, RightOperands, TileProduct, TileSchedule
from llmc.schedules.tiles import ROW_BYTES, ROWS, Tiles

_BLOCKS = 4  # of a task whose rows are many
_TASKS = 8  # at least, before rows are shared out too
_CACHE = 1 << 20  # bytes of rows that stay in a second-level cache beside a weight block


def tile_schedule(schedule: Any, rows: int = 256, columns: int = 256) -> TileSchedule:
    """The tile fields of a kernel's schedule or config; `rows` and `columns` where it leaves them open (0).

    By default the right operands of a pass for 32 outputs are 16 KiB.
    """
    return TileSchedule(
        schedule.tile_rows or rows,
        schedule.tile_columns or columns,
        schedule.tile_blocks,
        schedule.tile_unroll,
        bool(schedule.tile_prefetch),
        bool(schedule.tile_wide),
    )


@dataclass(frozen=True)
class Task:
    """Rows [first, first + count) times weight blocks [block, block + blocks), in a thread whose unit is configured.

    `most` bounds blocks.
    """

    tiles: Tiles
    block: Any
    blocks: Any
    most: int
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
    together = _together(product, blocks)
    with tiles.launch(-(-blocks // together) * row_blocks, text) as task:
        first = e.let(task % row_blocks * each)
        count = e.let(T.max(e.i64(0), T.min(each, t - first)))
        block = e.let(task // row_blocks * together)
        inside = together
        if blocks % together:
            inside = e.let(T.min(e.i64(together), blocks - block))
        yield Task(tiles, block, inside, together, first, count)


def _together(product: TileProduct, blocks: int) -> int:
    """Weight blocks of a task."""
    wanted = product.schedule.blocks
    if not wanted:
        row_bytes = product.rows.steps * ROW_BYTES
        wanted = _BLOCKS if product.most * row_bytes > _CACHE else 1
        while blocks < _TASKS * wanted:
            wanted //= 2
    return max(1, min(wanted, blocks))


class BlockSums(ABC):
    """Sums of a task's rows and blocks, pass by pass over the columns; made in the task, where it takes its memory.

    Args:
        dtype: of sums between passes.

    Attributes:
        sums: of all blocks; those of block b begin at element b * product.size.
    """

    def __init__(self, product: TileProduct, task: Task, dtype: str = "float32") -> None:
        self.product, self.task = product, task
        self.sums = e.workspace(task.most * product.size, dtype)

    @property
    @abstractmethod
    def passes(self) -> int:
        """How many there are."""

    def start(self, at: Any) -> None:  # noqa: B027 (most begin with nothing)
        """What sums from element `at` on begin with, if it is not nothing."""

    @abstractmethod
    def one(self, block: Any, at: Any, p: Any) -> None:
        """Add pass p of a block to the sums from element `at` on."""

    def run(self, finish: Callable[[Any, Any, Any], None]) -> None:
        """All passes; then finish(block, row of the task, where the block's sums begin)."""
        task, size = self.task, self.product.size
        with e.loop(task.blocks) as b:
            self.start(e.let(b * size))
        with e.loop(self.passes) as p, e.loop(task.blocks) as b:
            self.one(e.let(task.block + b), e.let(b * size), p)
        with e.loop(task.blocks) as b, e.loop(task.count) as r:
            finish(e.let(task.block + b), r, e.let(b * size))

    def accumulate(
        self, at: Any, right: RightOperands, fresh: Any, ahead: int = 0, following: Any = None
    ) -> None:
        """Add the task's rows times `right` to the sums from element `at` on.

        Args:
            fresh: see TileProduct.accumulate.
            ahead, following: steps of a pass, if weights shall be asked for, and where these are; see TileProduct.ahead.
        """
        product, task = self.product, self.task

        def body(pair: Any, part: int) -> None:
            product.accumulate(
                task.tiles,
                self.sums,
                e.let(at + product.part_at(pair, part)),
                e.let(task.first // PAIR + pair),
                part,
                right,
                fresh,
                product.ahead(right, pair, part, ahead, following) if ahead else None,
            )

        product.over(task.count, body)


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

    def store(self, block: Any, row: Any, sums: Any, at: Callable[[int], Any], bias_base: Any = 0) -> None:
        """Row of y, from a block's outputs on: vector v of its sums begins at sums[at(v)]."""
        self.epilogue.store(
            lambda _, v: e.load(sums, at(v), ROWS),
            lambda _, v, i: sums[at(v) + i],
            [row],
            block,
            self.y,
            self.caps,
            self.bias,
            self.residual,
            bias_base,
        )
