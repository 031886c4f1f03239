"""PlanKVCache: decide pages, groups and sharing of the KV cache from the attention ops of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmc.errors import LlmcError
from llmc.ir import match_opaque
from llmc.kv_plan import KV_DTYPES, KVGroup, KVKind, KVPlan, is_coded
from llmc.ops import ATTENTION, AttentionAttrs
from llmc.passes.rewrite import Graph
from llmc.passes.step_module import LoweredGraph

# kind, window, cached heads, key dim, value dim, dtype, latent
_Key = tuple[KVKind, int, int, int, int, str, bool]


class PlanKVCache:
    """Group the attention layers of ``main`` by the shape and the lifetime of their cache.

    before: attention(q0, k0, v0, window=0) ... attention(q1, k1, v1, window=64) ... attention(q2, k0, v0)
    after:  KVPlan(g0: full [layer 0], g1: sliding_window(64) [layer 1], shared: layer 2 reads layer 0)

    An analysis: the module is not changed. Runs after RaiseAttention (every attention block is an op then),
    before MakeStepFunction, which needs the plan.
    """

    def __init__(self, *, page_size: int, kv_dtype: str | None, max_seq_len: int) -> None:
        self.page_size = page_size
        self.kv_dtype = kv_dtype
        self.max_seq_len = max_seq_len

    def __call__(self, lowered: LoweredGraph) -> KVPlan:
        func = lowered.module["main"]
        graph = Graph(func)
        owner_of: dict[tuple[object, object], int] = {}
        shared: list[tuple[int, int]] = []
        members: dict[_Key, list[int]] = {}
        key_of_owner: dict[int, _Key] = {}
        for attrs, k, v in attention_layers(graph):
            operands = (graph.source(k), graph.source(v))
            kind, window = self._lifetime(attrs)
            if operands in owner_of:
                owner = owner_of[operands]
                shared.append((attrs.layer, owner))
                widened = _wider(key_of_owner[owner], kind, window)
                if widened != key_of_owner[owner]:  # the reader needs more of the past than the owner
                    members[key_of_owner[owner]].remove(owner)
                    members.setdefault(widened, []).append(owner)
                    key_of_owner[owner] = widened
                continue
            dtype = self.kv_dtype or str(k.ty.dtype)
            if dtype not in KV_DTYPES:
                raise LlmcError(
                    "kv-dtype",
                    f"The KV cache must be f32, f16, bf16, int8 or fp8; layer {attrs.layer} has {dtype}.",
                )
            if attrs.latent and is_coded(dtype):
                raise LlmcError(
                    "kv-dtype-latent",
                    f"The cache of latents must be f32, f16 or bf16 (layer {attrs.layer} has latent attention), found {dtype}.",
                    hint="Use --kv-dtype bf16, or keep keys and values expanded with --disable-pass AbsorbLatent.",
                )
            value_dim = attrs.latent or int(v.ty.shape[3])
            heads, key_dim = int(k.ty.shape[1]), int(k.ty.shape[3])
            key = (kind, window, heads, key_dim, value_dim, dtype, attrs.latent > 0)
            owner_of[operands] = attrs.layer
            key_of_owner[attrs.layer] = key
            members.setdefault(key, []).append(attrs.layer)
        ordered = sorted((layers, key) for key, layers in members.items() if layers)
        groups = tuple(
            KVGroup(
                name=f"g{i}",
                kind=kind,
                layers=tuple(sorted(layers)),
                kv_heads=heads,
                key_dim=key_dim,
                value_dim=value_dim,
                window=window,
                sink_tokens=0,
                dtype=dtype,
                latent=latent,
            )
            for i, (layers, (kind, window, heads, key_dim, value_dim, dtype, latent)) in enumerate(ordered)
        )
        return KVPlan(self.page_size, groups, tuple(shared))

    def _lifetime(self, attrs: AttentionAttrs) -> tuple[KVKind, int]:
        """Windows and chunks that no sequence can outgrow are full caches."""
        if 0 < attrs.window < self.max_seq_len:
            return KVKind.SLIDING_WINDOW, attrs.window
        if 0 < attrs.chunk < self.max_seq_len:
            return KVKind.CHUNKED, attrs.chunk
        return KVKind.FULL, 0


def attention_layers(graph: Graph) -> Iterator[tuple[AttentionAttrs, Any, Any]]:
    """(attributes, k, v) of every attention op, in order."""
    for binding in graph.bindings:
        match = match_opaque(binding.value, ATTENTION)
        if match:
            operands, text = match
            yield AttentionAttrs.from_json(text), operands[1], operands[2]


def _wider(key: _Key, kind: KVKind, window: int) -> _Key:
    """The key of a group that keeps enough for its owner and for a reader of the given lifetime."""
    if (key[0], key[1]) == (kind, window):
        return key
    if key[0] == kind == KVKind.SLIDING_WINDOW:
        return (kind, max(key[1], window), *key[2:])
    return (KVKind.FULL, 0, *key[2:])
