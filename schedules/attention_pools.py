"""Flat views of a layer group's pools."""

from __future__ import annotations

from typing import Any

from llmc.kv_plan import SCALE_BYTES, SCALE_DTYPE
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig


class Pools:
    """Elements of the pools, codes as signed bytes, and their scales; made inside the root block.

    Args:
        pages: how many, symbolic.
        k_pool, v_pool: the declared tensors; no v_pool where values are a part of the keys.
    """

    def __init__(self, cfg: AttentionConfig, pages: Any, k_pool: Any, v_pool: Any) -> None:
        self.cfg = cfg
        parts = pages * cfg.layers * cfg.kv_heads
        kind = "int8" if cfg.coded else None
        self.k = e.flat(k_pool, _product(parts, cfg.k_page), kind)
        self.v = None if v_pool is None else e.flat(v_pool, _product(parts, cfg.v_page), kind)
        if cfg.coded:
            self._k_scales = e.flat(k_pool, parts * (cfg.k_part // SCALE_BYTES), SCALE_DTYPE)
            self._v_scales = e.flat(v_pool, parts * (cfg.v_part // SCALE_BYTES), SCALE_DTYPE)

    def key_scales(self, part: Any) -> tuple[Any, Any]:
        """(scales as bits, where those of a page's keys begin); part = (page * layers + layer) * kv_heads + head."""
        codes = self.cfg.key_dim * self.cfg.page_size
        return self._k_scales, part * (self.cfg.k_part // SCALE_BYTES) + codes // SCALE_BYTES

    def value_scales(self, part: Any) -> tuple[Any, Any]:
        """The same of values."""
        codes = self.cfg.value_dim * self.cfg.page_size
        return self._v_scales, part * (self.cfg.v_part // SCALE_BYTES) + codes // SCALE_BYTES


def _product(size: Any, shape: tuple[int, ...]) -> Any:
    for extent in shape:
        size = size * extent
    return size
