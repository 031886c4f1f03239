"""Matrix times packed weight for 2 to 16 rows, with the columns shared out among a block's warps (split K, as the flat GEMM of
Hong et al. 2023, "FlashDecoding++").

A product of few rows waits for its weight, and memory is busy only while enough of it is asked for. Tiles of 64 outputs
(gemm.FEW_ROWS) ask for 20 KB per block, but a weight of 4096 rows makes 64 of them, less than there are multiprocessors.
Here a block has 32 outputs and up to 16 warps, each with columns of its own and what comes next in its registers; sums meet
in shared memory. Rows of x are padded to 8 or 16.
"""

from __future__ import annotations

import math
from typing import Any

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import gemm, gemv, qgemm, qoperands
from llmc.schedules.gpu.rows import Rows
from llmc.schedules.gpu.wide import WideWeight
from llmc.schedules.qlayout import UNIT, WARP_ROWS, QuantLayout
from llmc.schedules.qlinear import QuantLinearConfig

MOST_ROWS = 16
_BLOCKS = 2  # tiles per multiprocessor that keep its memory busy
_MOST_WARPS = 16
_COLUMNS = 2 * UNIT  # of a warp, at least


class Operands(qoperands.Operands):
    """Arguments of a linear kernel as the matmuls of quantized weights know them.

    Args:
        ops: those of the kernel.
    """

    def __init__(self, ops: gemv.Operands) -> None:
        cfg = ops.cfg
        self.cfg = QuantLinearConfig(
            cfg.n,
            QuantLayout("q8", WARP_ROWS, ops.outputs, cfg.k),
            cfg.in_dtype,
            cfg.out_dtype,
            activation=cfg.activation,
            gated=cfg.gated,
            gate_second=cfg.gate_second,
        )
        self.t, self.x, self.y, self.bias, self.residual = ops.t, ops.x, ops.y, ops.bias, ops.residual
        self.x_pairs = e.flat(ops._x, ops.t * cfg.k // 2, "uint32")

    def halves(self, c: Any) -> tuple[Any, Any]:
        """Half of each 8 rows are gates, the other half what they multiply."""
        half = gemv.ROWS // 2
        gate = e.let(c // half * gemv.ROWS + c % half)
        return gate, gate + half


def pays(ops: gemv.Operands, caps: Capabilities) -> bool:
    """Whether tiles are too few to keep all multiprocessors' memory busy."""
    return -(-ops.outputs // gemm.FEW_ROWS.columns) < _BLOCKS * caps.multiprocessors


def warps_for(k: int) -> int:
    """Warps of a block, if that is left open: as many as have columns."""
    warps = _MOST_WARPS
    while warps > 1 and warps * _COLUMNS > k:
        warps //= 2
    return warps


def flat_gemm(ops: gemv.Operands, caps: Capabilities, rows: int, warps: int) -> None:
    """One launch over all of y.

    Args:
        rows: of x per block: 8 or 16.
        warps: of a block.
    """
    blocks = -(-ops.outputs // WARP_ROWS)
    plain, tiles = Operands(ops), rows // MOST_ROWS
    row_blocks = e.ceildiv(ops.t, rows)
    with g.launch(row_blocks * blocks, warps * g.WARP) as (number, thread), g.at_most_one_block():
        across = g.held(row_blocks)
        block, first = g.held(number // across), g.held(number % across * rows)
        weight = WideWeight(
            ops._w,
            math.prod(ops.shape),
            ops.cfg.weight_dtype,
            ops.shape,
            e.let(block * (WARP_ROWS // gemv.ROWS)),
            e.i64(ops.shape[0] - 1),
        )
        tile = qgemm.Block(plain, caps, weight, tiles, warps, thread)
        tile.run(block, e.i64(0), Rows(first, ops.t))
