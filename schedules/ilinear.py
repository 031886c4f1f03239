"""Matrix times quantized weight with integer arithmetic: activations are rounded to int8 per row on the fly."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import ByteDot, Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.iblocks import IntBlocks
from llmc.schedules.isums import Vectors
from llmc.schedules.qlayout import QuantLayout
from llmc.schedules.qlinear import QuantLinearConfig, QuantTensors


def int_blocks(
    caps: Capabilities, layout: QuantLayout, w: Any, copies: int = 1, prefetch: int = 0
) -> IntBlocks:
    """The best IntBlocks of a machine; arguments as there."""
    if caps.byte_dot is not ByteDot.SIGNED or not caps.has_lane_operands:
        return IntBlocks(caps, layout, w, copies, prefetch)
    if caps.has_byte_mma:
        from llmc.schedules.imatrix import MatrixIntBlocks

        return MatrixIntBlocks(caps, layout, w, copies, prefetch)
    from llmc.schedules.ilanes import LaneIntBlocks

    return LaneIntBlocks(caps, layout, w, copies, prefetch)


def int_linear(cfg: QuantLinearConfig, caps: Capabilities) -> Any:
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
            work = int_blocks(caps, layout, args.w, prefetch=cfg.prefetch)
            rounded = work.prepare(cfg.in_dtype, args.x, t)

            def write(block: Any, acc: Vectors, rows: list[Any]) -> None:
                epilogue.store_held(acc, rows, block, args.y, caps, args.bias, args.residual)

            # tasks of equal numbers of whole tiles
            tile = work.max_rows
            most = -(-cfg.t_block // tile) * tile
            row_blocks = e.opaque((t + (most - 1)) // most)
            each = e.opaque(((t + row_blocks - 1) // row_blocks + (tile - 1)) // tile * tile)
            with work.parallel(layout.blocks * row_blocks) as task:
                block = e.opaque(task // row_blocks)
                first = e.opaque(task % row_blocks * each)
                count = e.opaque(T.max(e.i64(0), T.min(each, t - first)))
                base = e.opaque(block * work.block_bytes)
                work.rows(
                    rounded,
                    count,
                    most,
                    base,
                    lambda r: first + r,
                    lambda acc, rows: write(block, acc, rows),
                )
    return built[0]
