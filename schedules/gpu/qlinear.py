"""The linear kernel with a quantized weight: which of the matmuls runs is decided by the number of rows, on the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities, Fp8Mma
from llmc.quant.schemes import Code
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu import qfloat, qgemm, qgemv, qint, warpgroup_qgemm
from llmc.schedules.gpu.configs import GpuQuantSchedule, Way, emit_by_rows, schedules_in
from llmc.schedules.gpu.qoperands import Operands, QuantOperands
from llmc.schedules.gpu.rounded_inputs import round_inputs
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tune_qlinear import QuantKernel

_SHARED_ROWS = 4  # rows of x that share one pass over the weight, without matrix units
_MOST_WARPS = 16  # of a block: those of a multiprocessor that has one of them ask for enough at a time


def quant_linear(kernel: QuantKernel | QuantLinearConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.qlinear.quant_linear, for a machine with threads."""
    cfg = kernel.config if isinstance(kernel, QuantKernel) else kernel
    schedules = ByRows((GpuQuantSchedule(),))
    if isinstance(kernel, QuantKernel):
        schedules = schedules_in(kernel.schedule, GpuQuantSchedule)
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ops = QuantOperands(cfg, t)
        with e.root():
            ops.view()
            round_inputs(ops, caps)
            emit_by_rows(schedules, t, lambda schedule, most: _run(ops, caps, schedule, most))
    return built[0]


def _run(ops: QuantOperands, caps: Capabilities, schedule: GpuQuantSchedule, most: int) -> None:
    """The launch of a schedule for up to `most` rows (0 = any)."""
    warps, on_units = _warps(ops.cfg, caps), units_of(ops.cfg, caps)
    if schedule.way == Way.UNITS and on_units is not None:
        on_units(ops, caps, schedule.tiles, schedule.warps)
    elif schedule.way == Way.WARPGROUPS:
        warpgroup_qgemm.gemm(ops, caps)
    elif schedule.way == Way.THREADS:
        qgemv.gemv(ops, caps, schedule.rows, schedule.warps)
    elif on_units is not None:
        fewest, few = (partial(on_units, ops, caps, tiles, warps) for tiles in (0, 1))
        many = partial(on_units, ops, caps, qfloat.most_tiles(ops.cfg.layout, caps), min(4, warps))
        rest = partial(warpgroup_qgemm.many_rows, ops, caps, many, most)
        _by_rows(ops, fewest, partial(_by_rows, ops, few, rest, 16, most), qgemm.ROWS, most)
    else:
        few = partial(qgemv.gemv, ops, caps, 1, warps)
        _by_rows(ops, few, partial(qgemv.gemv, ops, caps, _SHARED_ROWS, warps), 1, most)


def _by_rows(
    ops: QuantOperands, few: Callable[[], None], many: Callable[[], None], limit: int, most: int
) -> None:
    """One launch for up to `limit` rows, another one for more; only what `most` rows may need."""
    if 0 < most <= limit:
        few()
        return
    with T.If(ops.t <= limit):
        with T.Then():
            few()
        with T.Else():
            many()


def takes_warpgroups(cfg: QuantLinearConfig, caps: Capabilities) -> bool:
    """Whether warpgroups can multiply this weight."""
    return warpgroup_qgemm.takes(_described(cfg), caps)


def units_of(cfg: QuantLinearConfig, caps: Capabilities) -> Callable[..., None] | None:
    """The matmul on the matrix units that takes this weight and these activations, or None."""
    if qgemm.takes(_described(cfg), caps):
        return qgemm.gemm
    kind = cfg.layout.of.activations
    if kind is Code.E4M3 and caps.fp8_mma is not Fp8Mma.NONE:
        return qfloat.gemm
    return qint.gemm if kind is Code.INT and caps.has_mma_bytes else None


def _described(cfg: QuantLinearConfig) -> Operands:
    """Operands that have a config and no buffers, for questions about it."""
    ops = Operands()
    ops.cfg = cfg
    return ops


def _warps(cfg: QuantLinearConfig, caps: Capabilities) -> int:
    """Warps of a block: more where there are few blocks, and no more than have a chunk of columns."""
    layout = cfg.layout
    wanted = 32 * caps.multiprocessors // max(1, layout.blocks)
    most = max(1, layout.padded_k // max(layout.piece, 32))
    warps = _MOST_WARPS
    while warps > 1 and (warps > most or warps > max(2, wanted)):
        warps //= 2
    return warps
