"""The linear kernel: which of the matmuls runs is decided by the number of rows, on the host."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import gemm
from llmc.schedules.gpu.gemv import Operands, gemv, layout_of
from llmc.schedules.gpu.many_rows import many_rows
from llmc.schedules.linear import LinearConfig

_SHARED_ROWS = 4  # rows of x that share one pass over the weight, without matrix units


def linear(cfg: LinearConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.linear.linear, for a machine with threads."""
    if cfg.in_dtype != cfg.weight_dtype:
        raise ValueError(f"x is {cfg.in_dtype}, the weight {cfg.weight_dtype}; they must be the same")
    if cfg.layout not in (None, layout_of(cfg.weight_dtype)):
        raise ValueError(f"the weight is {cfg.layout}; this kernel reads {layout_of(cfg.weight_dtype)}")
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ops = Operands(cfg, caps, t)
        warps = _warps(cfg, caps)
        with e.root():
            ops.view()
            with T.If(t == 1):
                with T.Then():
                    gemv(ops, caps, 1, warps)
                with T.Else():
                    if gemm.takes(cfg, caps):
                        _on_matrix_units(ops, caps)
                    else:
                        gemv(ops, caps, _SHARED_ROWS, warps)
    return built[0]


def _on_matrix_units(ops: Operands, caps: Capabilities) -> None:
    """By the number of rows: a tile of 16, or larger ones that have more work per byte and leave more blocks idle."""
    large = gemm.MANY_ROWS if ops.outputs >= 16 * gemm.MANY_ROWS.columns else gemm.SOME_ROWS
    with T.If(ops.t <= gemm.FEW_ROWS.rows):
        with T.Then():
            gemm.gemm(ops, caps, gemm.FEW_ROWS)
        with T.Else():
            many_rows(ops, caps, large)


def _warps(cfg: LinearConfig, caps: Capabilities) -> int:
    """Warps of a block: more where there are few blocks, and no more than have columns."""
    blocks, steps, _, _ = cfg.packed_shape(caps)
    wanted = 64 * caps.multiprocessors // max(1, blocks)  # a multiprocessor holds 48 to 64 warps
    most = max(1, steps // 4)
    warps = 8
    while warps > 1 and (warps > most or warps > max(2, wanted)):
        warps //= 2
    return warps
