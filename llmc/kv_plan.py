"""The KV-cache plan: decided by PlanKVCache, recorded in the manifest, read by kernels and runtime."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# bytes of an element of a page; the last two are codes, which take a scale per token, cached head and side as well
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
# the largest value of a code; a scale is the largest element's size over it, as bfloat16
CODE_RANGE = {"int8": 127.0, "float8_e4m3fn": 448.0}
SCALE_DTYPE, SCALE_BYTES = "bfloat16", 2
QUAD = 4  # codes in a word
# scales below count as zero: their inverse would not be a number
SMALLEST_SCALE = 2.0**-120
KV_DTYPES = tuple(ITEM_BYTES)


def is_coded(dtype: str) -> bool:
    """Whether pages of this type hold codes and scales instead of numbers."""
    return dtype in CODE_RANGE


def storage_dtype(dtype: str) -> str:
    """Type of the pools' tensors."""
    return "uint8" if is_coded(dtype) else dtype


def entry_bytes(dtype: str, dim: int) -> int:
    """Bytes of a token's key or value of `dim` elements in one cached head, with its scale."""
    return padded(dim) + SCALE_BYTES if is_coded(dtype) else dim * ITEM_BYTES[dtype]


def padded(dim: int) -> int:
    """Codes of a key or value, with those that fill its last word."""
    return -(-dim // QUAD) * QUAD


def key_page(dtype: str, key_dim: int, page_size: int) -> tuple[int, ...]:
    """Shape of what one head of one layer has on a page of keys."""
    return (page_size * entry_bytes(dtype, key_dim),) if is_coded(dtype) else (key_dim, page_size)


def value_page(dtype: str, value_dim: int, page_size: int) -> tuple[int, ...]:
    """The same of values."""
    return (page_size * entry_bytes(dtype, value_dim),) if is_coded(dtype) else (page_size, value_dim)


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

    With an 8-bit dtype the pools are bytes, [pages, layers, kv_heads, bytes]. What a head has on a page is codes in words of
    four (element = code * scale), and behind them one bfloat16 scale per token: a page takes its scales along wherever it goes.

        keys    [key_dim / 4, page_size, 4] codes, [page_size] scales    four dims of a token in a word (padded)
        values  [page_size / 4, value_dim, 4] codes, [page_size] scales  four tokens' element of a dim in a word

    A code of int8 is stored with 128 added, one of float8_e4m3fn as its bits.

    Token t of a sequence lives in page ``block_table[b, t // page_size]`` at offset ``t % page_size``;
    ``slot = page * page_size + offset``. Page 0 is never handed out (padding entries of a table point at it).

    Attributes:
        name: ``g0``, ``g1``, ...
        kind: lifetime of the pages.
        layers: attention layers (AttentionAttrs.layer) that own a cache, in the order of the pool's layer axis.
        kv_heads, key_dim, value_dim: shape of one token's entry.
        window: visible tokens for SLIDING_WINDOW, chunk size for CHUNKED, else 0.
        sink_tokens: first tokens of a sequence that stay visible and are never freed (StreamingLLM); 0 = none.
        dtype: float32, float16, bfloat16, int8 or float8_e4m3fn.
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
        each = entry_bytes(self.dtype, self.key_dim)
        if not self.latent:
            each += entry_bytes(self.dtype, self.value_dim)
        return len(self.layers) * self.kv_heads * page_size * each

    @property
    def storage_dtype(self) -> str:
        """Type of the pools' tensors."""
        return storage_dtype(self.dtype)

    @property
    def item_bytes(self) -> int:
        """Bytes of an element of the pools' tensors."""
        return ITEM_BYTES[self.dtype]

    def k_shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        return (pages, len(self.layers), self.kv_heads, *key_page(self.dtype, self.key_dim, page_size))

    def v_shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        return (pages, len(self.layers), self.kv_heads, *value_page(self.dtype, self.value_dim, page_size))

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
