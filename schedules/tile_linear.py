"""Matrix times packed bf16 weight on tile registers, for many rows; and the choice between it and the vector kernel.

The weight is packed as for the vector kernel (BlockedLayout with pairs): a step of 32 columns of 16 outputs is a right operand
where it lies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities, TileUnit
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows, segments
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.linear import LinearConfig, LinearSchedule, linear
from llmc.schedules.tile_product import RightOperands, Rows, TileProduct
from llmc.schedules.tile_tasks import BlockSums, Results, Task, by_height, tasks, tile_schedule
from llmc.schedules.tiles import ROWS, TileDot

_STEP = 32  # columns of a left operand
_LANES = 32  # bf16 in a vector


def tiles_from(config: LinearConfig, caps: Capabilities, schedule: LinearSchedule) -> int:
    """The least number of rows that take tiles; 0 = none."""
    usable = caps.tiles is not TileUnit.NONE and config.weight_dtype == config.in_dtype == "bfloat16"
    return schedule.tiles_from if usable else 0


def linear_by_rows(config: LinearConfig, caps: Capabilities) -> Any:
    """linear's PrimFunc; many rows on tile registers where the machine has them."""
    parts = segments(config.schedule, partial(tiles_from, config, caps))
    if not any(part.tiled for part in parts):
        return linear(config, caps)
    kernels = []
    for part in parts:
        one = replace(config, schedule=ByRows((part.choice,), (part.most,) if part.most else ()))
        tiled = partial(tile_linear, one, caps, part.least, part.most)
        kernels.append(tiled if part.tiled else partial(linear, one, caps))
    return e.merged("T", [part.most for part in parts[:-1]], kernels)


def tile_linear(cfg: LinearConfig, caps: Capabilities, least: int = 1, most: int = 0) -> Any:
    """The PrimFunc (x[1 x lead, T, k], w packed, [bias[n]], [residual like y], y[1 x lead, T, n]) with symbolic T.

    As llmc.schedules.linear.linear, by the first schedule of `cfg`. A task is a weight block times `tile_rows` rows.
    least, most: bounds of T; 0 = none.
    """
    n, k = cfg.n, cfg.k
    blocks, steps, nb, kp = cfg.packed_shape(caps)
    if kp != 2 or nb % ROWS:
        raise ValueError(f"a weight in blocks of {nb} outputs by {kp} columns is no right operand")
    rows_n = 2 * n if cfg.gated else n
    schedule = tile_schedule(cfg.schedule.choices[0])
    epilogue = Epilogue(n, nb, cfg.in_dtype, cfg.out_dtype, cfg.activation, cfg.gated, cfg.gate_second)
    text = str(e.import_text(caps).get("pragma_import_llvm", ""))
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ones = [1] * cfg.lead
        x = e.tensor("x", [*ones, t, k], cfg.in_dtype)
        w = e.tensor("w", [blocks, steps, nb, kp], cfg.weight_dtype)
        bias = e.tensor("bias", [rows_n], cfg.in_dtype) if cfg.has_bias else None
        residual = e.tensor("residual", [*ones, t, n], cfg.in_dtype) if cfg.has_residual else None
        y = e.tensor("y", [*ones, t, n], cfg.out_dtype)
        with e.root():
            words = e.flat(w, blocks * steps * nb, "int32")
            rows = Rows(-(-k // _STEP) * 64, 2)
            left = pack_rows(caps, rows, e.flat(x, t * k), t, k)
            results = Results(
                epilogue,
                caps,
                e.flat(y, t * n),
                e.flat(bias, rows_n) if bias is not None else None,
                e.flat(residual, t * n) if residual is not None else None,
            )

            def body(rows_of_task: int) -> None:
                product = TileProduct(caps, schedule, TileDot.BF16, nb, rows_of_task, rows, left)
                with tasks(product, blocks, t, text) as task:
                    work = PairSums(product, task, words, steps)

                    def finish(block: Any, r: Any, at: Any) -> None:
                        row = e.let(task.first + r)
                        results.store(block, row, work.sums, lambda v: at + product.vector_at(r, v))

                    work.run(finish)

            by_height(t, least, most, schedule.rows, body)
    return built[0]


def pack_rows(caps: Capabilities, rows: Rows, x: Any, t: Any, k: int, moved: Moved | None = None) -> Any:
    """x, bf16 bits [t, k], as left operands; columns past k are zeros, other rows are left as they were.

    moved: which rows go where, if not in order.
    """
    left = e.workspace(rows.size(t if moved is None else moved.rows), "uint16")
    with e.parallel(t, caps) as i:
        r = i if moved is None else e.let(moved.place[i])
        begin = e.let((i if moved is None else moved.order[i]) * k)
        with e.loop(k // _STEP) as j:
            e.store(left, rows.place(r, j * _STEP), e.load(x, begin + j * _STEP, _LANES), _LANES)
        rest = k % _STEP
        if rest:
            at = e.let(rows.place(r, e.i64(k - rest)))
            e.store(left, at, e.const("uint16", 0, _LANES), _LANES)
            with e.loop(rest) as j:
                e.store(left, at + j, x[begin + (k - rest) + j], 1)
        with e.loop(-(-k // _STEP), rows.steps) as j:
            e.store(left, rows.place(r, j * _STEP), e.const("uint16", 0, _LANES), _LANES)
    return left


@dataclass(frozen=True)
class Moved:
    """Rows in another order: row order[i] of x becomes row place[i] of at most `rows`, which may have gaps."""

    order: Any
    place: Any
    rows: Any


class PairSums(BlockSums):
    """Sums over columns in pairs of bf16.

    Args:
        words: the packed weight as 32-bit elements; a block is [steps, n_block] of them.
    """

    def __init__(self, product: TileProduct, task: Task, words: Any, steps: int) -> None:
        super().__init__(product, task)
        self.words, self.nb, self.steps = words, product.n_block, steps
        self.whole, self.rest = divmod(steps, ROWS)
        self.chunk = max(1, min(self.whole, product.schedule.columns // _STEP))
        self.tail = e.workspace(ROWS * self.nb, "int32") if self.rest else None

    @property
    def passes(self) -> int:
        """Of whole steps, and one for the columns that are left."""
        return -(-self.whole // self.chunk) + (self.rest > 0)

    def one(self, block: Any, at: Any, p: Any) -> None:
        """As of BlockSums."""
        base = e.let(block * (self.steps * self.nb))
        if not self.rest:
            self._whole(base, at, p)
        elif not self.whole:
            self._rest(base, at)
        else:
            with T.If(p < self.passes - 1):
                with T.Then():
                    self._whole(base, at, p)
                with T.Else():
                    self._rest(base, at)

    def _whole(self, base: Any, at: Any, p: Any) -> None:
        begin = e.let(p * self.chunk)
        size = self.chunk
        if self.whole % self.chunk:
            size = e.let(T.min(e.i64(self.chunk), self.whole - begin))
        first = e.let(base + begin * (ROWS * self.nb))
        right = RightOperands(self.words, first, begin, size)
        # of several blocks the next one comes next, in the same columns
        following = None if self.task.most == 1 else first + self.steps * self.nb
        fresh = True if self.passes == 1 else p == 0
        self.accumulate(at, right, fresh, self.chunk, following)

    def _rest(self, base: Any, at: Any) -> None:
        """The last columns as a whole step, filled up with zeros."""
        with e.loop(self.rest * self.nb // ROWS) as i:
            source = base + self.whole * ROWS * self.nb + i * ROWS
            e.store(self.tail, i * ROWS, e.load(self.words, source, ROWS), ROWS)
        with e.loop(self.rest * self.nb // ROWS, self.nb) as i:
            e.store(self.tail, i * ROWS, e.const("int32", 0, ROWS), ROWS)
        right = RightOperands(self.tail, e.i64(0), e.i64(self.whole), 1)
        self.accumulate(at, right, self.whole == 0)
