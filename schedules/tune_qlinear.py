"""The linear kernels on quantized weights for the tuner."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows, Scheduled, Segment, segments
from llmc.schedules.ilinear import int_linear
from llmc.schedules.qlayout import in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig, quant_linear
from llmc.schedules.tile_ilinear import tile_int_linear
from llmc.schedules.tile_qlinear import quant_tiles_from, tile_quant_linear
from llmc.schedules.tunable import BUCKETS, Bucket, Knob, Space, Work
from llmc.schedules.tune_data import (
    Array,
    multiply_quantized,
    quantized_of,
    random_array,
    random_quantized,
    rows_for,
)
from llmc.schedules.tune_linear import finish
from llmc.schedules.tune_quantized import (
    INT_PREFETCHES,
    INT_SCHEMES,
    ROWS_PER_TASK,
    TunableQuantized,
)
from llmc.schedules.tune_tiles import with_tiles
from llmc.schedules.tune_weights import rows_bytes, task_terms


@dataclass(frozen=True)
class QuantLinearSchedule:
    """Fields of QuantLinearConfig that may differ by the number of rows; see there."""

    t_block: int = 240
    prefetch: int = 2304
    tiles_from: int = 17
    tile_rows: int = 0
    tile_columns: int = 0
    tile_blocks: int = 0
    tile_unroll: int = 2
    tile_prefetch: bool = True
    tile_wide: bool = False


@dataclass(frozen=True)
class IntLinearSchedule(QuantLinearSchedule):
    """The same for kernels with integer products, which leave prefetching to the machine: docs/design/008."""

    prefetch: int = 0


class QuantKernel(Scheduled):
    """A QuantLinearConfig and its schedules by rows."""

    __slots__ = ()


def quant_linear_by_rows(kernel: QuantKernel | QuantLinearConfig, caps: Capabilities) -> Any:
    """quant_linear's PrimFunc (or int_linear's), with a schedule for each range of T."""
    if isinstance(kernel, QuantLinearConfig):
        kernel = QuantKernel(kernel, ByRows((_schedule_of(kernel, QuantLinearSchedule),)))
    parts = segments(kernel.schedule, partial(quant_tiles_from, kernel.config, caps))
    kernels = [partial(_one, replace(kernel.config, **vars(part.choice)), caps, part) for part in parts]
    return e.merged("T", [part.most for part in parts[:-1]], kernels)


def _one(config: QuantLinearConfig, caps: Capabilities, part: Segment[QuantLinearSchedule]) -> Any:
    if part.tiled:
        build = tile_int_linear if config.layout.quads else tile_quant_linear
        return build(config, caps, part.least, part.most)
    return (int_linear if config.layout.quads else quant_linear)(config, caps)


def _schedule_of(config: QuantLinearConfig, kind: type[QuantLinearSchedule]) -> QuantLinearSchedule:
    """The fields of a config that are a schedule."""
    return kind(**{f.name: getattr(config, f.name) for f in fields(QuantLinearSchedule)})


class TunableQuantLinear(TunableQuantized):
    """y = x @ dequantize(weight).T with its epilogue."""

    name = "quant_linear"
    config_type = QuantLinearConfig
    schedule_type: ClassVar[type] = QuantLinearSchedule

    def samples(self, caps: Capabilities) -> tuple[QuantLinearConfig, ...]:
        made = []
        for scheme in self.sampled_schemes():
            layout = quant_layout(scheme, 128, 512, caps)
            made.append(QuantLinearConfig(128, layout, "bfloat16", "bfloat16", has_residual=True))
        return tuple(self.task(config) for config in made)

    def task(self, config: QuantLinearConfig) -> QuantLinearConfig:
        return replace(config, lead=0, **vars(self.schedule_type()))

    def buckets(self, task: QuantLinearConfig) -> tuple[Bucket, ...]:
        return BUCKETS

    def space(self, task: QuantLinearConfig, bucket: Bucket, caps: Capabilities) -> Space:
        large = not bucket.high or bucket.high > 16
        knobs = (
            Knob("t_block", ROWS_PER_TASK if large else (240,)),
            Knob("prefetch", self.prefetches),
        )
        space = Space(self.default(task, caps), knobs)
        if not quant_tiles_from(task, caps, space.default):
            return space
        return with_tiles(space, bucket, task.layout.k)

    def scheduled(self, config: QuantLinearConfig, schedule: ByRows[Any]) -> QuantKernel:
        return QuantKernel(config, schedule)

    def schedules_of(self, config: Any) -> ByRows[Any]:
        if isinstance(config, QuantKernel):
            return config.schedule
        return ByRows((_schedule_of(config, self.schedule_type),))

    def build(self, config: QuantKernel, caps: Capabilities) -> Any:
        return quant_linear_by_rows(config, caps)

    def weights(self, task: QuantLinearConfig, rng: np.random.Generator) -> dict[str, Array]:
        held = 2 * task.n if task.gated else task.n
        made = random_quantized(rng, task.layout, held)
        if task.has_bias:
            made["bias"] = random_array(rng, (held,), task.in_dtype)
        return made

    def inputs(self, task: QuantLinearConfig, rows: int, rng: np.random.Generator) -> dict[str, Array]:
        made = {"x": rows_for(rng, rows, task.layout, task.in_dtype)}
        if task.has_residual:
            made["residual"] = random_array(rng, (rows, task.n), task.in_dtype)
        return made

    def pack(
        self, task: QuantLinearConfig, schedule: Any, weights: dict[str, Array], caps: Capabilities
    ) -> Array:
        weight = quantized_of(task.layout, weights)
        return task.layout.pack(in_turns(weight, task.layout.n_block) if task.gated else weight)

    def reference(self, task: QuantLinearConfig, case: dict[str, Array]) -> Array:
        return finish(task, multiply_quantized(case["x"], quantized_of(task.layout, case)), case)

    def work(self, task: QuantLinearConfig, rows: int) -> Work:
        moved = task.layout.size + rows_bytes(task, rows, task.layout.k)
        held = 2 * task.n if task.gated else task.n
        return Work(moved, 2.0 * rows * held * task.layout.k, self.multiplied(task))

    def terms(
        self, task: QuantLinearConfig, schedule: QuantLinearSchedule, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        rows_of_task = min(schedule.t_block, rows)
        return {
            **task_terms(task.layout.blocks * -(-rows // rows_of_task), caps),
            "bits": float(task.layout.of.bits),
            "partial": float(rows_of_task * task.layout.n_block * 4),
            "groups_ahead": schedule.prefetch / task.layout.group_bytes,
            "tiled": float(0 < quant_tiles_from(task, caps, schedule) <= rows),
        }


class TunableIntLinear(TunableQuantLinear):
    """y = round(x) @ dequantize(weight).T with its epilogue: rows of x are rounded to int8 on the way."""

    name = "int_linear"
    schedule_type: ClassVar[type] = IntLinearSchedule
    integer = True
    schemes = INT_SCHEMES
    prefetches = INT_PREFETCHES
