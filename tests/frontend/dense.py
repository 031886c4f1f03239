"""Runs a ModelGraph without the compiler: numpy, the whole sequence at once, attention by its definition in llmc/ops.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from llmc.frontend.graph import ModelGraph
from llmc.ops import ATTENTION, EXPERT_LINEAR, AttentionAttrs, ExpertLinearAttrs
from llmc.passes.relax_eval import Evaluator
from llmc.passes.rewrite import Graph


def attention(operands: list[Any], text: str, var: Any) -> Any:
    """llmc.attention with a full score matrix."""
    attrs = AttentionAttrs.from_json(text)
    q, k, v, *rest = (x.astype("float32") for x in operands)
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    scores = attrs.scale * (q @ k.swapaxes(-1, -2))
    if attrs.softcap:
        scores = np.tanh(scores / attrs.softcap) * attrs.softcap
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    sinks = rest.pop(0) if attrs.has_sinks else None
    if attrs.has_alibi:
        scores = scores + rest.pop(0)[None, :, None, None] * (j - i)
    allowed = j <= i
    if attrs.window:
        allowed = allowed & (i - j < attrs.window)
    if attrs.chunk:
        allowed = allowed & (i // attrs.chunk == j // attrs.chunk)
    scores = np.where(allowed, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[None, :, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[None, :, None, None] - top)
    return ((weights / total) @ v).transpose(0, 2, 1, 3)


def expert_linear(operands: list[Any], text: str, var: Any) -> Any:
    """llmc.expert_linear, one row at a time."""
    attrs = ExpertLinearAttrs.from_json(text)
    x, ids, weight, *bias = operands
    chosen = weight[ids] if attrs.transposed else weight[ids].swapaxes(1, 2)
    out = (x[:, None] @ chosen)[:, 0]
    return out + bias[0][ids] if attrs.has_bias else out


def run_dense(graph: ModelGraph, weights: Mapping[str, torch.Tensor], ids: Any) -> list[Any]:
    """Logits [T, V] (then the taps) of token ids [T]."""
    func = graph.module["main"]
    known: dict[Any, Any] = {
        func.params[0]: np.asarray(ids, "int32"),
        func.params[1]: np.arange(len(ids), dtype="int32"),
    }
    for var, info in zip(func.params[2:], graph.params, strict=True):
        known[var] = weights[info.name].detach().float().numpy()
    evaluator = Evaluator(
        Graph(func), len(ids), known, {ATTENTION: attention, EXPERT_LINEAR: expert_linear}, exact=True
    )
    result = evaluator.value(func.body.body)
    return result if isinstance(result, list) else [result]
