"""Which builder makes a kernel, by what the machine is like. Passes call builders through this table only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llmc.caps import Capabilities
from llmc.schedules import (
    attention,
    gather,
    head_linear,
    norm,
    qgather,
    rope,
    tile_linear,
    tune_experts,
    tune_qexperts,
    tune_qlinear,
)
from llmc.schedules.attention_config import AttentionConfig, DecodeSchedule
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu import attention as gpu_attention
from llmc.schedules.gpu import experts as gpu_experts
from llmc.schedules.gpu import gather as gpu_gather
from llmc.schedules.gpu import head_linear as gpu_head_linear
from llmc.schedules.gpu import linear as gpu_linear
from llmc.schedules.gpu import norm as gpu_norm
from llmc.schedules.gpu import qlinear as gpu_qlinear
from llmc.schedules.gpu import rope as gpu_rope
from llmc.schedules.gpu import sort_experts, topk

# (configuration, capabilities) -> PrimFunc
Builder = Callable[[Any, Capabilities], Any]


@dataclass(frozen=True)
class Builders:
    """A builder per kernel; the functions of the same name in schedules/ say what each computes."""

    linear: Builder
    quant_linear: Builder
    expert_linear: Builder
    quant_expert_linear: Builder
    int_expert_linear: Builder
    head_linear: Builder
    sort_experts: Builder | None  # None: expert kernels take ids, and sort rows by themselves
    norm: Builder
    embedding: Builder
    quant_embedding: Builder
    gather_rows: Builder
    top_k: Builder | None  # None: the runtime has a routine
    kv_append: Builder
    rope_append: Builder
    attention_prefill: Builder
    attention_decode: Callable[[Any, Capabilities, Any], Any]


_LOOPS = Builders(
    linear=tile_linear.linear_by_rows,
    quant_linear=tune_qlinear.quant_linear_by_rows,
    expert_linear=tune_experts.expert_linear_by_rows,
    quant_expert_linear=tune_qexperts.quant_expert_linear_by_rows,
    int_expert_linear=tune_qexperts.quant_expert_linear_by_rows,
    head_linear=head_linear.head_linear,
    sort_experts=None,
    norm=norm.norm,
    embedding=gather.embedding,
    quant_embedding=qgather.quant_embedding,
    gather_rows=gather.gather_rows,
    top_k=None,
    kv_append=attention.kv_append,
    rope_append=rope.rope_append,
    attention_prefill=attention.attention_prefill,
    attention_decode=attention.attention_decode,
)
_THREADS = Builders(
    linear=gpu_linear.linear,
    quant_linear=gpu_qlinear.quant_linear,
    expert_linear=gpu_experts.expert_linear,
    quant_expert_linear=gpu_experts.quant_expert_linear,
    int_expert_linear=gpu_experts.quant_expert_linear,
    head_linear=gpu_head_linear.head_linear,
    sort_experts=sort_experts.sort_experts,
    norm=gpu_norm.norm,
    embedding=gpu_gather.embedding,
    quant_embedding=gpu_gather.quant_embedding,
    gather_rows=gpu_gather.gather_rows,
    top_k=topk.top_k,
    kv_append=gpu_rope.kv_append,
    rope_append=gpu_rope.rope_append,
    attention_prefill=gpu_attention.attention_prefill,
    attention_decode=gpu_attention.attention_decode,
)


def with_defaults(config: AttentionConfig, caps: Capabilities) -> AttentionConfig:
    """An attention configuration whose decode fills the machine: a few blocks per multiprocessor for one sequence."""
    if not caps.simt:
        return config
    splits = 8
    while splits < 64 and splits * config.kv_heads < 2 * caps.multiprocessors:
        splits *= 2
    return replace(config, decode=ByRows((DecodeSchedule(splits=splits),)))


def builders(caps: Capabilities) -> Builders:
    """The builders for a machine."""
    return _THREADS if caps.simt else _LOOPS
