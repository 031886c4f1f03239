"""Custom torch operators that survive torch.export: attention, its mask, and one expert layer.

    llmc::mask(like, padding[1, s]?, causal, window, chunk, length) -> [1, 1, s, s], 0 if allowed, else the dtype's minimum
    llmc::attention(q[1,h,s,dk], k[1,hk,s,dk], v[1,hk,s,dv], mask[1,1|h,s,s]?, sinks[h]?, ...) -> [1, s, h, dv]
    llmc::expert_linear(x[n,d], expert_ids[n], weight[e,o,d], bias[e,o]?, transposed) -> [n, o]

The real implementations are plain and slow: a model that is set to use them computes the same numbers as eager.
"""

from __future__ import annotations

from typing import Optional

import torch


def allowed_pairs(length: int, causal: bool, window: int, chunk: int) -> torch.Tensor:
    """Boolean [length, length]: which key j a query i may see; window counts the query itself."""
    i = torch.arange(length)[:, None]
    j = torch.arange(length)[None, :]
    allowed = j <= i if causal else torch.ones(length, length, dtype=torch.bool)
    if window:
        allowed = allowed & (i - j < window)
    if chunk:
        allowed = allowed & (i // chunk == j // chunk)
    return allowed


@torch.library.custom_op("llmc::mask", mutates_args=())
def mask_op(
    like: torch.Tensor,
    padding: Optional[torch.Tensor],  # noqa: UP045  (torch reads the schema from these)
    length: int,
    causal: bool,
    window: int,
    chunk: int,
) -> torch.Tensor:
    allowed = allowed_pairs(length, causal, window, chunk)
    if padding is not None:
        allowed = allowed & padding.bool()[0, None, :]
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(1, 1, length, length, dtype=like.dtype).masked_fill(~allowed, lowest)


@mask_op.register_fake
def _(
    like: torch.Tensor, padding: torch.Tensor | None, length: int, causal: bool, window: int, chunk: int
) -> torch.Tensor:
    return like.new_empty(1, 1, length, length)


@torch.library.custom_op("llmc::attention", mutates_args=())
def attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Optional[torch.Tensor],  # noqa: UP045
    sinks: Optional[torch.Tensor],  # noqa: UP045
    scale: float,
    softcap: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = (q.float() @ k.float().repeat_interleave(groups, 1).transpose(-1, -2)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask[..., : k.shape[2]].float()
    elif causal or window:
        scores = scores.masked_fill(~allowed_pairs(q.shape[2], causal, window, 0), float("-inf"))
    if sinks is not None:
        extra = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v.float().repeat_interleave(groups, 1)).to(v.dtype).transpose(1, 2).contiguous()


@attention_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("llmc::expert_linear", mutates_args=())
def expert_linear_op(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],  # noqa: UP045
    transposed: bool,
) -> torch.Tensor:
    chosen = weight[expert_ids]
    out = torch.bmm(x[:, None], chosen if transposed else chosen.transpose(1, 2))[:, 0]
    return out if bias is None else out + bias[expert_ids]


@expert_linear_op.register_fake
def _(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])
