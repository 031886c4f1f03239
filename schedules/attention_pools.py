"""Flat views of a layer group's pools."""

from __future__ import annotations

from typing import Any

from llmc.kv_plan import QUAD, SCALE_BYTES, SCALE_DTYPE
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig


class Pools:
    """Elements of the pools; of coded ones bytes, words of four codes, and scales as bits. Made inside the root block.

    Places are counted from the beginning of a part: what a head has on a page,
    part = (page * layers + layer) * kv_heads + head.

    Args:
        pages: how many, symbolic.
        k_pool, v_pool: the declared tensors; no v_pool where values are a part of the keys.
    """

    def __init__(self, cfg: AttentionConfig, pages: Any, k_pool: Any, v_pool: Any) -> None:
        self.cfg = cfg
        parts = pages * cfg.layers * cfg.kv_heads
        self.k = e.flat(k_pool, _product(parts, cfg.k_page))
        self.v = None if v_pool is None else e.flat(v_pool, _product(parts, cfg.v_page))
        if cfg.coded:
            self.k_words = e.flat(k_pool, parts * (cfg.k_part // QUAD), "int32")
            self.v_words = e.flat(v_pool, parts * (cfg.v_part // QUAD), "int32")
            self._k_scales = e.flat(k_pool, parts * (cfg.k_part // SCALE_BYTES), SCALE_DTYPE)
            self._v_scales = e.flat(v_pool, parts * (cfg.v_part // SCALE_BYTES), SCALE_DTYPE)

    def key_scales(self, part: Any) -> tuple[Any, Any]:
        """(scales, where those of a part of the keys begin)."""
        return self._k_scales, part * (self.cfg.k_part // SCALE_BYTES) + self._before(self.cfg.k_part)

    def value_scales(self, part: Any) -> tuple[Any, Any]:
        """The same of values."""
        return self._v_scales, part * (self.cfg.v_part // SCALE_BYTES) + self._before(self.cfg.v_part)

    def _before(self, part: int) -> int:
        """Scales that would fit into the codes of a part of so many bytes."""
        return part // SCALE_BYTES - self.cfg.page_size


def _product(size: Any, shape: tuple[int, ...]) -> Any:
    for extent in shape:
        size = size * extent
    return size
