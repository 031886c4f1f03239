"""The kernels with quantized weights of machines with threads for the tuner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from llmc.caps import Capabilities
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu import qgemm, warpgroup_qgemm
from llmc.schedules.gpu.configs import GpuQuantSchedule, Way, shared_limit
from llmc.schedules.gpu.emit import WARP
from llmc.schedules.gpu.many_rows import WARPGROUP_ROWS
from llmc.schedules.gpu.qlinear import quant_linear, takes_warpgroups, units_of
from llmc.schedules.gpu.spaces import OneOf, fits_registers
from llmc.schedules.gpu.tune_linear import block_terms
from llmc.schedules.qlayout import WARP_ROWS
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tunable import Bucket, Knob, Space, Tunable
from llmc.schedules.tune_qlinear import (
    IntLinearSchedule,
    QuantKernel,
    QuantLinearSchedule,
    TunableIntLinear,
    TunableQuantLinear,
)

_FEW_ROWS = 16
_SUMS_PER_TILE = (
    16 * WARP_ROWS // WARP
)  # float32 of a thread per tile of 16 rows, and as many of a group's part


class TunableGpuQuantLinear(TunableQuantLinear):
    """y = x @ dequantize(weight).T with its epilogue."""

    schedule_type: ClassVar[type] = GpuQuantSchedule
    schemes: ClassVar[tuple[str, ...]] = ("q8", "q4g32")
    # what the config's own schedule fields, which are the cpu's, are set to
    plain: ClassVar[QuantLinearSchedule] = QuantLinearSchedule()

    def task(self, config: QuantLinearConfig) -> QuantLinearConfig:
        return replace(config, lead=0, **vars(self.plain))

    def sampled_buckets(self, task: QuantLinearConfig) -> tuple[Bucket, ...]:
        return (self.buckets(task)[0], self.buckets(task)[-1])

    def space(self, task: QuantLinearConfig, bucket: Bucket, caps: Capabilities) -> Space:
        return _space(task, bucket, caps)

    def schedules_of(self, config: Any) -> ByRows[Any]:
        return config.schedule if isinstance(config, QuantKernel) else ByRows((GpuQuantSchedule(),))

    def build(self, config: Any, caps: Capabilities) -> Any:
        return quant_linear(config, caps)

    def candidate(self, task: Any, schedule: Any, bucket: Bucket | None, caps: Capabilities) -> Any:
        return Tunable.candidate(self, task, schedule, bucket, caps)

    def terms(
        self, task: QuantLinearConfig, schedule: Any, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        return _terms(task, schedule, rows, caps)


class TunableGpuIntLinear(TunableIntLinear):
    """y = round(x) @ dequantize(weight).T with its epilogue."""

    schedule_type: ClassVar[type] = GpuQuantSchedule
    plain: ClassVar[QuantLinearSchedule] = IntLinearSchedule()

    task = TunableGpuQuantLinear.task
    sampled_buckets = TunableGpuQuantLinear.sampled_buckets
    space = TunableGpuQuantLinear.space
    schedules_of = TunableGpuQuantLinear.schedules_of
    build = TunableGpuQuantLinear.build
    candidate = TunableGpuQuantLinear.candidate
    terms = TunableGpuQuantLinear.terms


def _space(task: QuantLinearConfig, bucket: Bucket, caps: Capabilities) -> Space:
    layout, most = task.layout, bucket.high or 1 << 20
    has_units = units_of(task, caps) is not None
    columns = max(1, layout.padded_k // max(layout.piece, 32))
    warps = Knob("warps", tuple(w for w in (1, 2, 4, 8, 16) if w <= columns))
    parts: tuple[Space, ...] = ()
    if not has_units or most <= _FEW_ROWS // 4:
        rows = tuple(r for r in (1, 2, 4, 8) if r < 2 * most)
        first = GpuQuantSchedule(Way.THREADS, rows=rows[-1], warps=warps.values[0])
        parts += (Space(first, (Knob("rows", rows), warps), lambda s: _fits(s, caps)),)
    if has_units:
        tiles = tuple(t for t in (0, 1, 2, 3, 4, 6, 8) if t < 2 or 16 * (t - 1) < most)
        first = GpuQuantSchedule(Way.UNITS, tiles=1, warps=warps.values[0])
        parts += (Space(first, (Knob("tiles", tiles), warps), lambda s: _fits(s, caps)),)
    if takes_warpgroups(task, caps) and not 0 < bucket.high < WARPGROUP_ROWS:
        parts += (Space(GpuQuantSchedule(Way.WARPGROUPS), ()),)
    return OneOf(GpuQuantSchedule(), (), parts=parts)


def _shared(schedule: GpuQuantSchedule) -> int:
    """Bytes of shared memory: the warps' sums."""
    rows = qgemm.rows_of(schedule.tiles) if schedule.way == Way.UNITS else schedule.rows
    return 4 * schedule.warps * rows * (WARP_ROWS + 1)


def _fits(schedule: GpuQuantSchedule, caps: Capabilities) -> bool:
    sums = 2 * _SUMS_PER_TILE * max(1, schedule.tiles) if schedule.way == Way.UNITS else 3 * schedule.rows
    return _shared(schedule) <= shared_limit(caps) and fits_registers(sums, schedule.warps * WARP)


def _terms(task: QuantLinearConfig, schedule: Any, rows: int, caps: Capabilities) -> dict[str, float]:
    if schedule.way == Way.WARPGROUPS:
        tile = warpgroup_qgemm.TILE
        outputs = task.layout.blocks * WARP_ROWS
        passes = -(-rows // tile.rows)
        return {
            **block_terms(
                passes * -(-outputs // tile.columns), tile.threads, tile.shared_bytes, tile.columns / 2, caps
            ),
            "bits": float(task.layout.of.bits),
            "units": 2.0,
            "passes": float(passes),
            "wasted_rows": passes * tile.rows / rows,
        }
    untuned = schedule.way == Way.UNTUNED
    tiles = 0 if rows <= qgemm.ROWS else 1 if rows <= _FEW_ROWS else 4
    cut = GpuQuantSchedule(Way.UNITS, 0, tiles, 4) if untuned else schedule
    on_units = cut.way == Way.UNITS
    per_block = qgemm.rows_of(cut.tiles) if on_units else cut.rows
    passes = -(-rows // per_block)
    sums = 2 * _SUMS_PER_TILE * max(1, cut.tiles) if on_units else 3 * cut.rows
    return {
        **block_terms(task.layout.blocks * passes, cut.warps * WARP, _shared(cut), sums, caps),
        "bits": float(task.layout.of.bits),
        "units": float(on_units),
        "passes": float(passes),
        "columns_per_warp": task.layout.padded_k / cut.warps,
        "wasted_rows": passes * per_block / rows,
    }
