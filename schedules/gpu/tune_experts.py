"""Linear layers of a mixture of experts on machines with threads, for the tuner: how many rows of an expert go together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from llmc.caps import Capabilities
from llmc.schedules.choice import ByRows
from llmc.schedules.experts import ExpertConfig
from llmc.schedules.gpu import qgemm, warpgroup_gemm
from llmc.schedules.gpu.configs import GpuExpertSchedule, Way, shared_limit
from llmc.schedules.gpu.emit import WARP
from llmc.schedules.gpu.experts import Dense, expert_linear, tile_of
from llmc.schedules.gpu.spaces import OneOf, fits_registers
from llmc.schedules.gpu.tune_linear import block_terms
from llmc.schedules.qlayout import UNIT, WARP_ROWS
from llmc.schedules.tunable import Arguments, Bucket, Knob, Space, Tunable
from llmc.schedules.tune_data import Array
from llmc.schedules.tune_experts import ExpertKernel, TunableExperts, active_experts

_SUMS_PER_TILE = 16 * WARP_ROWS // WARP  # float32 of a thread per tile of 16 rows


class TunableGpuExperts(TunableExperts):
    """y[r] = x[r] @ weight[ids[r]].T, rows sorted beforehand; weights in their own dtype."""

    schedule_type: ClassVar[type] = GpuExpertSchedule
    shared: ClassVar[tuple[str, ...]] = ()

    def samples(self, caps: Capabilities) -> tuple[ExpertConfig, ...]:
        return tuple(
            self.task(ExpertConfig(2, 128, 128, dtype, dtype, dtype)) for dtype in ("bfloat16", "float32")
        )

    def space(self, task: ExpertConfig, bucket: Bucket, caps: Capabilities) -> Space:
        on_units, most = qgemm.fits(Dense(task).plain, caps), bucket.high or 1 << 20
        warps = Knob("warps", tuple(w for w in (1, 2, 4, 8, 16) if w == 1 or w * UNIT <= task.k))
        parts: tuple[Space, ...] = ()
        if not on_units or most <= task.experts:
            rows = tuple(r for r in (1, 2, 4, 8) if r < 2 * most)
            first = GpuExpertSchedule(Way.THREADS, rows=rows[-1], warps=warps.values[0])
            parts += (Space(first, (Knob("rows", rows), warps), lambda s: _fits(s, caps)),)
        if on_units:
            tiles = tuple(t for t in (0, 1, 2, 3, 4, 6, 8) if t < 2 or 16 * (t - 1) < most)
            first = GpuExpertSchedule(Way.UNITS, tiles=1, warps=warps.values[0])
            parts += (Space(first, (Knob("tiles", tiles), warps), lambda s: _fits(s, caps)),)
        # below, not even one expert can fill a quarter of a tile
        if warpgroup_gemm.takes(task, caps) and not 0 < bucket.high < wide_rows():
            parts += (_warpgroups(caps),)
        return OneOf(GpuExpertSchedule(), (), parts=parts)

    def schedules_of(self, config: Any) -> ByRows[Any]:
        return config.schedule if isinstance(config, ExpertKernel) else ByRows((GpuExpertSchedule(),))

    def build(self, config: ExpertKernel, caps: Capabilities) -> Any:
        return expert_linear(config, caps)

    def candidate(self, task: Any, schedule: Any, bucket: Bucket | None, caps: Capabilities) -> Any:
        return Tunable.candidate(self, task, schedule, bucket, caps)

    def arguments(
        self,
        task: ExpertConfig,
        schedule: Any,
        case: dict[str, Array],
        caps: Capabilities,
        packed: Array | None = None,
    ) -> Arguments:
        made = super().arguments(task, schedule, case, caps, packed)

        def plan(ids: Array) -> Array:
            begin = np.cumsum(np.bincount(ids, minlength=task.experts))
            return np.concatenate([[0], begin, np.argsort(ids, kind="stable")]).astype(np.int32)

        others = {i: tuple(map(plan, sets)) for i, sets in made.others.items()}
        return replace(made, values=(made.values[0], plan(case["ids"]), *made.values[2:]), others=others)

    def terms(self, task: ExpertConfig, schedule: Any, rows: int, caps: Capabilities) -> dict[str, float]:
        active = active_experts(task.experts, rows)
        each = rows / active
        if schedule.way == Way.WARPGROUPS:
            tile = tile_of(schedule)
            per_tile, columns, threads = tile.rows, tile.columns, tile.threads
            shared, sums = float(tile.shared_bytes), tile.columns / 2
        else:
            cut = schedule
            if schedule.way == Way.UNTUNED:
                cut = GpuExpertSchedule(Way.UNITS, tiles=1 if each <= 16 else 4, warps=4)
            per_tile, columns, threads = _rows(cut), WARP_ROWS, cut.warps * WARP
            shared, sums = float(_shared(cut)), float(_sums(cut))
        passes = active * -(-each // per_tile)
        return {
            **block_terms(passes * -(-task.n // columns), threads, shared, sums, caps),
            "units": float(schedule.way),
            "rows_per_expert": each,
            "passes": passes / active,
            "wasted_rows": passes * per_tile / rows,
            "columns_per_warp": task.k / (threads / WARP),
        }


def wide_rows() -> int:
    """Rows of a tile on warpgroups, a quarter of them."""
    return warpgroup_gemm.NARROW.rows // 4


def _warpgroups(caps: Capabilities) -> Space:
    knobs = (Knob("tile_columns", (64, 128, 192, 256)), Knob("stages", (4, 5, 6, 7, 8)))

    def valid(schedule: GpuExpertSchedule) -> bool:
        return tile_of(schedule).shared_bytes <= caps.shared_bytes

    usual = warpgroup_gemm.NARROW
    first = GpuExpertSchedule(Way.WARPGROUPS, tile_columns=usual.columns, stages=usual.stages)
    return Space(first, knobs, valid)


def _rows(schedule: GpuExpertSchedule) -> int:
    return qgemm.rows_of(schedule.tiles) if schedule.way == Way.UNITS else schedule.rows


def _shared(schedule: GpuExpertSchedule) -> int:
    """Bytes of shared memory: the warps' sums."""
    return 4 * schedule.warps * _rows(schedule) * (WARP_ROWS + 1)


def _sums(schedule: GpuExpertSchedule) -> int:
    return _SUMS_PER_TILE * max(1, schedule.tiles) if schedule.way == Way.UNITS else 3 * schedule.rows


def _fits(schedule: GpuExpertSchedule, caps: Capabilities) -> bool:
    return _shared(schedule) <= shared_limit(caps) and fits_registers(_sums(schedule), schedule.warps * WARP)
