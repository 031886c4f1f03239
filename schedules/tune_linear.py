"""The linear kernel for the tuner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from llmc.caps import Capabilities
from llmc.schedules.choice import ByRows
from llmc.schedules.layout import BlockedLayout, usual_vectors
from llmc.schedules.linear import LinearConfig, LinearSchedule
from llmc.schedules.qlayout import turns
from llmc.schedules.tile_linear import linear_by_rows, tiles_from
from llmc.schedules.tunable import BUCKETS, Bucket, Knob, Space, Work
from llmc.schedules.tune_data import ITEM_BYTES, Array, multiply, random_array, random_rows
from llmc.schedules.tune_tiles import with_tiles
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

_WHOLE = 1 << 20  # a k_block that no weight reaches


class TunableLinear(TunableWeight):
    """y = x @ weight.T with its epilogue, weights in their own dtype."""

    name = "linear"
    config_type = LinearConfig
    schedule_type: ClassVar[type] = LinearSchedule
    shared: ClassVar[tuple[str, ...]] = ("vectors",)

    def task(self, config: LinearConfig) -> LinearConfig:
        return replace(config, lead=0, schedule=ByRows((LinearSchedule(),)))

    def parsed(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "layout": BlockedLayout(**values["layout"]) if values.get("layout") else None}

    def samples(self, caps: Capabilities) -> tuple[LinearConfig, ...]:
        made = []
        for dtype in ("bfloat16", "float32"):
            made.append(LinearConfig(128, 2100, dtype, dtype, dtype, activation="silu", gated=True))
        return tuple(self.task(config) for config in made)

    def buckets(self, task: LinearConfig) -> tuple[Bucket, ...]:
        return BUCKETS

    def space(self, task: LinearConfig, bucket: Bucket, caps: Capabilities) -> Space:
        usual, most = usual_vectors(caps), bucket.high or _WHOLE
        large = most > 16

        def blocks_fit(schedule: LinearSchedule) -> bool:
            vectors = schedule.vectors or usual
            return not (too_wide(vectors, task.n, caps) or (task.gated and vectors % 2))

        def valid(schedule: LinearSchedule) -> bool:
            vectors, tile = schedule.vectors or usual, schedule.rows_tile
            if not blocks_fit(schedule) or tile == usual_tile(vectors, caps):
                return False
            if tile and not register_tile_fits(tile, vectors, caps):
                return False
            # one task takes all rows: the order of tasks is then one and the same
            return not (schedule.block_fast and schedule.t_block >= most)

        knobs = (
            # a layout that is given: the blocks suit another machine
            Knob("vectors", (0,) if task.layout else vector_counts(caps)),
            Knob("rows_tile", (0, *(r for r in (1, 2, 3, 4, 5, 6, 8, 12) if r <= most))),
            Knob("k_block", self._pieces(task.k)),
            Knob("t_block", (24, 48, 96, 144, 240, 384, 520) if large else (240,)),
            Knob("unroll", (1, 2, 0, 8) if most == 1 else (0, 2, 4)),
            Knob("prefetch", (0, 512, 1024, 2304, 4096, 8192)),
            Knob("block_fast", (False, True) if large else (False,)),
        )
        space = Space(self.default(task, caps), knobs, valid)
        if not tiles_from(task, caps, space.default):
            return space
        return with_tiles(space, bucket, task.k, (knobs[0],), blocks_fit)

    def _pieces(self, k: int) -> tuple[int, ...]:
        """k_block values that differ for k columns, the default among them."""
        below = tuple(v for v in (256, 512, 1024, 2048, 4096) if v < k)
        return (*below, 2048 if k <= 2048 else _WHOLE)

    def scheduled(self, config: LinearConfig, schedule: ByRows[Any]) -> LinearConfig:
        return replace(config, schedule=schedule)

    def schedules_of(self, config: LinearConfig) -> ByRows[Any]:
        return config.schedule

    def build(self, config: LinearConfig, caps: Capabilities) -> Any:
        return linear_by_rows(config, caps)

    def weights(self, task: LinearConfig, rng: np.random.Generator) -> dict[str, Array]:
        held = 2 * task.n if task.gated else task.n
        made = {"weight": random_array(rng, (held, task.k), task.weight_dtype)}
        if task.has_bias:
            made["bias"] = random_array(rng, (held,), task.in_dtype)
        return made

    def inputs(self, task: LinearConfig, rows: int, rng: np.random.Generator) -> dict[str, Array]:
        made = {"x": random_rows(rng, rows, task.k, task.in_dtype)}
        if task.has_residual:
            made["residual"] = random_array(rng, (rows, task.n), task.in_dtype)
        return made

    def pack(
        self, task: LinearConfig, schedule: LinearSchedule, weights: dict[str, Array], caps: Capabilities
    ) -> Array:
        layout = replace(task, schedule=ByRows((schedule,))).weight_layout(caps)
        weight = weights["weight"]
        if task.gated:
            index = turns(weight.shape[0], layout.n_block)
            weight = weight[np.maximum(index, 0)]
            weight[index < 0] = 0
        return layout.pack(weight)

    def reference(self, task: LinearConfig, case: dict[str, Array]) -> Array:
        return finish(task, multiply(case["x"], case["weight"]), case)

    def work(self, task: LinearConfig, rows: int) -> Work:
        held = 2 * task.n if task.gated else task.n
        read = held * task.k * ITEM_BYTES[task.weight_dtype]
        return Work(read + rows_bytes(task, rows, task.k), 2.0 * rows * held * task.k, task.weight_dtype)

    def terms(
        self, task: LinearConfig, schedule: LinearSchedule, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        scheduled = replace(task, schedule=ByRows((schedule,)))
        blocks, _, nb, _ = scheduled.packed_shape(caps)
        vectors = nb // caps.lanes_f32
        tile = min(schedule.rows_tile or usual_tile(vectors, caps), rows)
        piece, rows_of_task = min(schedule.k_block, task.k), min(schedule.t_block, rows)
        tasks = blocks * -(-rows // rows_of_task)
        item = ITEM_BYTES[task.weight_dtype]
        return {
            **task_terms(tasks, caps),
            **register_terms(tile, vectors, caps),
            "tail_rows": rows_of_task % tile / rows_of_task,
            "weight_piece": float(piece * nb * item),
            "x_piece": float(piece * rows_of_task * item),
            "partial": float(rows_of_task * nb * 4 if piece < task.k else 0),
            "pieces": -(-task.k // piece),
            "padding": blocks * nb / (2 * task.n if task.gated else task.n),
            "steps_ahead": schedule.prefetch / (nb * item),
            "tiled": float(0 < tiles_from(task, caps, schedule) <= rows),
        }


def finish(task: Any, sums: Array, case: dict[str, Array]) -> Array:
    """The epilogue of a linear kernel in numpy: bias, activation, gate, residual (LinearAttrs in llmc/ops.py)."""
    if "bias" in case:
        sums = sums + case["bias"].astype(np.float32)
    if task.gated:
        first, second = np.split(sums, 2, axis=-1)
        gate, other = (second, first) if task.gate_second else (first, second)
        sums = (ACTIVATIONS[task.activation](gate) if task.activation else gate) * other
    elif task.activation:
        sums = ACTIVATIONS[task.activation](sums)
    if "residual" in case:
        sums = sums + case["residual"].astype(np.float32)
    return np.asarray(sums, np.float32)


def _erf(x: Array) -> Array:
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), np.float32)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}
