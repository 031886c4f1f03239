"""Norms of machines with threads for the tuner: how many threads share a row. Rows are those of the symbolic dimension."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from llmc.caps import Capabilities
from llmc.ops import NormAttrs
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu.configs import GpuNormSchedule
from llmc.schedules.gpu.emit import WARP
from llmc.schedules.gpu.norm import NormKernel, held, lanes_of, norm, usual
from llmc.schedules.gpu.tune_linear import block_terms
from llmc.schedules.norm import NormConfig
from llmc.schedules.tunable import BUCKETS, Arguments, Bucket, Knob, Space, Tunable, Work
from llmc.schedules.tune_data import ITEM_BYTES, Array, empty_result, random_array


class TunableGpuNorm(Tunable):
    """y = norm(x + addend) * weight."""

    name: ClassVar[str] = "norm"
    config_type: ClassVar[type] = NormConfig
    schedule_type: ClassVar[type] = GpuNormSchedule

    def samples(self, caps: Capabilities) -> tuple[NormConfig, ...]:
        adds = NormAttrs(1e-5, has_weight=True, adds=True)
        layer = NormAttrs(1e-5, center=True, has_weight=True, has_bias=True)
        return (
            NormConfig((1, -1, 1024), "bfloat16", "bfloat16", adds),
            NormConfig((1, -1, 100), "float32", "float32", layer),
        )

    def task(self, config: NormConfig) -> NormConfig:
        return config

    def parsed(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "shape": tuple(values["shape"]), "attrs": NormAttrs.of(values["attrs"])}

    def buckets(self, task: NormConfig) -> tuple[Bucket, ...]:
        return BUCKETS

    def space(self, task: NormConfig, bucket: Bucket, caps: Capabilities) -> Space:
        k, lanes = task.shape[-1], lanes_of(task)

        def valid(schedule: GpuNormSchedule) -> bool:
            if schedule.rows > 1 and schedule.threads != WARP:
                return False
            useful = schedule.threads == WARP or schedule.threads * lanes < 2 * k
            return useful and schedule.threads > 0

        knobs = (Knob("threads", (0, 32, 64, 128, 256, 512, 1024)), Knob("rows", (1, 2, 4, 8, 16)))
        return Space(GpuNormSchedule(), knobs, valid)

    def scheduled(self, config: NormConfig, schedule: ByRows[Any]) -> NormKernel:
        return NormKernel(config, schedule)

    def schedules_of(self, config: Any) -> ByRows[Any]:
        return config.schedule if isinstance(config, NormKernel) else ByRows((GpuNormSchedule(),))

    def build(self, config: Any, caps: Capabilities) -> Any:
        return norm(config, caps)

    def inputs(self, task: NormConfig, rows: int, rng: np.random.Generator) -> dict[str, Array]:
        shape = _dims(task, rows)
        names = ["x", *(["addend"] if task.attrs.adds else [])]
        made = {name: random_array(rng, shape, task.dtype) for name in names}
        for i in range(task.vectors):
            made[f"vector_{i}"] = random_array(rng, shape[-1:], task.weight_dtype)
        return made

    def arguments(
        self,
        task: NormConfig,
        schedule: Any,
        case: dict[str, Array],
        caps: Capabilities,
        packed: Array | None = None,
    ) -> Arguments:
        results = task.attrs.adds + (not task.attrs.only_sum)
        outs = [empty_result(case["x"].shape, task.dtype) for _ in range(results)]
        values = (*case.values(), *outs)
        return Arguments(values, (), len(values) - 1)

    def reference(self, task: NormConfig, case: dict[str, Array]) -> Array:
        attrs = task.attrs
        vectors = [case[f"vector_{i}"].astype(np.float32) for i in range(task.vectors)]
        value: Array = case["x"].astype(np.float32)
        if attrs.adds:
            other = case["addend"].astype(np.float32)
            if attrs.before is not None:
                other = _norm(attrs.before, other, vectors[: attrs.before.vectors])
                vectors = vectors[attrs.before.vectors :]
            value = (value + other).astype(case["x"].dtype).astype(np.float32)
        return value if attrs.only_sum else _norm(attrs, value, vectors)

    def tolerance(self, task: NormConfig) -> float:
        return {"float32": 2e-5, "float16": 4e-3, "bfloat16": 2.4e-2}[task.dtype]

    def work(self, task: NormConfig, rows: int) -> Work:
        count = math.prod(_dims(task, rows))
        arrays = 1 + 2 * task.attrs.adds + (not task.attrs.only_sum)
        moved = count * arrays * ITEM_BYTES[task.dtype]
        moved += task.vectors * task.shape[-1] * ITEM_BYTES[task.weight_dtype]
        return Work(moved, 5.0 * count, "float32")

    def terms(self, task: NormConfig, schedule: Any, rows: int, caps: Capabilities) -> dict[str, float]:
        k, cut = task.shape[-1], schedule if schedule.threads else usual(task.shape[-1])
        count = math.prod(_dims(task, rows)) // k
        each = k / cut.threads
        kept = held(task, cut.threads)
        return {
            **block_terms(-(-count // cut.rows), cut.threads * cut.rows, 128, each if kept else 8, caps),
            "each": each,
            "kept": float(kept),
            "warps_of_row": cut.threads / WARP,
        }


def _dims(task: NormConfig, rows: int) -> tuple[int, ...]:
    return tuple(rows if d < 0 else d for d in task.shape)


def _norm(attrs: NormAttrs, value: Array, vectors: list[Array]) -> Array:
    if attrs.center:
        value = value - value.mean(-1, keepdims=True)
    value = value / np.sqrt((value**2).mean(-1, keepdims=True) + np.float32(attrs.eps))
    rest = list(vectors)
    if attrs.has_weight:
        value = value * (rest.pop(0) + np.float32(attrs.plus_one))
    return value + rest.pop(0) if attrs.has_bias else value
