"""The expert kernels on quantized weights for the tuner, integer arithmetic or not."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows, Scheduled
from llmc.schedules.iexperts import int_expert_linear
from llmc.schedules.qexperts import QuantExpertConfig, quant_expert_linear
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.tunable import BUCKETS, Bucket, Knob, Space, Work
from llmc.schedules.tune_data import (
    Array,
    multiply_quantized,
    quantized_of,
    random_array,
    random_quantized,
    rows_for,
)
from llmc.schedules.tune_experts import active_experts, expert_ids
from llmc.schedules.tune_quantized import INT_PREFETCHES, INT_SCHEMES, ROWS_PER_TASK, TunableQuantized
from llmc.schedules.tune_weights import rows_bytes, task_terms


@dataclass(frozen=True)
class QuantExpertSchedule:
    """Fields of QuantExpertConfig that may differ by the number of rows; see there."""

    t_block: int = 240
    prefetch: int = 2304
    by_expert: bool = False


@dataclass(frozen=True)
class IntExpertSchedule(QuantExpertSchedule):
    """The same for kernels with integer products, which leave prefetching to the machine: docs/design/008."""

    prefetch: int = 0


class QuantExpertKernel(Scheduled):
    """A QuantExpertConfig, whose own schedule fields do not count, and its schedules by rows."""

    __slots__ = ()


def quant_expert_linear_by_rows(kernel: QuantExpertKernel | QuantExpertConfig, caps: Capabilities) -> Any:
    """quant_expert_linear's PrimFunc (or int_expert_linear's), with a schedule for each range of N."""
    config = kernel if isinstance(kernel, QuantExpertConfig) else kernel.config
    build = int_expert_linear if config.layout.quads else quant_expert_linear
    if isinstance(kernel, QuantExpertConfig):
        return build(kernel, caps)
    builders = [partial(build, replace(config, **vars(c)), caps) for c in kernel.schedule.choices]
    return e.merged("N", kernel.schedule.limits, builders)


class TunableQuantExperts(TunableQuantized):
    """y[r] = x[r] @ dequantize(weight[ids[r]]).T."""

    name = "quant_experts"
    config_type = QuantExpertConfig
    schedule_type: ClassVar[type] = QuantExpertSchedule

    def samples(self, caps: Capabilities) -> tuple[QuantExpertConfig, ...]:
        made = []
        for scheme in self.sampled_schemes():
            layout = quant_layout(scheme, 128, 512, caps)
            made.append(QuantExpertConfig(2, layout, "bfloat16", "bfloat16"))
        return tuple(self.task(config) for config in made)

    def task(self, config: QuantExpertConfig) -> QuantExpertConfig:
        return replace(config, **vars(self.schedule_type()))

    def buckets(self, task: QuantExpertConfig) -> tuple[Bucket, ...]:
        return BUCKETS

    def space(self, task: QuantExpertConfig, bucket: Bucket, caps: Capabilities) -> Space:
        large = not bucket.high or bucket.high > 64  # an expert has a part of the rows
        knobs = (
            Knob("t_block", ROWS_PER_TASK if large else (240,)),
            Knob("prefetch", self.prefetches),
            Knob("by_expert", (False, True)),
        )
        return Space(self.default(task, caps), knobs)

    def scheduled(self, config: QuantExpertConfig, schedule: ByRows[Any]) -> QuantExpertKernel:
        return QuantExpertKernel(config, schedule)

    def schedules_of(self, config: Any) -> ByRows[Any]:
        if isinstance(config, QuantExpertKernel):
            return config.schedule
        own = {f.name: getattr(config, f.name) for f in fields(QuantExpertSchedule)}
        return ByRows((self.schedule_type(**own),))

    def build(self, config: QuantExpertKernel, caps: Capabilities) -> Any:
        return quant_expert_linear_by_rows(config, caps)

    def weights(self, task: QuantExpertConfig, rng: np.random.Generator) -> dict[str, Array]:
        made = random_quantized(rng, task.layout, task.experts, task.n)
        if task.has_bias:
            made["bias"] = random_array(rng, (task.experts, task.n), task.in_dtype)
        return made

    def inputs(self, task: QuantExpertConfig, rows: int, rng: np.random.Generator) -> dict[str, Array]:
        x = rows_for(rng, rows, task.layout, task.in_dtype)
        return {"x": x, **expert_ids(task.experts, rows, task.ids_dtype, rng)}

    def pack(
        self, task: QuantExpertConfig, schedule: Any, weights: dict[str, Array], caps: Capabilities
    ) -> Array:
        return task.layout.pack(quantized_of(task.layout, weights))

    def reference(self, task: QuantExpertConfig, case: dict[str, Array]) -> Array:
        weight = quantized_of(task.layout, case)
        out = np.empty((case["x"].shape[0], task.n), np.float32)
        for expert in np.unique(case["ids"]):
            rows = case["ids"] == expert
            out[rows] = multiply_quantized(case["x"][rows], weight.part(int(expert)))
            if "bias" in case:
                out[rows] += case["bias"][expert].astype(np.float32)
        return out

    def work(self, task: QuantExpertConfig, rows: int) -> Work:
        layout = task.layout
        moved = active_experts(task.experts, rows) * layout.size + rows_bytes(task, rows, layout.k)
        return Work(moved, 2.0 * rows * task.n * layout.k, self.multiplied(task))

    def terms(
        self, task: QuantExpertConfig, schedule: QuantExpertSchedule, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        active, layout = active_experts(task.experts, rows), task.layout
        return {
            **task_terms(active * layout.blocks, caps),
            "bits": float(layout.of.bits),
            "rows_per_expert": rows / active,
            "passes": -(-rows / active // schedule.t_block),
            "partial": float(min(schedule.t_block, rows / active) * layout.n_block * 4),
            "groups_ahead": schedule.prefetch / layout.group_bytes,
            "uneven": active % caps.threads / active if schedule.by_expert else 0.0,
        }


class TunableIntExperts(TunableQuantExperts):
    """y[r] = round(x[r]) @ dequantize(weight[ids[r]]).T: rows of x are rounded to int8 on the way."""

    name = "int_experts"
    schedule_type: ClassVar[type] = IntExpertSchedule
    integer = True
    schemes = INT_SCHEMES
    prefetches = INT_PREFETCHES
