"""The linear kernel: which of the matmuls runs is decided by the number of rows, on the host."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import flat, gemm, warpgroup_gemm
from llmc.schedules.gpu.configs import GpuLinearSchedule, Way, emit_by_rows, schedules_in
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
            schedules = schedules_in(cfg.schedule, GpuLinearSchedule)
            emit_by_rows(schedules, t, lambda schedule, most: _run(ops, caps, schedule, warps, most))
    return built[0]


def _run(ops: Operands, caps: Capabilities, schedule: GpuLinearSchedule, warps: int, most: int) -> None:
    """The launch of a schedule for up to `most` rows (0 = any); `warps` of a block where it leaves them open."""
    if schedule.way == Way.UNTUNED:
        _untuned(ops, caps, warps, most)
    elif schedule.way == Way.THREADS:
        gemv(ops, caps, schedule.rows, schedule.warps or warps, schedule.in_flight)
    elif schedule.way == Way.WARPGROUPS:
        warpgroup_gemm.gemm(ops, caps, warpgroup_tile_of(schedule))
    elif schedule.way == Way.SPLIT:
        flat.flat_gemm(ops, caps, schedule.tile_rows, schedule.warps)
    else:
        gemm.gemm(ops, caps, tile_of(schedule))


def tile_of(schedule: GpuLinearSchedule) -> gemm.TileConfig:
    """The tile of a schedule on the matrix units.

    Raises:
        ValueError: it is none.
    """
    s = schedule
    return gemm.TileConfig(s.tile_rows, s.tile_columns, s.warp_rows, s.warp_columns, s.stages)


def warpgroup_tile_of(schedule: GpuLinearSchedule) -> warpgroup_gemm.WarpgroupTile:
    """The tile of a schedule for warpgroups.

    Raises:
        ValueError: it is none.
    """
    return warpgroup_gemm.WarpgroupTile(schedule.tile_columns, schedule.stages, schedule.warpgroups)


def _untuned(ops: Operands, caps: Capabilities, warps: int, most: int) -> None:
    """The kernel for one row, or one of those for more; only what `most` rows may need."""
    if most == 1:
        gemv(ops, caps, 1, warps)
        return
    with T.If(ops.t == 1):
        with T.Then():
            gemv(ops, caps, 1, warps)
        with T.Else():
            if gemm.takes(ops.cfg, caps):
                _on_matrix_units(ops, caps, most)
            else:
                gemv(ops, caps, _SHARED_ROWS, warps)


def _on_matrix_units(ops: Operands, caps: Capabilities, most: int) -> None:
    """By the number of rows: up to 16 of them, or larger tiles that have more work per byte and leave more blocks idle."""
    large = gemm.MANY_ROWS if ops.outputs >= 16 * gemm.MANY_ROWS.columns else gemm.SOME_ROWS
    if 0 < most <= flat.MOST_ROWS:
        _few_rows(ops, caps, most)
        return
    with T.If(ops.t <= flat.MOST_ROWS):
        with T.Then():
            _few_rows(ops, caps, flat.MOST_ROWS)
        with T.Else():
            many_rows(ops, caps, large, most)


def _few_rows(ops: Operands, caps: Capabilities, most: int) -> None:
    """Up to 16 rows: tiles, or where these are too few, columns shared out."""
    if not flat.pays(ops, caps):
        gemm.gemm(ops, caps, gemm.FEW_ROWS)
        return
    half, warps = flat.MOST_ROWS // 2, flat.warps_for(ops.cfg.k)
    if most <= half:
        flat.flat_gemm(ops, caps, half, warps)
        return
    with T.If(ops.t <= half):
        with T.Then():
            flat.flat_gemm(ops, caps, half, warps)
        with T.Else():
            flat.flat_gemm(ops, caps, flat.MOST_ROWS, warps)


def _warps(cfg: LinearConfig, caps: Capabilities) -> int:
    """Warps of a block: more where there are few blocks, and no more than have columns."""
    blocks, steps, _, _ = cfg.packed_shape(caps)
    wanted = 64 * caps.multiprocessors // max(1, blocks)  # a multiprocessor holds 48 to 64 warps
    most = max(1, steps // 4)
    warps = 8
    while warps > 1 and (warps > most or warps > max(2, wanted)):
        warps //= 2
    return warps
