"""The KV-cache plan: decided by PlanKVCache, recorded in the manifest, read by kernels and runtime."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class KVKind(str, Enum):
    """How much of the past a group of layers keeps."""

    FULL = "full"
    SLIDING_WINDOW = "sliding_window"  # pages that lie wholly behind the window are freed
    CHUNKED = "chunked"  # only the current chunk is visible; earlier pages are freed
    RECURRENT = "recurrent"  # reserved: a fixed-size state per sequence


@dataclass(frozen=True)
class KVGroup:
    """Layers that share one page table because their caches have the same shape and the same lifetime.

    Pools of a group, one tensor each for keys and values (layer = index within the group):

        k_pool [pages, layers, kv_heads, key_dim, page_size]       dim-major: lanes run over tokens
        v_pool [pages, layers, kv_heads, page_size, value_dim]     token-major: lanes run over dims; none of latents

    Token t of a sequence lives in page ``block_table[b, t // page_size]`` at offset ``t % page_size``;
    ``slot = page * page_size + offset``. Page 0 is never handed out (padding entries of a table point at it).

    Attributes:
        name: ``g0``, ``g1``, ...
        kind: lifetime of the pages.
        layers: attention layers (AttentionAttrs.layer) that own a cache, in the order of the pool's layer axis.
        kv_heads, key_dim, value_dim: shape of one token's entry.
        window: visible tokens for SLIDING_WINDOW, chunk size for CHUNKED, else 0.
        sink_tokens: first tokens of a sequence that stay visible and are never freed (StreamingLLM); 0 = none.
        dtype: float32, float16 or bfloat16.
        latent: values are the first value_dim elements of keys (multi-head latent attention); there is no v_pool.
    """

    name: str
    kind: KVKind
    layers: tuple[int, ...]
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    sink_tokens: int
    dtype: str
    latent: bool = False

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one page over all layers of the group, keys and values."""
        item = 4 if self.dtype == "float32" else 2
        width = self.key_dim + (0 if self.latent else self.value_dim)
        return len(self.layers) * self.kv_heads * page_size * width * item

    def k_shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        return (pages, len(self.layers), self.kv_heads, self.key_dim, page_size)

    def v_shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        return (pages, len(self.layers), self.kv_heads, page_size, self.value_dim)

    def pool_shapes(self, pages: int, page_size: int) -> tuple[tuple[int, ...], ...]:
        """Of every pool of the group, in the order in which the step functions take them."""
        keys = self.k_shape(pages, page_size)
        return (keys,) if self.latent else (keys, self.v_shape(pages, page_size))


@dataclass(frozen=True)
class KVPlan:
    """The whole cache of a model.

    Attributes:
        page_size: tokens per page, the same for all groups.
        groups: page tables, in the order in which the step functions take them.
        shared: pairs (layer, owner): attention layers that read the cache of another layer and write none.
    """

    page_size: int
    groups: tuple[KVGroup, ...]
    shared: tuple[tuple[int, int], ...] = ()

    def locate(self, layer: int) -> tuple[int, int]:
        """(index of the group, index of the layer within the group) whose pages attention `layer` reads."""
        owner = dict(self.shared).get(layer, layer)
        for g, group in enumerate(self.groups):
            if owner in group.layers:
                return g, group.layers.index(owner)
        raise KeyError(layer)

    def bytes_per_token(self) -> float:
        """Cache bytes that one token takes in all groups."""
        return sum(group.page_bytes(self.page_size) for group in self.groups) / self.page_size
