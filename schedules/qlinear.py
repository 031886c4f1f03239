"""Matrix times quantized weight, for one row or many: codes are unpacked on the way, sums are in float32."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.linear import MicroKernel, store_rows
from llmc.schedules.qblocks import ROWS, QuantBlocks
from llmc.schedules.qlayout import QuantLayout


@dataclass(frozen=True)
class QuantLinearConfig:
    """y[T, n] = x[T, k] @ dequantize(weight)[n, k].T (+ bias[n]).

    Attributes:
        n: outputs.
        layout: of the packed weight; has its scheme and k, and n unless gated (then see llmc.schedules.qlayout.in_turns).
        in_dtype: of x; float32, float16 or bfloat16.
        out_dtype: of y; float32 or in_dtype.
        has_bias: a bias[n] (gated: [2n]) of in_dtype follows the weight.
        lead: unit dimensions before T in x and y.
        t_block: rows of one task.
        prefetch: bytes that the weight stream is asked for ahead of its use; 0 = that is left to the machine.
        activation, gated, gate_second: see LinearAttrs in llmc/ops.py.
        has_residual: a residual of y's shape and in_dtype follows the bias.
    """

    n: int
    layout: QuantLayout
    in_dtype: str
    out_dtype: str
    has_bias: bool = False
    lead: int = 0
    t_block: int = 240
    prefetch: int = 2304
    activation: str = ""
    gated: bool = False
    gate_second: bool = False
    has_residual: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> QuantLinearConfig:
        return QuantLinearConfig(**{**values, "layout": QuantLayout(**values["layout"])})


def quant_linear(cfg: QuantLinearConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[1 x lead, T, k], w packed, [bias], [residual like y], y[1 x lead, T, n]) with symbolic T."""
    layout, n, k = cfg.layout, cfg.n, cfg.layout.k
    bias_n = 2 * n if cfg.gated else n
    epilogue = Epilogue(
        n, layout.n_block, cfg.in_dtype, cfg.out_dtype, cfg.activation, cfg.gated, cfg.gate_second
    )
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ones = [1] * cfg.lead
        x = e.tensor("x", [*ones, t, k], cfg.in_dtype)
        w = e.tensor("w", list(layout.packed_shape), "uint8")
        bias = e.tensor("bias", [bias_n], cfg.in_dtype) if cfg.has_bias else None
        residual = e.tensor("residual", [*ones, t, n], cfg.in_dtype) if cfg.has_residual else None
        y = e.tensor("y", [*ones, t, n], cfg.out_dtype)
        with e.root():
            bf = e.flat(bias, bias_n) if bias is not None else None
            rf = e.flat(residual, t * n) if residual is not None else None
            yf = e.flat(y, t * n)
            work = QuantBlocks(caps, layout, cfg.in_dtype, e.flat(x, t * k), t, w, prefetch=cfg.prefetch)

            def store(block: Any, micro: MicroKernel, acc: list[list[Any]], rows: list[Any]) -> None:
                store_rows(epilogue, micro, acc, rows, block, yf, bf, rf)

            values = work.prepare()
            # tasks of about equal numbers of rows, in whole tiles
            most = -(-cfg.t_block // ROWS) * ROWS
            row_blocks = e.let((t + (most - 1)) // most)
            each = e.let(((t + row_blocks - 1) // row_blocks + (ROWS - 1)) // ROWS * ROWS)
            with work.parallel(layout.blocks * row_blocks) as task:
                block = e.let(task // row_blocks)
                first = e.let(task % row_blocks * each)
                count = e.let(T.max(e.i64(0), T.min(each, t - first)))
                base = e.let(block * work.block_bytes)
                work.multiply(values, count, most, base, lambda r: first + r, partial(store, block))
    return built[0]
