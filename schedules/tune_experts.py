"""The expert kernel for the tuner: rows are tokens times experts per token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows, segments
from llmc.schedules.experts import ExpertConfig, expert_linear
from llmc.schedules.layout import BlockedLayout, linear_layout, usual_vectors
from llmc.schedules.tile_experts import expert_tiles_from, tile_expert_linear
from llmc.schedules.tunable import (
    BUCKETS,
    ITEM_BYTES,
    Arguments,
    Array,
    Bucket,
    Knob,
    Space,
    Tunable,
    Work,
    balance,
    empty_result,
    multiply,
    random_array,
)


@dataclass(frozen=True)
class ExpertSchedule:
    """How the expert kernel goes through its loops; fields as in LinearSchedule."""

    vectors: int = 0
    rows_tile: int = 0
    unroll: int = 0
    prefetch: int = 2304


class ExpertKernel(NamedTuple):
    """A kernel with schedules by rows: its config, whose own schedule fields do not count, and the schedules."""

    config: ExpertConfig
    schedule: ByRows[ExpertSchedule]

    def configs(self, caps: Capabilities) -> list[ExpertConfig]:
        """The config of each schedule."""
        out = []
        for choice in self.schedule.choices:
            layout = _layout(self.config, choice, caps)
            fields: dict[str, Any] = dict(
                rows_tile=choice.rows_tile, unroll=choice.unroll, prefetch=choice.prefetch
            )
            out.append(replace(self.config, layout=layout, **fields))
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


class TunableExperts(Tunable):
    """y[r] = x[r] @ weight[ids[r]].T, weights in their own dtype."""

    name = "experts"
    config_type = ExpertConfig
    schedule_type: ClassVar[type] = ExpertSchedule
    shared: ClassVar[tuple[str, ...]] = ("vectors",)

    def task(self, config: ExpertConfig) -> ExpertConfig:
        plain = ExpertSchedule()
        return replace(config, rows_tile=plain.rows_tile, unroll=plain.unroll, prefetch=plain.prefetch)

    def parsed(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "layout": BlockedLayout(**values["layout"]) if values.get("layout") else None}

    def samples(self, caps: Capabilities) -> tuple[ExpertConfig, ...]:
        return (self.task(ExpertConfig(2, 128, 128, "bfloat16", "bfloat16", "bfloat16")),)

    def buckets(self, task: ExpertConfig) -> tuple[Bucket, ...]:
        return BUCKETS

    def space(self, task: ExpertConfig, bucket: Bucket, caps: Capabilities) -> Space:
        registers, usual = caps.vector_registers, usual_vectors(caps)

        def valid(schedule: ExpertSchedule) -> bool:
            vectors, tile = schedule.vectors or usual, schedule.rows_tile
            auto = min(6, (registers - vectors - 2) // vectors)
            too_wide = vectors * caps.lanes_f32 > max(task.n, usual * caps.lanes_f32)
            return not (too_wide or tile == auto or (tile and tile * vectors + vectors + 1 > registers))

        knobs = (
            Knob("vectors", (0,) if task.layout else (1, 2, 0, 6, 8) if usual == 4 else (1, 0, 3, 4)),
            Knob("rows_tile", (0, 1, 2, 3, 4, 5, 6, 8, 12) if bucket.high != 1 else (0,)),
            Knob("unroll", (0, 2, 4, 8)),
            Knob("prefetch", (0, 512, 1024, 2304, 4096, 8192)),
        )
        return Space(self.default(task, caps), knobs, valid)

    def scheduled(self, config: ExpertConfig, schedule: ByRows[Any]) -> ExpertKernel:
        return ExpertKernel(config, schedule)

    def schedules_of(self, config: Any) -> ByRows[Any]:
        if isinstance(config, ExpertKernel):
            return config.schedule
        return ByRows((ExpertSchedule(0, config.rows_tile, config.unroll, config.prefetch),))

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
        ids = rng.integers(0, task.experts, rows).astype(task.ids_dtype)
        return {"x": random_array(rng, (rows, task.k), task.in_dtype), "ids": ids}

    def pack(
        self, task: ExpertConfig, schedule: ExpertSchedule, weights: dict[str, Array], caps: Capabilities
    ) -> Array:
        return _layout(task, schedule, caps).pack(weights["weight"])

    def arguments(
        self,
        task: ExpertConfig,
        schedule: ExpertSchedule,
        case: dict[str, Array],
        caps: Capabilities,
        packed: Array | None = None,
    ) -> Arguments:
        packed = self.pack(task, schedule, case, caps) if packed is None else packed
        y = empty_result((case["x"].shape[0], task.n), task.out_dtype)
        extra = [case["bias"]] if "bias" in case else []
        values = (case["x"], case["ids"], packed, *extra, y)
        return Arguments(values, (2,), len(values) - 1)

    def reference(self, task: ExpertConfig, case: dict[str, Array]) -> Array:
        out = np.empty((case["x"].shape[0], task.n), np.float32)
        for expert in np.unique(case["ids"]):
            rows = case["ids"] == expert
            out[rows] = multiply(case["x"][rows], case["weight"][expert])
            if "bias" in case:
                out[rows] += case["bias"][expert].astype(np.float32)
        return out

    def work(self, task: ExpertConfig, rows: int) -> Work:
        # experts that some row goes to, if all are equally likely
        active = task.experts * (1 - (1 - 1 / task.experts) ** rows)
        moved = active * task.n * task.k * ITEM_BYTES[task.weight_dtype]
        moved += rows * (task.k * ITEM_BYTES[task.in_dtype] + task.n * ITEM_BYTES[task.out_dtype])
        return Work(moved, 2.0 * rows * task.n * task.k, task.weight_dtype)

    def terms(
        self, task: ExpertConfig, schedule: ExpertSchedule, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        layout = _layout(task, schedule, caps)
        vectors = layout.n_block // caps.lanes_f32
        auto = max(1, min(6, (caps.vector_registers - vectors - 2) // vectors))
        active = task.experts * (1 - (1 - 1 / task.experts) ** rows)
        tile = min(schedule.rows_tile or auto, max(1, round(rows / active)))
        tasks = -(-task.n // layout.n_block) * active
        return {
            "rows_per_expert": rows / active,
            "tasks": tasks / caps.threads,
            "balance": balance(tasks, caps.threads),
            "registers": (tile * vectors + vectors + 1) / caps.vector_registers,
            "updates_per_load": tile * vectors / (tile + vectors),
            "padding": -(-task.n // layout.n_block) * layout.n_block / task.n,
            "steps_ahead": schedule.prefetch / (layout.n_block * ITEM_BYTES[task.weight_dtype]),
        }
