"""The linear kernel with a quantized weight: which of the matmuls runs is decided by the number of rows, on the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import qgemm, qgemv, qint, warpgroup_qgemm
from llmc.schedules.gpu.qoperands import QuantOperands
from llmc.schedules.qlinear import QuantLinearConfig

_SHARED_ROWS = 4  # rows of x that share one pass over the weight, without matrix units
_MOST_TILES = 4


def quant_linear(cfg: QuantLinearConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.qlinear.quant_linear, for a machine with threads."""
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ops = QuantOperands(cfg, t)
        with e.root():
            ops.view()
            for condition, launch in _ways(ops, caps, _warps(cfg, caps)):
                with T.If(condition(t)), T.Then():
                    launch()
    return built[0]


def _ways(
    ops: QuantOperands, caps: Capabilities, warps: int
) -> list[tuple[Callable[[Any], Any], Callable[[], None]]]:
    """(numbers of rows, what computes them)."""
    if ops.cfg.layout.of.activation_bits:
        qint.quantize_rows(ops)
    if qgemm.takes(ops, caps):
        few, many = (
            partial(qgemm.gemm, ops, caps, 1, warps),
            partial(qgemm.gemm, ops, caps, _MOST_TILES, min(4, warps)),
        )
    elif ops.rounded is not None and caps.has_mma_bytes:
        few, many = (
            partial(qint.gemm, ops, caps, 1, warps),
            partial(qint.gemm, ops, caps, _MOST_TILES, min(4, warps)),
        )
    else:
        few, many = (
            partial(qgemv.gemv, ops, caps, 1, warps),
            partial(qgemv.gemv, ops, caps, _SHARED_ROWS, warps),
        )
        return [(lambda t: t == 1, few), (lambda t: t > 1, many)]
    many = partial(warpgroup_qgemm.many_rows, ops, caps, many)
    return [(lambda t: t <= 16, few), (lambda t: t > 16, many)]


def _warps(cfg: QuantLinearConfig, caps: Capabilities) -> int:
    """Warps of a block: more where there are few blocks, and no more than have a chunk of columns."""
    layout = cfg.layout
    wanted = 32 * caps.multiprocessors // max(1, layout.blocks)
    most = max(1, layout.padded_k // max(layout.piece, 32))
    warps = 8
    while warps > 1 and (warps > most or warps > max(2, wanted)):
        warps //= 2
    return warps
