"""Matrix times quantized weight, for one row or many: codes are unpacked on the way, sums are in float32."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.micro_kernel import MicroKernel
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
        tiles_from: rows from which on a machine with tile registers uses them; 0 = never. What follows is for those:
        tile_rows, tile_columns, tile_blocks, tile_unroll, tile_prefetch, tile_wide: see TileSchedule in tile_product.py.
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
    tiles_from: int = 17
    tile_rows: int = 0
    tile_columns: int = 0
    tile_blocks: int = 0
    tile_unroll: int = 2
    tile_prefetch: bool = True
    tile_wide: bool = False
    activation: str = ""
    gated: bool = False
    gate_second: bool = False
    has_residual: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> QuantLinearConfig:
        return QuantLinearConfig(**{**values, "layout": QuantLayout(**values["layout"])})


class QuantTensors:
    """The arguments of a quantized linear kernel, declared in their order.

    Attributes:
        w: the packed weight.
        x, bias, residual, y: flat views, after `view`; None for those that the kernel does not have.
    """

    x: Any
    bias: Any
    residual: Any
    y: Any

    def __init__(self, cfg: QuantLinearConfig, t: Any) -> None:
        n, k, ones = cfg.n, cfg.layout.k, [1] * cfg.lead
        held = 2 * n if cfg.gated else n
        x = e.tensor("x", [*ones, t, k], cfg.in_dtype)
        self.w = e.tensor("w", list(cfg.layout.packed_shape), "uint8")
        bias = e.tensor("bias", [held], cfg.in_dtype) if cfg.has_bias else None
        residual = e.tensor("residual", [*ones, t, n], cfg.in_dtype) if cfg.has_residual else None
        y = e.tensor("y", [*ones, t, n], cfg.out_dtype)
        self._declared = {
            "x": (x, t * k),
            "bias": (bias, held),
            "residual": (residual, t * n),
            "y": (y, t * n),
        }

    def view(self) -> None:
        """Make the views; inside the root block."""
        for name, (buffer, size) in self._declared.items():
            setattr(self, name, None if buffer is None else e.flat(buffer, size))


def quant_linear(cfg: QuantLinearConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[1 x lead, T, k], w packed, [bias], [residual like y], y[1 x lead, T, n]) with symbolic T."""
    layout, n = cfg.layout, cfg.n
    epilogue = Epilogue(
        n, layout.n_block, cfg.in_dtype, cfg.out_dtype, cfg.activation, cfg.gated, cfg.gate_second
    )
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        args = QuantTensors(cfg, t)
        with e.root():
            args.view()
            work = QuantBlocks(caps, layout, cfg.in_dtype, args.x, t, args.w, prefetch=cfg.prefetch)

            def store(block: Any, micro: MicroKernel, acc: list[list[Any]], rows: list[Any]) -> None:
                epilogue.store_held(acc, rows, block, args.y, caps, args.bias, args.residual)

            values = work.prepare()
            # tasks of about equal numbers of rows, in whole tiles
            most = -(-cfg.t_block // ROWS) * ROWS
            row_blocks = e.opaque((t + (most - 1)) // most)
            each = e.opaque(((t + row_blocks - 1) // row_blocks + (ROWS - 1)) // ROWS * ROWS)
            with work.parallel(layout.blocks * row_blocks) as task:
                block = e.opaque(task // row_blocks)
                first = e.opaque(task % row_blocks * each)
                count = e.opaque(T.max(e.i64(0), T.min(each, t - first)))
                base = e.opaque(block * work.block_bytes)
                work.multiply(values, count, most, base, lambda r: first + r, partial(store, block))
    return built[0]
