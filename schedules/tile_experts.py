"""Linear layers of a mixture of experts on tile registers, for many rows: bf16 weights."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities, TileUnit
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.experts import ExpertConfig, expert_task, sort_rows
from llmc.schedules.layout import linear_layout
from llmc.schedules.tile_linear import Moved, PairSums, pack_rows
from llmc.schedules.tile_product import PAIR, Rows, TileProduct, TileSchedule
from llmc.schedules.tile_tasks import Results, Task
from llmc.schedules.tiles import ROWS, TileDot

_ROWS_PER_EXPERT = 8  # on average, from which on tiles are worth it
_SCHEDULE = TileSchedule(rows=256, columns=256)


def expert_tiles_from(config: ExpertConfig, caps: Capabilities) -> int:
    """The least number of rows that take tiles; 0 = none."""
    usable = caps.tiles is not TileUnit.NONE and config.weight_dtype == config.in_dtype == "bfloat16"
    return _ROWS_PER_EXPERT * config.experts if usable else 0


def tile_expert_linear(cfg: ExpertConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[N,k], ids[N], w packed, [bias[E,n]], y[N,n]) with symbolic N; ids must lie in [0, experts).

    As llmc.schedules.experts.expert_linear. Rows are packed in the order of their experts, whose first rows begin pairs
    of tiles.
    """
    layout = cfg.layout or linear_layout(cfg.weight_dtype, caps)
    n, k, experts = cfg.n, cfg.k, cfg.experts
    blocks, steps, nb, kp = layout.packed_shape(n, k)
    if kp != 2 or nb % ROWS:
        raise ValueError(f"a weight in blocks of {nb} outputs by {kp} columns is no right operand")
    text = str(e.import_text(caps).get("pragma_import_llvm", ""))
    built: list[Any] = []
    with e.kernel(built):
        rows = e.dim("N")
        x = e.tensor("x", [rows, k], cfg.in_dtype)
        ids = e.tensor("ids", [rows], cfg.ids_dtype)
        w = e.tensor("w", [experts, blocks, steps, nb, kp], cfg.weight_dtype)
        bias = e.tensor("bias", [experts, n], cfg.in_dtype) if cfg.has_bias else None
        y = e.tensor("y", [rows, n], cfg.out_dtype)
        with e.root():
            words = e.flat(w, experts * blocks * steps * nb, "int32")
            results = Results(
                Epilogue(n, nb, cfg.in_dtype, cfg.out_dtype),
                caps,
                e.flat(y, rows * n),
                e.flat(bias, experts * n) if bias is not None else None,
                None,
            )
            order, begin, active, count = sort_rows(e.flat(ids, rows), rows, experts)
            starts, moved = _places(order, begin, active, count, rows, experts)
            packed = Rows(-(-k // 32) * 64, 2)
            left = pack_rows(caps, packed, e.flat(x, rows * k), rows, k, moved)
            product = TileProduct(caps, _SCHEDULE, TileDot.BF16, nb, _SCHEDULE.rows, packed, left)
            tiles = product.tiles()
            with tiles.launch(count * blocks, text) as number:
                block, expert = expert_task(number, blocks, active, count, cfg.by_expert)
                first, end = e.let(begin[expert]), e.let(begin[expert + 1])
                with e.loop((end - first + (product.most - 1)) // product.most) as part:
                    done = e.let(part * product.most)
                    size = e.let(T.min(e.i64(product.most), end - first - done))
                    whole = e.let(expert * blocks + block)
                    task = Task(tiles, whole, 1, 1, e.let(starts[expert] + done), size)
                    work = PairSums(product, task, words, steps)

                    def finish(_: Any, r: Any, at: Any) -> None:
                        row = e.let(order[first + done + r])
                        sums = lambda v: at + product.vector_at(r, v)  # noqa: E731
                        results.store(block, row, work.sums, sums, expert * n)

                    work.run(finish)
    return built[0]


def _places(order: Any, begin: Any, active: Any, count: Any, rows: Any, experts: int) -> tuple[Any, Moved]:
    """Where each expert's rows begin among the packed ones, and where each row goes."""
    starts = e.workspace(experts, "int64")
    place = e.workspace(rows, "int64")
    filled = e.scratch(1, "int64")
    e.store(filled, 0, e.i64(0), 1)
    with e.loop(count) as i:
        expert = e.let(active[i])
        first, end = e.let(begin[expert]), e.let(begin[expert + 1])
        start = e.let(filled[0])
        e.store(starts, expert, start, 1)
        with e.loop(first, end) as j:
            e.store(place, j, start + (j - first), 1)
        e.store(filled, 0, start + (end - first + (PAIR - 1)) // PAIR * PAIR, 1)
    return starts, Moved(order, place, rows + PAIR * experts)
