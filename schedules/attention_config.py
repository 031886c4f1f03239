"""What an attention kernel is specialised for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionConfig:
    """Attention of one layer group over a paged cache; semantics of AttentionAttrs (llmc/ops.py).

    Attributes:
        heads, kv_heads: query heads and cached heads; query head n reads cached head n // (heads // kv_heads).
        key_dim, value_dim: any.
        dtype: of queries and result.
        kv_dtype: of the pages.
        page_size: tokens per page, a multiple of 16.
        layers: layers in the pool.
        scale, window, chunk, softcap, has_sinks, has_alibi: as in AttentionAttrs.
        sinks_dtype: of the sinks operand; "" = dtype.
        token_major: queries are [1, T, heads, key_dim] instead of [1, heads, T, key_dim].
        splits: most pieces that decode cuts one sequence's context into.
        tile_rows: query rows (tokens x heads per cached head) of a prefill tile.
        prefill_keys, decode_keys: keys per block of the running softmax.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    kv_dtype: str
    page_size: int
    layers: int
    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    has_alibi: bool = False
    sinks_dtype: str = ""
    token_major: bool = False
    splits: int = 8
    tile_rows: int = 64
    prefill_keys: int = 64
    decode_keys: int = 256

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are no multiple of {self.kv_heads} cached heads")
        if self.page_size % 16:
            raise ValueError(f"page_size {self.page_size} is no multiple of 16")
        if not self.sinks_dtype:
            object.__setattr__(self, "sinks_dtype", self.dtype)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> AttentionConfig:
        return AttentionConfig(**values)
