"""What an attention kernel is specialised for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from llmc.kv_plan import is_coded, key_page, storage_dtype, value_page
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu.configs import GpuDecodeSchedule, GpuPrefillSchedule, kind_of


@dataclass(frozen=True)
class PrefillSchedule:
    """How the attention kernel of ``step`` is cut.

    Attributes:
        tile_rows: query rows (tokens x heads per cached head) of a tile.
        keys: keys per block of the running softmax.
        row_tile: most rows whose sums are in registers together.
        vectors: vectors of keys or dims per register tile; 0 = what the registers allow.
    """

    tile_rows: int = 64
    keys: int = 64
    row_tile: int = 6
    vectors: int = 0


@dataclass(frozen=True)
class DecodeSchedule:
    """How the attention kernel of ``decode`` is cut.

    Attributes:
        splits: most pieces that one sequence's context is cut into. It sizes the scratch argument, so all schedules
            of one kernel agree in it.
        keys: keys per block of the running softmax, which is also how far ahead pages are asked for.
        least_keys: a smaller piece of context is not worth a task.
        row_tile, vectors: as in PrefillSchedule.
    """

    splits: int = 8
    keys: int = 64
    least_keys: int = 128
    row_tile: int = 6
    vectors: int = 0


_PREFILL = ByRows((PrefillSchedule(),))
_DECODE = ByRows((DecodeSchedule(),))


@dataclass(frozen=True)
class AttentionConfig:
    """Attention of one layer group over a paged cache; semantics of AttentionAttrs (llmc/ops.py).

    Attributes:
        heads, kv_heads: query heads and cached heads; query head n reads cached head n // (heads // kv_heads).
        key_dim, value_dim: any.
        dtype: of queries and result.
        kv_dtype: of the pages; with int8 and float8_e4m3fn they hold codes and scales (kv_plan.py).
        page_size: tokens per page, a multiple of 16.
        layers: layers in the pool.
        scale, window, chunk, softcap, has_sinks, has_alibi: as in AttentionAttrs.
        sinks_dtype: of the sinks operand; "" = dtype.
        token_major: queries are [1, T, heads, key_dim] instead of [1, heads, T, key_dim].
        prefill: a schedule per number of new tokens.
        decode: a schedule per number of sequences.
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
    prefill: ByRows[PrefillSchedule] = _PREFILL
    decode: ByRows[DecodeSchedule] = _DECODE
    latent: ClassVar[bool] = False  # see LatentConfig

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are no multiple of {self.kv_heads} cached heads")
        if self.page_size % 16:
            raise ValueError(f"page_size {self.page_size} is no multiple of 16")
        if len({choice.splits for choice in self.decode.choices}) > 1:
            raise ValueError(
                "all schedules of a decode kernel must have the same splits: they size its scratch"
            )
        if not self.sinks_dtype:
            object.__setattr__(self, "sinks_dtype", self.dtype)

    @property
    def coded(self) -> bool:
        """Whether pages hold codes and scales."""
        return is_coded(self.kv_dtype)

    @property
    def pool_dtype(self) -> str:
        """Of the pools' tensors."""
        return storage_dtype(self.kv_dtype)

    @property
    def k_page(self) -> tuple[int, ...]:
        """Shape of a head's part of a page of keys."""
        return key_page(self.kv_dtype, self.key_dim, self.page_size)

    @property
    def v_page(self) -> tuple[int, ...]:
        """Shape of a head's part of a page of values."""
        return value_page(self.kv_dtype, self.value_dim, self.page_size)

    @property
    def k_part(self) -> int:
        """Elements of a head's part of a page of keys, with scales."""
        return math.prod(self.k_page)

    @property
    def v_part(self) -> int:
        """Elements of a head's part of a page of values, with scales."""
        return math.prod(self.v_page)

    @property
    def splits(self) -> int:
        """Most pieces that decode cuts one sequence's context into."""
        return self.decode.choices[0].splits

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "prefill": self.prefill.to_json(), "decode": self.decode.to_json()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> AttentionConfig:
        prefill_kind = kind_of(values["prefill"], PrefillSchedule, GpuPrefillSchedule)
        decode_kind = kind_of(values["decode"], DecodeSchedule, GpuDecodeSchedule)
        prefill = ByRows.from_json(prefill_kind, values["prefill"])
        decode = ByRows.from_json(decode_kind, values["decode"])
        return AttentionConfig(**{**values, "prefill": prefill, "decode": decode})


@dataclass(frozen=True)
class LatentConfig(AttentionConfig):
    """Attention over latent vectors (DeepSeek-AI 2024, "DeepSeek-V2", multi-head latent attention, with the projections of
    keys and values absorbed into those of queries and outputs).

    All heads read one vector per token; the value is the first value_dim elements of the key, and there is no pool of values.
    Kernels take no v_pool.
    """

    latent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_heads != 1 or self.value_dim > self.key_dim:
            raise ValueError("latent attention has one cached head, whose values are a part of its keys")
        if self.coded:
            raise ValueError(f"latent attention has no pages of {self.kv_dtype}; f32, f16 and bf16 there are")
