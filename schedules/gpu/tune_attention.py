"""Decode attention of machines with threads for the tuner: into how many pieces the context is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from llmc.caps import Capabilities
from llmc.schedules.attention_config import AttentionConfig, DecodeSchedule
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu.attention import attention_decode
from llmc.schedules.gpu.attention_tile import THREADS, heads_per_tile, shared_bytes
from llmc.schedules.gpu.tune_linear import block_terms
from llmc.schedules.kernels import with_defaults
from llmc.schedules.tunable import Bucket, Knob, Space
from llmc.schedules.tune_attention import TunableDecode

_CONTEXT = 4096  # keys per sequence that decode is tuned on


class TunableGpuDecode(TunableDecode):
    """Attention of ``decode``: sequences with one new token each.

    All numbers of sequences share a schedule: `splits` sizes a scratch tensor, and pieces are found on the device.
    """

    shared: ClassVar[tuple[str, ...]] = ("splits", "least_keys")

    def batch(self, rows: int) -> tuple[int, int, int]:
        return rows, 1, _CONTEXT

    def default(self, task: AttentionConfig, caps: Capabilities) -> DecodeSchedule:
        return with_defaults(task, caps).decode.choices[0]

    def space(self, task: AttentionConfig, bucket: Bucket, caps: Capabilities) -> Space:
        knobs = (Knob("splits", (1, 2, 4, 8, 16, 32, 64, 128)), Knob("least_keys", (32, 64, 128, 256, 512)))
        return Space(self.default(task, caps), knobs)

    def build(self, config: AttentionConfig, caps: Capabilities) -> Any:
        return attention_decode(config, caps)

    def candidate(self, task: Any, schedule: Any, bucket: Bucket | None, caps: Capabilities) -> Any:
        return self.build(replace(task, decode=ByRows((schedule,))), caps)

    def terms(
        self, task: AttentionConfig, schedule: DecodeSchedule, rows: int, caps: Capabilities
    ) -> dict[str, float]:
        pieces = max(1, min(schedule.splits, _CONTEXT // schedule.least_keys))
        share = heads_per_tile(task)
        blocks = rows * (task.heads // share) * pieces
        return {
            **block_terms(blocks, THREADS, shared_bytes(task, share), float(share), caps),
            "pieces": float(pieces),
            "keys": _CONTEXT / pieces,
            "merged": float(pieces if pieces > 1 else 0),
        }
