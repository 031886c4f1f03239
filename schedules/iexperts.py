"""Linear layers of a mixture of experts with integer arithmetic: rows are rounded to int8 before they go to their experts."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.experts import expert_task, sort_rows
from llmc.schedules.ilinear import int_blocks
from llmc.schedules.isums import Vectors
from llmc.schedules.qexperts import QuantExpertConfig


def int_expert_linear(cfg: QuantExpertConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[N,k], ids[N], w packed, [bias[E,n]], y[N,n]) with symbolic N; ids must lie in [0, experts).

    As quant_expert_linear: rows are sorted by expert; a task is one weight block of one expert that has rows.
    """
    layout, experts = cfg.layout, cfg.experts
    n, k, blocks = layout.n, layout.k, layout.blocks
    epilogue = Epilogue(n, layout.n_block, cfg.in_dtype, cfg.out_dtype)
    built: list[Any] = []
    with e.kernel(built):
        rows = e.dim("N")
        x = e.tensor("x", [rows, k], cfg.in_dtype)
        ids = e.tensor("ids", [rows], cfg.ids_dtype)
        w = e.tensor("w", [experts, *layout.packed_shape], "uint8")
        bias = e.tensor("bias", [experts, n], cfg.in_dtype) if cfg.has_bias else None
        y = e.tensor("y", [rows, n], cfg.out_dtype)
        with e.root():
            bf = e.flat(bias, experts * n) if bias is not None else None
            yf = e.flat(y, rows * n)
            order, begin, active, count = sort_rows(e.flat(ids, rows), rows, experts)
            work = int_blocks(caps, layout, w, experts, cfg.prefetch)
            rounded = work.prepare(cfg.in_dtype, e.flat(x, rows * k), rows)
            with work.parallel(count * blocks) as task:
                block, expert = expert_task(task, blocks, active, count, cfg.by_expert)
                first, end = e.let(begin[expert]), e.let(begin[expert + 1])
                base = e.let(expert * work.copy_bytes + block * work.block_bytes)

                def write(acc: Vectors, at: list[Any]) -> None:
                    epilogue.store_held(acc, at, block, yf, caps, bf, None, expert * n)

                with e.loop((end - first + (cfg.t_block - 1)) // cfg.t_block) as part:
                    start = e.let(first + part * cfg.t_block)
                    size = e.let(T.min(e.i64(cfg.t_block), end - start))
                    work.rows(rounded, size, cfg.t_block, base, lambda r: order[start + r], write)
    return built[0]
