"""The linear kernels on quantized weights for the tuner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from llmc.caps import Capabilities
from llmc.quant.schemes import Code, by_name
from llmc.quant.weight import TABLES, QuantizedWeight
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows, Segment, segments
from llmc.schedules.ilinear import int_linear
from llmc.schedules.qlayout import QuantLayout, in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig, quant_linear
from llmc.schedules.tile_ilinear import tile_int_linear
from llmc.schedules.tile_qlinear import quant_tiles_from, tile_quant_linear
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
from llmc.schedules.tune_linear import finish
from llmc.schedules.tune_tiles import with_tiles


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


class QuantKernel(NamedTuple):
    """A kernel with schedules by rows: its config, whose own schedule fields do not count, and the schedules."""

    config: QuantLinearConfig
    schedule: ByRows[Any]

    def to_json(self) -> dict[str, Any]:
        return {**self.config.to_json(), "schedule": self.schedule.to_json()}


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


class TunableQuantLinear(Tunable):
    """y = x @ dequantize(weight).T with its epilogue."""

    name = "quant_linear"
    config_type = QuantLinearConfig
    schedule_type: ClassVar[type] = QuantLinearSchedule
    schemes: ClassVar[tuple[str, ...]] = ("q8", "q4g32")  # of samples
    t_blocks: ClassVar[tuple[int, ...]] = (24, 48, 96, 144, 240, 384, 512)
    prefetches: ClassVar[tuple[int, ...]] = (0, 256, 512, 1024, 1536, 2304, 3072, 4096, 6144, 8192)

    def takes(self, config: Any) -> bool:
        if not super().takes(config) or config.layout.of.activations is Code.INT:
            return False
        # what only checkpoints hold keeps its default: no random weights are made of it
        scheme = config.layout.of
        return not (scheme.super_group or scheme.offsets or scheme.order)

    def samples(self, caps: Capabilities) -> tuple[QuantLinearConfig, ...]:
        made = []
        for name in self.schemes:
            layout = quant_layout(by_name(name), 128, 128, caps)
            made.append(QuantLinearConfig(128, layout, "bfloat16", "bfloat16", has_residual=True))
        return tuple(self.task(config) for config in made)

    def task(self, config: QuantLinearConfig) -> QuantLinearConfig:
        return replace(config, lead=0, **vars(self.schedule_type()))

    def parsed(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "layout": QuantLayout(**values["layout"])}

    def to_values(self, task: QuantLinearConfig) -> dict[str, Any]:
        values = super().to_values(task)
        plain = {f.name: f.default for f in fields(task.layout)}
        values["layout"] = {k: v for k, v in values["layout"].items() if v != plain.get(k)}
        return values

    def buckets(self, task: QuantLinearConfig) -> tuple[Bucket, ...]:
        return BUCKETS

    def space(self, task: QuantLinearConfig, bucket: Bucket, caps: Capabilities) -> Space:
        large = not bucket.high or bucket.high > 16
        knobs = (
            Knob("t_block", self.t_blocks if large else (240,)),
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

    def candidate(self, task: Any, schedule: Any, bucket: Bucket | None, caps: Capabilities) -> Any:
        # the kernel has its own paths for few and many rows, so a bucket makes it no smaller
        return super().candidate(task, schedule, None, caps)

    def weights(self, task: QuantLinearConfig, rng: np.random.Generator) -> dict[str, Array]:
        layout, held = task.layout, 2 * task.n if task.gated else task.n
        scheme = layout.of
        groups = -(-layout.k // scheme.group_size) if scheme.group_size else 1
        codes = np.resize(rng.integers(0, 1 << scheme.bits, 1_000_003, np.uint8), (held, layout.k))
        if scheme.code is Code.E4M3:
            codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)  # the codes of NaN
        # sums of about one, so that activations are tested where they bend
        whole = scheme.code is Code.INT
        largest = 1 << (scheme.bits - 1) if whole else np.nanmax(np.abs(TABLES[scheme.code]))
        scales = rng.uniform(0.5, 1.5, (held, groups)).astype(np.float32) * np.float32(1 / largest)
        if scheme.scale_dtype == "e8m0":
            scales = np.exp2(np.round(np.log2(scales))).astype(np.float32)
        elif scheme.scale_dtype != "float32":
            kind = np.float16 if scheme.scale_dtype == "float16" else ml_dtypes.bfloat16
            scales = scales.astype(kind).astype(np.float32)
        made = {"codes": codes, "scales": scales}
        if layout.outliers:  # the last columns, so that the first one still sets the scale
            weights = rng.standard_normal((held, layout.outliers)).astype(ml_dtypes.bfloat16)
            made["outlier_weights"] = weights.astype(np.float32)
            made["outlier_columns"] = np.arange(layout.k - layout.outliers, layout.k, dtype=np.int32)
        if not scheme.symmetric:
            made["zeros"] = rng.integers(0, 1 << scheme.bits, (held, groups), np.uint8)
        if task.has_bias:
            made["bias"] = random_array(rng, (held,), task.in_dtype)
        return made

    def inputs(self, task: QuantLinearConfig, rows: int, rng: np.random.Generator) -> dict[str, Array]:
        k = task.layout.k
        made = {"x": random_array(rng, (rows, k), task.in_dtype)}
        # rows that are rounded without a loss: the reference need not round them
        if task.layout.of.activations is Code.E4M3:
            x = random_e4m3(rng, (rows, k))
            x[:, :: task.layout.of.group_size or k] = 448
            made["x"] = (x / 2 ** (8 + math.ceil(math.log2(k) / 2))).astype(made["x"].dtype)
        elif task.layout.quads:
            x = rng.integers(-127, 128, (rows, k)).astype(np.float32)
            x[:, 0] = 127
            made["x"] = (x / 2 ** (7 + math.ceil(math.log2(k) / 2))).astype(made["x"].dtype)
        else:
            made["x"] = (made["x"].astype(np.float32) / math.sqrt(k)).astype(made["x"].dtype)
        if task.has_residual:
            made["residual"] = random_array(rng, (rows, task.n), task.in_dtype)
        return made

    def _weight(self, task: QuantLinearConfig, case: Mapping[str, Array]) -> QuantizedWeight:
        names = ("outlier_weights", "outlier_columns")
        outliers: dict[str, Any] = {name: case[name] for name in names if name in case}
        return QuantizedWeight(task.layout.of, case["codes"], case["scales"], case.get("zeros"), **outliers)

    def pack(
        self, task: QuantLinearConfig, schedule: Any, weights: dict[str, Array], caps: Capabilities
    ) -> Array:
        weight = self._weight(task, weights)
        return task.layout.pack(in_turns(weight, task.layout.n_block) if task.gated else weight)

    def arguments(
        self,
        task: QuantLinearConfig,
        schedule: Any,
        case: dict[str, Array],
        caps: Capabilities,
        packed: Array | None = None,
    ) -> Arguments:
        packed = self.pack(task, schedule, case, caps) if packed is None else packed
        extra = [case[name] for name in ("bias", "residual") if name in case]
        y = empty_result((case["x"].shape[0], task.n), task.out_dtype)
        values = (case["x"], packed, *extra, y)
        return Arguments(values, (1,), len(values) - 1)

    def reference(self, task: QuantLinearConfig, case: dict[str, Array]) -> Array:
        weight = self._weight(task, case)
        out = np.empty((case["x"].shape[0], weight.codes.shape[0]), np.float32)
        step = max(1, (8 << 20) // task.layout.k)
        for i in range(0, out.shape[1], step):
            part = weight.map(lambda a, i=i: a[i : i + step])
            out[:, i : i + step] = multiply(case["x"], part.dequantize())
        return finish(task, out, case)

    def work(self, task: QuantLinearConfig, rows: int) -> Work:
        moved = task.layout.size + rows * task.layout.k * ITEM_BYTES[task.in_dtype]
        moved += rows * task.n * (ITEM_BYTES[task.out_dtype] + ITEM_BYTES[task.in_dtype] * task.has_residual)
        held = 2 * task.n if task.gated else task.n
        multiplied = "int8" if task.layout.of.activations is Code.INT else task.in_dtype
        return Work(float(moved), 2.0 * rows * held * task.layout.k, multiplied)

    def terms(
        self, task: QuantLinearConfig, schedule: QuantLinearSchedule, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        rows_of_task = min(schedule.t_block, rows)
        tasks = task.layout.blocks * -(-rows // rows_of_task)
        return {
            "bits": float(task.layout.of.bits),
            "tasks": tasks / caps.threads,
            "balance": balance(tasks, caps.threads),
            "partial": float(rows_of_task * task.layout.n_block * 4),
            "groups_ahead": schedule.prefetch / task.layout.group_bytes,
            "tiled": float(0 < quant_tiles_from(task, caps, schedule) <= rows),
        }


class TunableIntLinear(TunableQuantLinear):
    """y = round(x) @ dequantize(weight).T with its epilogue: rows of x are rounded to int8 on the way."""

    name = "int_linear"
    schedule_type: ClassVar[type] = IntLinearSchedule
    schemes = ("w8a8", "w4a8")
    prefetches = (0, 512, 1024, 2304, 4096, 18432)

    def takes(self, config: Any) -> bool:
        return type(config) is self.config_type and config.layout.of.activations is Code.INT


def random_e4m3(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """float32 numbers that e4m3 holds, of all magnitudes."""
    codes = rng.integers(0, 256, shape, np.uint8)
    return np.nan_to_num(TABLES[Code.E4M3][codes], nan=1.0)
