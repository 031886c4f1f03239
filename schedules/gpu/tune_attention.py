"""Attention of machines with threads for the tuner: how tiles are cut, and into how many pieces a context is.

All numbers of rows share a schedule: what a prompt's length or a batch changes is found on the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from llmc.caps import Capabilities
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu import flash, flash_decode, flash_group
from llmc.schedules.gpu.attention import attention_decode, attention_prefill
from llmc.schedules.gpu.attention_tile import THREADS, heads_per_tile, shared_bytes
from llmc.schedules.gpu.configs import GpuDecodeSchedule, GpuPrefillSchedule
from llmc.schedules.gpu.emit import WARP
from llmc.schedules.gpu.spaces import OneOf, fits_registers
from llmc.schedules.gpu.tune_linear import block_terms
from llmc.schedules.kernels import with_defaults
from llmc.schedules.tunable import Bucket, Knob, Space
from llmc.schedules.tune_attention import TunableDecode, TunablePrefill

_CONTEXT = 4096  # keys per sequence that decode is tuned on
_STATIC = 2048  # bytes of shared memory that a kernel declares beside its tiles, at most


class TunableGpuPrefill(TunablePrefill):
    """Attention of ``step``: one sequence whose tokens are all new."""

    schedule_type: ClassVar[type] = GpuPrefillSchedule
    shared: ClassVar[tuple[str, ...]] = ("warps", "tiles", "keys", "stages", "groups")

    def space(self, task: AttentionConfig, bucket: Bucket, caps: Capabilities) -> Space:
        usual = None if task.latent else flash.shape(task, caps)
        if usual is None:  # the plain kernel has nothing to choose
            return Space(GpuPrefillSchedule(), ())
        knobs = (
            Knob("warps", (2, 4, 8)),
            Knob("tiles", (1, 2)),
            Knob("keys", (16, 32, 64, 128)),
            Knob("stages", (2, 3, 4)),
        )

        def valid(schedule: GpuPrefillSchedule) -> bool:
            cut = _prefill_cut(schedule)
            sums = cut.tiles * (task.value_dim + cut.keys) // 2
            fits = cut.shared_bytes(task) + _STATIC <= caps.shared_bytes
            whole = cut.rows % heads_per_tile(task) == 0
            return fits and whole and fits_registers(sums, cut.threads)

        first = GpuPrefillSchedule(usual.warps, usual.tiles, usual.keys, usual.stages)
        parts = (Space(first, knobs, valid), *_groups(task, caps))
        return OneOf(GpuPrefillSchedule(), (), parts=parts)

    def build(self, config: AttentionConfig, caps: Capabilities) -> Any:
        return attention_prefill(config, caps)

    def candidate(self, task: Any, schedule: Any, bucket: Bucket | None, caps: Capabilities) -> Any:
        return self.build(replace(task, prefill=ByRows((schedule,))), caps)

    def terms(self, task: AttentionConfig, schedule: Any, rows: int, caps: Capabilities) -> dict[str, float]:
        cut: Any = _prefill_cut(schedule) if schedule.warps else flash.shape(task, caps)
        if schedule.groups or not schedule.warps:
            cut = _group_cut(schedule) if schedule.groups else flash_group.shape(task, caps) or cut
        if cut is None:
            return {"rows": float(rows)}
        on_groups = isinstance(cut, flash_group.GroupShape)
        tiles = 1 if on_groups else cut.tiles
        share = heads_per_tile(task)
        tokens = cut.rows // share
        blocks = -(-rows // tokens) * (task.heads // share)
        sums = tiles * (task.value_dim + cut.keys) / 2
        return {
            "groups": float(on_groups),
            **block_terms(blocks, cut.threads, cut.shared_bytes(task), sums, caps),
            "tokens": float(tokens),
            "keys": float(cut.keys),
            "reuse": float(tiles),
            "stages": float(cut.stages),
            "wasted_keys": cut.keys / (2 * rows),
        }


class TunableGpuDecode(TunableDecode):
    """Attention of ``decode``: sequences with one new token each; `splits` sizes a scratch tensor."""

    schedule_type: ClassVar[type] = GpuDecodeSchedule
    shared: ClassVar[tuple[str, ...]] = ("splits", "least_keys", "warps", "keys", "stages")

    def batch(self, rows: int) -> tuple[int, int, int]:
        return rows, 1, _CONTEXT

    def default(self, task: AttentionConfig, caps: Capabilities) -> GpuDecodeSchedule:
        return GpuDecodeSchedule(with_defaults(task, caps).splits)

    def space(self, task: AttentionConfig, bucket: Bucket, caps: Capabilities) -> Space:
        default = self.default(task, caps)
        usual = None if task.latent else flash_decode.shape(task, caps)
        pieces = (
            Knob("splits", tuple(sorted({4, 8, 16, 32, 64, 128, default.splits}))),
            Knob("least_keys", (64, 128, 256, 512)),
        )
        if usual is None:
            return Space(default, pieces)
        knobs = (Knob("warps", (1, 2, 4, 8)), Knob("keys", (16, 32, 64)), Knob("stages", (2, 3, 4)))

        def valid(schedule: GpuDecodeSchedule) -> bool:
            cut = _decode_cut(schedule)
            sums = (task.value_dim + cut.keys) // 2
            return cut.fits(task, caps) and fits_registers(sums, cut.threads)

        first = replace(default, warps=usual.warps, keys=usual.keys, stages=usual.stages)
        return OneOf(default, (), parts=(Space(first, (*pieces, *knobs), valid),))

    def build(self, config: AttentionConfig, caps: Capabilities) -> Any:
        return attention_decode(config, caps)

    def candidate(self, task: Any, schedule: Any, bucket: Bucket | None, caps: Capabilities) -> Any:
        return self.build(replace(task, decode=ByRows((schedule,))), caps)

    def terms(self, task: AttentionConfig, schedule: Any, rows: int, caps: Capabilities) -> dict[str, float]:
        pieces = max(1, min(schedule.splits, _CONTEXT // schedule.least_keys))
        share = heads_per_tile(task)
        blocks = rows * (task.heads // share) * pieces
        cut = _decode_cut(schedule) if schedule.warps else flash_decode.shape(task, caps)
        threads, shared, ahead = THREADS, float(shared_bytes(task, share)), 0.0
        if cut is not None:
            threads, shared = cut.threads, float(cut.shared_bytes(task))
            ahead = float(cut.warps * (cut.stages - 1) * cut.keys)
        return {
            **block_terms(blocks, threads, shared, float(share), caps),
            "pieces": float(pieces),
            "keys": _CONTEXT / pieces,
            "keys_ahead": ahead,
            "warps": threads / WARP,
            "merged": float(pieces if pieces > 1 else 0),
        }


def _groups(task: AttentionConfig, caps: Capabilities) -> tuple[Space, ...]:
    """Cuts for warpgroups; none where the kernel is not made for the heads."""
    usual = flash_group.shape(task, caps)
    if usual is None:
        return ()
    knobs = (Knob("keys", (32, 64, 96, 128, 160, 192)), Knob("groups", (1, 2, 3)), Knob("stages", (2, 3, 4)))

    def valid(schedule: GpuPrefillSchedule) -> bool:
        cut = _group_cut(schedule)
        return cut.fits(task, caps) and cut.rows % heads_per_tile(task) == 0

    first = GpuPrefillSchedule(keys=usual.keys, stages=usual.stages, groups=usual.groups)
    return (Space(first, knobs, valid),)


def _group_cut(schedule: GpuPrefillSchedule) -> flash_group.GroupShape:
    return flash_group.GroupShape(schedule.keys, schedule.groups, schedule.stages)


def _prefill_cut(schedule: GpuPrefillSchedule) -> flash.FlashShape:
    return flash.FlashShape(schedule.warps, schedule.tiles, schedule.keys, schedule.stages)


def _decode_cut(schedule: GpuDecodeSchedule) -> flash_decode.DecodeShape:
    return flash_decode.DecodeShape(schedule.warps, schedule.keys, schedule.stages)
