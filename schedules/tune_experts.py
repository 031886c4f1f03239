"""The expert kernel for the tuner: rows are tokens times experts per token."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows, Scheduled, segments
from llmc.schedules.experts import ExpertConfig, expert_linear
from llmc.schedules.layout import BlockedLayout, linear_layout, usual_vectors
from llmc.schedules.tile_experts import expert_tiles_from, tile_expert_linear
from llmc.schedules.tunable import BUCKETS, Bucket, Knob, Space, Work
from llmc.schedules.tune_data import ITEM_BYTES, Array, multiply, random_array
from llmc.schedules.tune_weights import (
    TunableWeight,
    register_terms,
    register_tile_fits,
    rows_bytes,
    task_terms,
    too_wide,
    usual_tile,
    vector_counts,
)

_ONE_TOKEN = 8  # up to so many rows are taken for one token's, whose experts are all different
_SETS = 15  # of experts that calls take in turn


@dataclass(frozen=True)
class ExpertSchedule:
    """How the expert kernel goes through its loops; fields as in LinearSchedule."""

    vectors: int = 0
    rows_tile: int = 0
    unroll: int = 0
    prefetch: int = 2304
    by_expert: bool = False


class ExpertKernel(Scheduled):
    """An ExpertConfig and its schedules by rows."""

    __slots__ = ()

    def configs(self, caps: Capabilities) -> list[ExpertConfig]:
        """The config of each schedule."""
        out = []
        for choice in self.schedule.choices:
            fields = {name: value for name, value in vars(choice).items() if name != "vectors"}
            out.append(replace(self.config, layout=_layout(self.config, choice, caps), **fields))
        return out


def _layout(config: ExpertConfig, schedule: ExpertSchedule, caps: Capabilities) -> BlockedLayout:
    """The layout that is given, or the schedule's."""
    return config.layout or linear_layout(config.weight_dtype, caps, schedule.vectors)


def expert_linear_by_rows(kernel: ExpertKernel, caps: Capabilities) -> Any:
    """expert_linear's PrimFunc, with a schedule for each range of N."""
    configs = dict(zip(kernel.schedule.choices, kernel.configs(caps), strict=True))
    parts = segments(kernel.schedule, lambda _: expert_tiles_from(kernel.config, caps))
    builders = [
        partial(tile_expert_linear if part.tiled else expert_linear, configs[part.choice], caps)
        for part in parts
    ]
    return e.merged("N", [part.most for part in parts[:-1]], builders)


class TunableExperts(TunableWeight):
    """y[r] = x[r] @ weight[ids[r]].T, weights in their own dtype."""

    name = "experts"
    config_type = ExpertConfig
    schedule_type: ClassVar[type] = ExpertSchedule
    shared: ClassVar[tuple[str, ...]] = ("vectors",)

    def task(self, config: ExpertConfig) -> ExpertConfig:
        plain = {name: value for name, value in vars(ExpertSchedule()).items() if name != "vectors"}
        return replace(config, **plain)

    def parsed(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "layout": BlockedLayout(**values["layout"]) if values.get("layout") else None}

    def samples(self, caps: Capabilities) -> tuple[ExpertConfig, ...]:
        return (self.task(ExpertConfig(2, 128, 128, "bfloat16", "bfloat16", "bfloat16")),)

    def buckets(self, task: ExpertConfig) -> tuple[Bucket, ...]:
        return BUCKETS

    def space(self, task: ExpertConfig, bucket: Bucket, caps: Capabilities) -> Space:
        def valid(schedule: ExpertSchedule) -> bool:
            vectors, tile = schedule.vectors or usual_vectors(caps), schedule.rows_tile
            if too_wide(vectors, task.n, caps) or tile == usual_tile(vectors, caps):
                return False
            return not tile or register_tile_fits(tile, vectors, caps)

        knobs = (
            Knob("vectors", (0,) if task.layout else vector_counts(caps)),
            Knob("rows_tile", (0, 1, 2, 3, 4, 5, 6, 8, 12) if bucket.high != 1 else (0,)),
            Knob("unroll", (0, 2, 4, 8)),
            Knob("prefetch", (0, 512, 1024, 2304, 4096, 8192)),
            Knob("by_expert", (False, True)),
        )
        return Space(self.default(task, caps), knobs, valid)

    def scheduled(self, config: ExpertConfig, schedule: ByRows[Any]) -> ExpertKernel:
        return ExpertKernel(config, schedule)

    def schedules_of(self, config: Any) -> ByRows[Any]:
        if isinstance(config, ExpertKernel):
            return config.schedule
        own = {f.name: getattr(config, f.name) for f in fields(ExpertSchedule) if f.name != "vectors"}
        return ByRows((ExpertSchedule(**own),))

    def build(self, config: ExpertKernel, caps: Capabilities) -> Any:
        return expert_linear_by_rows(config, caps)

    def candidate(self, task: Any, schedule: Any, bucket: Bucket | None, caps: Capabilities) -> Any:
        # how many rows an expert gets is known at run time only, so a bucket makes the kernel no smaller
        return super().candidate(task, schedule, None, caps)

    def weights(self, task: ExpertConfig, rng: np.random.Generator) -> dict[str, Array]:
        made = {"weight": random_array(rng, (task.experts, task.n, task.k), task.weight_dtype)}
        if task.has_bias:
            made["bias"] = random_array(rng, (task.experts, task.n), task.in_dtype)
        return made

    def inputs(self, task: ExpertConfig, rows: int, rng: np.random.Generator) -> dict[str, Array]:
        x = random_array(rng, (rows, task.k), task.in_dtype)
        return {"x": x, **expert_ids(task.experts, rows, task.ids_dtype, rng)}

    def pack(
        self, task: ExpertConfig, schedule: ExpertSchedule, weights: dict[str, Array], caps: Capabilities
    ) -> Array:
        return _layout(task, schedule, caps).pack(weights["weight"])

    def reference(self, task: ExpertConfig, case: dict[str, Array]) -> Array:
        out = np.empty((case["x"].shape[0], task.n), np.float32)
        for expert in np.unique(case["ids"]):
            rows = case["ids"] == expert
            out[rows] = multiply(case["x"][rows], case["weight"][expert])
            if "bias" in case:
                out[rows] += case["bias"][expert].astype(np.float32)
        return out

    def work(self, task: ExpertConfig, rows: int) -> Work:
        read = active_experts(task.experts, rows) * task.n * task.k * ITEM_BYTES[task.weight_dtype]
        return Work(read + rows_bytes(task, rows, task.k), 2.0 * rows * task.n * task.k, task.weight_dtype)

    def terms(
        self, task: ExpertConfig, schedule: ExpertSchedule, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        layout = _layout(task, schedule, caps)
        vectors = layout.n_block // caps.lanes_f32
        active = active_experts(task.experts, rows)
        tile = min(schedule.rows_tile or usual_tile(vectors, caps), max(1, round(rows / active)))
        blocks = -(-task.n // layout.n_block)
        return {
            **register_terms(tile, vectors, caps),
            **task_terms(blocks * active, caps),
            "rows_per_expert": rows / active,
            "padding": blocks * layout.n_block / task.n,
            "steps_ahead": schedule.prefetch / (layout.n_block * ITEM_BYTES[task.weight_dtype]),
            "uneven": active % caps.threads / active if schedule.by_expert else 0.0,
        }


def active_experts(experts: int, rows: int) -> float:
    """How many experts some row goes to, if all are equally likely."""
    if rows <= _ONE_TOKEN:
        return float(min(rows, experts))
    return float(experts * (1 - (1 - 1 / experts) ** rows))


def expert_ids(experts: int, rows: int, dtype: str, rng: np.random.Generator) -> dict[str, Array]:
    """Which experts rows go to: ids [rows], and other_ids [sets, rows] for the calls that follow the first one.

    One token's experts are a small part of the weight, which a cache would hold from one call to the next. The number of
    sets is odd: two kernels that are called in turns get all of them.
    """
    sets = min(_SETS, int(experts / active_experts(experts, rows))) // 2 * 2 + 1
    if rows <= min(_ONE_TOKEN, experts):
        order = rng.permutation(experts)
        made = np.stack([np.roll(order, -i * rows)[:rows] for i in range(sets)])
    else:
        made = rng.integers(0, experts, (sets, rows))
    made = made.astype(dtype)
    return {"ids": made[0], "other_ids": made[1:]}
