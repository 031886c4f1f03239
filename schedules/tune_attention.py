"""The attention kernels for the tuner: prefill by the number of new tokens, decode by the number of sequences."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from llmc.caps import Capabilities
from llmc.kv_plan import entry_bytes
from llmc.schedules.attention import attention_decode, attention_prefill, partial_shape
from llmc.schedules.attention_config import AttentionConfig, DecodeSchedule, PrefillSchedule
from llmc.schedules.choice import ByRows
from llmc.schedules.kv_arrays import coded_part, decoded
from llmc.schedules.layout import usual_vectors
from llmc.schedules.tunable import (
    BUCKETS,
    Arguments,
    Bucket,
    Knob,
    Space,
    Tunable,
    Work,
)
from llmc.schedules.tune_data import ITEM_BYTES, Array, empty_result, random_array
from llmc.schedules.tune_weights import register_terms, register_tile_fits, task_terms

_CONTEXT = 1024  # keys per sequence that decode is tuned on
_REGISTER_TILES = (2, 3, 4, 6, 8)


class _TunableAttention(Tunable):
    """What prefill and decode have in common."""

    config_type = AttentionConfig

    def task(self, config: AttentionConfig) -> AttentionConfig:
        # sinks and ALiBi are operands of a few numbers; the scale is a constant; layers are a stride
        kept = replace(config, layers=1, scale=config.key_dim**-0.5, has_sinks=False, has_alibi=False)
        return replace(
            kept,
            sinks_dtype="",
            prefill=ByRows((PrefillSchedule(),)),
            decode=ByRows((DecodeSchedule(),)),
        )

    def samples(self, caps: Capabilities) -> tuple[AttentionConfig, ...]:
        kinds = (("bfloat16", "bfloat16", 0), ("float32", "float32", 256), ("bfloat16", "int8", 0))
        made = [AttentionConfig(4, 2, 64, 64, t, kv, 16, 1, 0.125, window=w) for t, kv, w in kinds]
        return tuple(self.task(config) for config in made)

    def tolerance(self, task: AttentionConfig) -> float:
        # coded pages are read exactly, or as bfloat16, which holds the codes
        pages = task.dtype if task.coded else task.kv_dtype
        narrowest = task.dtype if ITEM_BYTES[task.dtype] < ITEM_BYTES[pages] else pages
        return {"float32": 2e-5, "float16": 8e-3, "bfloat16": 4e-2}[narrowest]

    @abstractmethod
    def batch(self, rows: int) -> tuple[int, int, int]:
        """(sequences, new tokens of each, keys of each)."""

    def inputs(self, task: AttentionConfig, rows: int, rng: np.random.Generator) -> dict[str, Array]:
        sequences, new, keys = self.batch(rows)
        q_shape = (sequences * new, task.heads, task.key_dim)

        def cached(dim: int) -> Array:
            shape = (sequences, task.kv_heads, keys, dim)
            if task.coded:
                return decoded(random_array(rng, shape, "float32"), task.kv_dtype)
            return random_array(rng, shape, task.kv_dtype)

        return {
            "q": random_array(rng, q_shape, task.dtype),
            "k": cached(task.key_dim),
            "v": cached(task.value_dim),
            "order": rng.permutation(sequences * -(-keys // task.page_size)).astype(np.int32),
        }

    def arguments(
        self,
        task: AttentionConfig,
        schedule: Any,
        case: dict[str, Array],
        caps: Capabilities,
        packed: Array | None = None,
    ) -> Arguments:
        ps = task.page_size
        sequences, heads, keys, _ = case["k"].shape
        width = -(-keys // ps)
        pages = 1 + sequences * width
        table = (1 + case["order"]).reshape(sequences, width)
        pools = []
        for name, dims_first in (("k", True), ("v", False)):
            source = case[name]
            padded = np.zeros((sequences, heads, width * ps, source.shape[3]), source.dtype)
            padded[:, :, :keys] = source
            split = padded.reshape(sequences, heads, width, ps, -1).transpose(0, 2, 1, 3, 4)
            if task.coded:
                bytes_of = coded_part(split, task.kv_dtype, keys=dims_first)
                part = bytes_of.reshape(*split.shape[:3], *(task.k_page if dims_first else task.v_page))
            else:
                part = split.swapaxes(3, 4) if dims_first else split
            pool = np.zeros((pages, 1, *part.shape[2:]), part.dtype)
            pool[table.reshape(-1), 0] = part.reshape(sequences * width, *part.shape[2:])
            pools.append(pool)
        new = case["q"].shape[0] // sequences
        q = case["q"] if task.token_major else case["q"].transpose(1, 0, 2)
        start = np.arange(sequences + 1, dtype=np.int32) * np.int32(new)
        context = np.full(sequences, keys, np.int32)
        out = empty_result((1, case["q"].shape[0], task.heads, task.value_dim), task.dtype)
        values: list[Any] = [np.ascontiguousarray(q)[None], *pools, start, context, table, 0, out]
        values += self._scratch(task, schedule, sequences)
        return Arguments(tuple(values), (1, 2), 7)

    def _scratch(self, task: AttentionConfig, schedule: Any, sequences: int) -> list[Array]:
        return []

    def reference(self, task: AttentionConfig, case: dict[str, Array]) -> Array:
        k, v = (case[name].astype(np.float32) for name in ("k", "v"))
        sequences, _, keys, _ = k.shape
        new, group = case["q"].shape[0] // sequences, task.heads // task.kv_heads
        q = case["q"].astype(np.float32).reshape(sequences, new, task.heads, task.key_dim)
        own, other = np.arange(keys - new, keys)[:, None], np.arange(keys)[None]
        seen = other <= own
        if task.window:
            seen &= own - other < task.window
        if task.chunk:
            seen &= own // task.chunk == other // task.chunk
        out = np.empty((sequences, new, task.heads, task.value_dim), np.float32)
        for s in range(sequences):
            for head in range(task.heads):
                score = q[s, :, head] @ k[s, head // group].T * np.float32(task.scale)
                if task.softcap:
                    score = task.softcap * np.tanh(score / task.softcap)
                score = np.where(seen, score, -np.inf)
                weight = np.exp(score - score.max(1, keepdims=True))
                out[s, :, head] = weight / weight.sum(1, keepdims=True) @ v[s, head // group]
        return out.reshape(1, sequences * new, task.heads, task.value_dim)

    def work(self, task: AttentionConfig, rows: int) -> Work:
        sequences, new, keys = self.batch(rows)
        visible = min(task.window, keys) if task.window else keys
        dims = task.key_dim + task.value_dim
        pairs = sequences * new * (visible - (new - 1) / 2 if not task.window else visible)
        cached = entry_bytes(task.kv_dtype, task.key_dim) + entry_bytes(task.kv_dtype, task.value_dim)
        moved = sequences * visible * task.kv_heads * cached
        moved += sequences * new * task.heads * dims * ITEM_BYTES[task.dtype]
        return Work(
            float(moved), 2.0 * pairs * task.heads * dims, task.dtype if task.coded else task.kv_dtype
        )

    def _register_terms(self, schedule: Any, rows: int, caps: Capabilities) -> dict[str, float]:
        tile = -(-rows // -(-rows // schedule.row_tile))
        return register_terms(tile, schedule.vectors or usual_vectors(caps), caps)

    def _fits(self, schedule: Any, caps: Capabilities) -> bool:
        """The register tile is not the default's, or fits into the registers."""
        usual = usual_vectors(caps)
        fits = register_tile_fits(schedule.row_tile, schedule.vectors or usual, caps)
        return fits and schedule.vectors != usual


def _vectors(caps: Capabilities) -> Knob:
    return Knob("vectors", (1, 2, 0, 6) if usual_vectors(caps) == 4 else (1, 0, 4))


class TunablePrefill(_TunableAttention):
    """Attention of ``step``: one sequence whose tokens are all new."""

    name = "attention_prefill"
    schedule_type: ClassVar[type] = PrefillSchedule

    def buckets(self, task: AttentionConfig) -> tuple[Bucket, ...]:
        return tuple(b for b in BUCKETS if b.low > 16)

    def batch(self, rows: int) -> tuple[int, int, int]:
        return 1, rows, rows

    def space(self, task: AttentionConfig, bucket: Bucket, caps: Capabilities) -> Space:
        knobs = (
            Knob("tile_rows", (16, 32, 48, 64, 96, 128, 192)),
            Knob("keys", (32, 64, 128, 256)),
            Knob("row_tile", _REGISTER_TILES),
            _vectors(caps),
        )
        return Space(self.default(task, caps), knobs, lambda s: self._fits(s, caps))

    def scheduled(self, config: AttentionConfig, schedule: ByRows[Any]) -> AttentionConfig:
        return replace(config, prefill=schedule)

    def schedules_of(self, config: AttentionConfig) -> ByRows[Any]:
        return config.prefill

    def build(self, config: AttentionConfig, caps: Capabilities) -> Any:
        return attention_prefill(config, caps)

    def terms(
        self, task: AttentionConfig, schedule: PrefillSchedule, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        group = task.heads // task.kv_heads
        tokens = max(1, schedule.tile_rows // group)
        tasks = -(-rows // tokens) * task.kv_heads
        dims = task.key_dim + task.value_dim
        return {
            **self._register_terms(schedule, tokens * group, caps),
            **task_terms(tasks, caps),
            "tile": float(tokens * group * (task.value_dim + 2 * schedule.keys) * 4),
            "block": float(schedule.keys * dims * ITEM_BYTES[task.kv_dtype]),
            "relayouts": tokens * group / schedule.tile_rows,
            "wasted_keys": schedule.keys / (2 * rows),
        }


class TunableDecode(_TunableAttention):
    """Attention of ``decode``: sequences with one new token each."""

    name = "attention_decode"
    schedule_type: ClassVar[type] = DecodeSchedule
    shared: ClassVar[tuple[str, ...]] = ("splits",)

    def buckets(self, task: AttentionConfig) -> tuple[Bucket, ...]:
        return tuple(b for b in BUCKETS if b.high and b.high <= 16)

    def batch(self, rows: int) -> tuple[int, int, int]:
        return rows, 1, _CONTEXT

    def space(self, task: AttentionConfig, bucket: Bucket, caps: Capabilities) -> Space:
        knobs = (
            Knob("splits", (1, 2, 4, 8, 16)),
            Knob("keys", (32, 64, 128, 256, 512)),
            Knob("least_keys", (64, 128, 256, 512)),
            Knob("row_tile", _REGISTER_TILES),
            _vectors(caps),
        )
        return Space(self.default(task, caps), knobs, lambda s: self._fits(s, caps))

    def scheduled(self, config: AttentionConfig, schedule: ByRows[Any]) -> AttentionConfig:
        return replace(config, decode=schedule)

    def schedules_of(self, config: AttentionConfig) -> ByRows[Any]:
        return config.decode

    def build(self, config: AttentionConfig, caps: Capabilities) -> Any:
        return attention_decode(config, caps)

    def _scratch(self, task: AttentionConfig, schedule: DecodeSchedule, sequences: int) -> list[Array]:
        shape = partial_shape(replace(task, decode=ByRows((schedule,))))
        return [np.full((sequences, *shape), np.nan, np.float32)]

    def terms(
        self, task: AttentionConfig, schedule: DecodeSchedule, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        pieces = max(1, min(schedule.splits, _CONTEXT // schedule.least_keys))
        tasks = rows * task.kv_heads * pieces
        dims = task.key_dim + task.value_dim
        group = task.heads // task.kv_heads
        return {
            **self._register_terms(schedule, group, caps),
            **task_terms(tasks, caps),
            "block": float(schedule.keys * dims * ITEM_BYTES[task.kv_dtype]),
            "blocks": _CONTEXT / pieces / schedule.keys,
            "merged": float(pieces if pieces > 1 else 0),
        }
