"""The linear kernels of machines with threads for the tuner: plain arithmetic or matrix units, and how their work is cut."""

from __future__ import annotations

from typing import Any, ClassVar

from llmc.caps import Capabilities
from llmc.schedules.gpu import flat, gemm, warpgroup_gemm
from llmc.schedules.gpu.configs import GpuLinearSchedule, Way, shared_limit
from llmc.schedules.gpu.emit import WARP
from llmc.schedules.gpu.gemv import ROWS
from llmc.schedules.gpu.linear import linear, tile_of, warpgroup_tile_of
from llmc.schedules.gpu.many_rows import WARPGROUP_ROWS
from llmc.schedules.gpu.spaces import OneOf, fits_registers
from llmc.schedules.linear import LinearConfig
from llmc.schedules.qlayout import UNIT, WARP_ROWS
from llmc.schedules.tunable import Bucket, Knob, Space, balance
from llmc.schedules.tune_linear import TunableLinear

_FEW_ROWS = 16  # a pass over the weight for every few rows costs more than the matrix units beyond
_TILE_SUMS = 128  # float32 sums of a thread
_BLOCKS = 8  # of a multiprocessor that are worth counting


class TunableGpuLinear(TunableLinear):
    """y = x @ weight.T with its epilogue; which of the matmuls runs is part of the schedule, so thresholds are measured."""

    schedule_type: ClassVar[type] = GpuLinearSchedule
    shared: ClassVar[tuple[str, ...]] = ()

    def samples(self, caps: Capabilities) -> tuple[LinearConfig, ...]:
        # of sizes that every kind of matmul takes
        kinds = [
            LinearConfig(128, 256, t, t, t, activation="silu", gated=True) for t in ("bfloat16", "float32")
        ]
        return tuple(self.task(config) for config in kinds)

    def sampled_buckets(self, task: LinearConfig) -> tuple[Bucket, ...]:
        return (self.buckets(task)[0], self.buckets(task)[-1])

    def space(self, task: LinearConfig, bucket: Bucket, caps: Capabilities) -> Space:
        on_units = gemm.takes(task, caps)
        parts: tuple[Space, ...] = ()
        if not on_units or 0 < bucket.high <= _FEW_ROWS:
            parts += (_threads(task, bucket, caps),)
        if on_units and bucket.high != 1:
            parts += (_units(task, bucket, caps),)
        if on_units and 1 < bucket.high <= flat.MOST_ROWS:
            parts += (_split(task, bucket),)
        if warpgroup_gemm.takes(task, caps) and not 0 < bucket.high < WARPGROUP_ROWS:
            parts += (_warpgroups(caps),)
        return OneOf(GpuLinearSchedule(), (), parts=parts)

    def build(self, config: LinearConfig, caps: Capabilities) -> Any:
        return linear(config, caps)

    def terms(self, task: LinearConfig, schedule: Any, rows: int, caps: Capabilities) -> dict[str, float]:
        outputs = 2 * task.n if task.gated else task.n
        if schedule.way == Way.UNITS:
            tile = tile_of(schedule)
            blocks = -(-rows // tile.rows) * -(-outputs // tile.columns)
            sums = tile.warp_rows * tile.warp_columns / WARP
            return {
                **block_terms(blocks, tile.threads, tile.shared_bytes, sums, caps),
                "units": 1.0,
                "reuse": tile.rows * tile.columns / (tile.rows + tile.columns),
                "warp_reuse": tile.warp_rows * tile.warp_columns / (tile.warp_rows + tile.warp_columns),
                "bytes_ahead": tile.shared_bytes * (tile.stages - 1) / tile.stages,
                "wasted_rows": -(-rows // tile.rows) * tile.rows / rows,
            }
        if schedule.way == Way.SPLIT:
            passes = -(-rows // schedule.tile_rows)
            shared = 4 * schedule.warps * schedule.tile_rows * (WARP_ROWS + 1)
            threads = schedule.warps * WARP
            return {
                **block_terms(
                    -(-outputs // WARP_ROWS) * passes, threads, shared, 3 * schedule.tile_rows, caps
                ),
                "units": 3.0,
                "reuse": float(schedule.tile_rows),
                "bytes_ahead": 64.0 * threads,
                "turns": task.k / (schedule.warps * UNIT),
                "wasted_rows": passes * schedule.tile_rows / rows,
            }
        if schedule.way == Way.WARPGROUPS:
            wide = warpgroup_tile_of(schedule)
            tiles = -(-rows // wide.rows) * -(-outputs // wide.columns)
            return {
                # a block per multiprocessor goes through the tiles
                **block_terms(tiles, wide.threads, wide.shared_bytes, wide.columns / 2, caps),
                "units": 2.0,
                "reuse": wide.rows * wide.columns / (wide.rows + wide.columns),
                "warp_reuse": 64 * wide.columns / (64 + wide.columns),
                "bytes_ahead": float(wide.stage_bytes * (wide.stages - 1)),
                "wasted_rows": -(-rows // wide.rows) * wide.rows / rows,
            }
        shared_rows, warps = max(1, schedule.rows), schedule.warps or 4
        passes = -(-rows // shared_rows)
        blocks = -(-outputs // ROWS) * passes
        return {
            **block_terms(blocks, warps * WARP, 4 * warps * shared_rows * ROWS, shared_rows, caps),
            "units": 0.0,
            "reuse": float(shared_rows),
            "bytes_ahead": 16.0 * (schedule.in_flight or 4) * warps * WARP,
            "turns": task.k / (warps * 32 * (schedule.in_flight or 4)),
            "wasted_rows": passes * shared_rows / rows,
        }


def _threads(task: LinearConfig, bucket: Bucket, caps: Capabilities) -> Space:
    _, steps, _, _ = task.packed_shape(caps)
    most = bucket.high or 8
    rows = tuple(r for r in (1, 2, 4, 8) if r < 2 * most)
    warps = tuple(w for w in (1, 2, 4, 8, 16) if w == 1 or 4 * w <= steps)
    knobs = (Knob("rows", rows), Knob("warps", warps), Knob("in_flight", (1, 2, 4, 8)))
    return Space(GpuLinearSchedule(Way.THREADS, rows[-1], warps[-1], 4), knobs)


def _units(task: LinearConfig, bucket: Bucket, caps: Capabilities) -> Space:
    most = bucket.high or 1 << 20
    rows = tuple(r for r in (16, 32, 64, 128, 256) if r < 2 * most) or (16,)
    knobs = (
        Knob("tile_rows", rows if most > 16 else (16,)),
        Knob("tile_columns", (32, 64, 128, 256)),
        Knob("warp_rows", (16, 32, 64)),
        Knob("warp_columns", (16, 32, 64, 128)),
        Knob("stages", (2, 3, 4, 5, 6, 8)),
    )
    few = gemm.FEW_ROWS
    first = GpuLinearSchedule(
        Way.UNITS, 0, 0, 0, few.rows, few.columns, few.warp_rows, few.warp_columns, few.stages
    )
    return Space(first, knobs, lambda s: tile_fits(s, caps))


def _split(task: LinearConfig, bucket: Bucket) -> Space:
    most = flat.warps_for(task.k)
    rows = Knob("tile_rows", (8, 16) if bucket.high > 8 else (8,))
    warps = Knob("warps", tuple(w for w in (1, 2, 4, 8, 16) if w <= most))
    return Space(GpuLinearSchedule(Way.SPLIT, tile_rows=rows.values[0], warps=most), (rows, warps))


def _warpgroups(caps: Capabilities) -> Space:
    knobs = (
        Knob("tile_columns", (64, 128, 192, 256)),
        Knob("stages", (4, 5, 6, 7, 8)),
        Knob("warpgroups", (1, 2)),
    )

    def valid(schedule: GpuLinearSchedule) -> bool:
        try:
            return warpgroup_tile_of(schedule).shared_bytes <= caps.shared_bytes
        except ValueError:
            return False

    usual = warpgroup_gemm.NARROW
    first = GpuLinearSchedule(
        Way.WARPGROUPS, tile_columns=usual.columns, stages=usual.stages, warpgroups=usual.warpgroups
    )
    return Space(first, knobs, valid)


def tile_fits(schedule: GpuLinearSchedule, caps: Capabilities) -> bool:
    """Whether a tile can be cut so, and has the shared memory and registers that it needs."""
    try:
        tile = tile_of(schedule)
    except ValueError:
        return False
    sums = tile.warp_rows * tile.warp_columns // WARP
    return (
        sums <= _TILE_SUMS and tile.shared_bytes <= shared_limit(caps) and fits_registers(sums, tile.threads)
    )


def block_terms(
    blocks: float, threads: int, shared: float, sums: float, caps: Capabilities
) -> dict[str, float]:
    """What the cost model learns of a launch: how it fills the machine."""
    by_shared = caps.shared_bytes // max(shared, 1)
    by_registers = 65536 // (threads * (sums + 40))
    resident = max(1.0, min(by_shared, by_registers, 2048 // threads, _BLOCKS))
    return {
        "blocks": blocks / caps.multiprocessors,
        "balance": balance(blocks, caps.multiprocessors),
        "waves": blocks / (caps.multiprocessors * resident),
        "warps_resident": resident * threads / WARP,
        "threads": float(threads),
        "shared": float(shared),
        "sums": float(sums),
    }
