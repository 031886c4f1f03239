"""Linear layers of a mixture of experts on quantized weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.experts import expert_task, sort_rows
from llmc.schedules.micro_kernel import MicroKernel, write_rows
from llmc.schedules.qblocks import QuantBlocks
from llmc.schedules.qlayout import QuantLayout


@dataclass(frozen=True)
class QuantExpertConfig:
    """y[r, n] = x[r, k] @ dequantize(weight)[ids[r], n, k].T (+ bias[ids[r], n]).

    Attributes:
        experts: of the weight [experts, n, k], each packed by `layout`, which has n and k.
        in_dtype: of x and bias; out_dtype: float32 or in_dtype.
        ids_dtype: int32 or int64.
        has_bias: a bias [experts, n] follows the weight.
        prefetch: bytes that the weight stream is asked for ahead of its use.
        t_block: rows of an expert that are taken together.
        by_expert: see expert_task in experts.py.
    """

    experts: int
    layout: QuantLayout
    in_dtype: str
    out_dtype: str
    ids_dtype: str = "int64"
    has_bias: bool = False
    prefetch: int = 2304
    t_block: int = 240
    by_expert: bool = False

    @property
    def n(self) -> int:
        return self.layout.n

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> QuantExpertConfig:
        return QuantExpertConfig(**{**values, "layout": QuantLayout(**values["layout"])})


def quant_expert_linear(cfg: QuantExpertConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[N,k], ids[N], w packed, [bias[E,n]], y[N,n]) with symbolic N; ids must lie in [0, experts).

    Rows are sorted by expert; a task is one weight block of one expert that has rows.
    """
    layout, experts = cfg.layout, cfg.experts
    n, k, blocks = layout.n, layout.k, layout.blocks
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
            idf = e.flat(ids, rows)
            order, begin, active, count = sort_rows(idf, rows, experts)
            work = QuantBlocks(
                caps,
                layout,
                cfg.in_dtype,
                e.flat(x, rows * k),
                rows,
                w,
                experts,
                cfg.prefetch,
                lambda r: e.i64(idf[r]),
            )
            values = work.prepare()
            with work.parallel(count * blocks) as task:
                block, expert = expert_task(task, blocks, active, count, cfg.by_expert)
                first, end = e.let(begin[expert]), e.let(begin[expert + 1])
                base = e.let(expert * work.copy_bytes + block * work.block_bytes)

                def write(micro: MicroKernel, acc: list[list[Any]], at: list[Any]) -> None:
                    write_rows(micro, acc, at, block, n, bf, cfg.in_dtype, yf, cfg.out_dtype, expert * n)

                with e.loop((end - first + (cfg.t_block - 1)) // cfg.t_block) as part:
                    start = e.let(first + part * cfg.t_block)
                    size = e.let(T.min(e.i64(cfg.t_block), end - start))
                    work.multiply(values, size, cfg.t_block, base, lambda r: order[start + r], write)
    return built[0]
