"""Linear layers of a mixture of experts: each row of x goes through the weight of its own expert."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.layout import BlockedLayout, linear_layout
from llmc.schedules.micro_kernel import MicroKernel, row_sizes, row_view, weight_view, write_rows


@dataclass(frozen=True)
class ExpertConfig:
    """y[r, n] = x[r, k] @ weight[ids[r], n, k].T (+ bias[ids[r], n]).

    Attributes:
        experts, n, k: of the weight [experts, n, k], each expert packed by `layout` (None = linear_layout's).
        in_dtype, weight_dtype: the same; out_dtype: float32 or in_dtype.
        ids_dtype: int32 or int64.
        has_bias: a bias [experts, n] of in_dtype follows the weight.
        prefetch: bytes that the weight stream is asked for ahead of its use.
        rows_tile, unroll: see LinearSchedule.
        by_expert: tasks of an expert are neighbours; else those of a block of outputs are, see expert_task.
    """

    experts: int
    n: int
    k: int
    in_dtype: str
    weight_dtype: str
    out_dtype: str
    ids_dtype: str = "int64"
    has_bias: bool = False
    layout: BlockedLayout | None = None
    prefetch: int = 2304
    rows_tile: int = 0
    unroll: int = 0
    by_expert: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> ExpertConfig:
        layout = values.get("layout")
        return ExpertConfig(**{**values, "layout": BlockedLayout(**layout) if layout else None})


@dataclass(frozen=True)
class SortConfig:
    """A sort of rows by `ids` [N], int32 or int64 in [0, experts), where expert kernels share it.

    Its result, the *plan*, is one int32 tensor: where the rows of each expert begin [experts + 1], then the rows in order [N].
    """

    experts: int
    ids_dtype: str = "int64"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_size(count: Any, experts: int) -> Any:
    """Elements of the plan of `count` rows."""
    return count + (experts + 1)


def expert_linear(cfg: ExpertConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[N,k], ids[N], w packed, [bias[E,n]], y[N,n]) with symbolic N; ids must lie in [0, experts).

    Rows are first sorted by expert. A task is one weight block of one expert that has rows: it is read once for them.
    """
    layout = cfg.layout or linear_layout(cfg.weight_dtype, caps)
    if cfg.in_dtype != cfg.weight_dtype:
        raise ValueError(f"x is {cfg.in_dtype}, the weight {cfg.weight_dtype}; they must be the same")
    n, k, experts = cfg.n, cfg.k, cfg.experts
    blocks, steps, nb, kp = layout.packed_shape(n, k)
    built: list[Any] = []
    with e.kernel(built):
        rows = e.dim("N")
        x = e.tensor("x", [rows, k], cfg.in_dtype)
        ids = e.tensor("ids", [rows], cfg.ids_dtype)
        w = e.tensor("w", [experts, blocks, steps, nb, kp], cfg.weight_dtype)
        bias = e.tensor("bias", [experts, n], cfg.in_dtype) if cfg.has_bias else None
        y = e.tensor("y", [rows, n], cfg.out_dtype)
        with e.root():
            pairs = kp == 2
            xf, stride = row_view(x, rows * k, k, pairs)
            wf = weight_view(w, experts * blocks * steps * nb * kp, pairs)
            bf = e.flat(bias, experts * n) if bias is not None else None
            yf = e.flat(y, rows * n)
            order, begin, active, count = sort_rows(e.flat(ids, rows), rows, experts)
            micro = MicroKernel(caps, layout, cfg.in_dtype, k, xf, wf, cfg.prefetch, cfg.unroll)
            tile = cfg.rows_tile or micro.max_rows()
            with e.parallel(count * blocks, caps) as task:
                block, expert = expert_task(task, blocks, active, count, cfg.by_expert)
                first, end = e.let(begin[expert]), e.let(begin[expert + 1])

                def tile_of(size: int, start: Any) -> None:
                    at = [e.let(order[start + r]) for r in range(size)]
                    bases = [e.let(row * stride) for row in at]
                    acc = micro.sums(size, bases, e.let((expert * blocks + block) * steps * nb), steps)
                    write_rows(micro, acc, at, block, n, bf, cfg.in_dtype, yf, cfg.out_dtype, expert * n)

                with e.loop((end - first) // tile) as i:
                    tile_of(tile, e.let(first + i * tile))
                done = e.let(first + (end - first) // tile * tile)
                rest = e.let(end - done)
                for size in row_sizes(tile):
                    with T.If(T.bitwise_and(rest, e.i64(size)) != 0), T.Then():
                        tile_of(size, e.let(done + T.bitwise_and(rest, e.i64(~(2 * size - 1)))))
    return built[0]


def expert_task(task: Any, blocks: int, active: Any, count: Any, by_expert: bool) -> tuple[Any, Any]:
    """(block of outputs, expert) of a task; a thread has a contiguous piece of the tasks.

    Args:
        active, count: from sort_rows.
        by_expert: each thread reads long runs of few experts' weights; which pays where all of them have about as many
            rows. Else neighbours share a block number, so that each thread has the same share of every expert's rows.
    """
    if by_expert:
        return e.let(task % blocks), e.let(active[task // blocks])
    return e.let(task // count), e.let(active[task % count])


def sort_rows(ids: Any, rows: Any, experts: int) -> tuple[Any, Any, Any, Any]:
    """Counting sort: (rows in order of their expert, begin of each expert's rows, experts that have rows, how many)."""
    order = e.workspace(rows, "int64")
    begin = e.workspace(experts + 1, "int64")
    fill = e.workspace(experts, "int64")
    active = e.workspace(experts, "int64")
    count = e.scratch(1, "int64")
    with e.loop(experts) as i:
        e.store(fill, i, e.i64(0), 1)
    with e.loop(rows) as i:
        expert = e.let(e.i64(ids[i]))
        e.store(fill, expert, fill[expert] + 1, 1)
    e.store(begin, e.i64(0), e.i64(0), 1)
    e.store(count, 0, e.i64(0), 1)
    with e.loop(experts) as i:
        size = e.let(fill[i])
        with T.If(size > 0), T.Then():
            e.store(active, count[0], i, 1)
            e.store(count, 0, count[0] + 1, 1)
        e.store(begin, i + 1, begin[i] + size, 1)
        e.store(fill, i, begin[i], 1)
    with e.loop(rows) as i:
        expert = e.let(e.i64(ids[i]))
        e.store(order, fill[expert], i, 1)
        e.store(fill, expert, fill[expert] + 1, 1)
    return order, begin, active, e.let(count[0])
