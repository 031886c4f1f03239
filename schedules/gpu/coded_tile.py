"""The plain tile (attention_tile.py) over pages of 8-bit codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from llmc.kv_plan import QUAD, SCALE_DTYPE, padded
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.attention_tile import Tile
from llmc.schedules.kv_codes import word_values


class CodedTile(Tile):
    """A Tile that reads words of four codes, and a scale per key and per value."""

    def _multiply(self, table: Any, key: Any, sums: list[Any]) -> None:
        cfg, ps, pools = self.cfg, self.cfg.page_size, self.args.pools
        part = self._page(table, key, 1)
        base = e.let(part * (cfg.k_part // QUAD) + key % ps)
        with e.loop(padded(cfg.key_dim) // QUAD) as i:
            words = e.let(pools.k_words[base + i * ps])
            for b in range(QUAD):
                value = e.let(word_values(words, b, cfg.kv_dtype, 1))
                # codes that fill the last word up are zero
                d = e.let(T.min(i * QUAD + b, e.i64(cfg.key_dim - 1)))
                for r, s in enumerate(sums):
                    e.store(s, 0, s[0] + self.query[r * cfg.key_dim + d] * value, 1)
        scales, first = pools.key_scales(part)
        scale = e.let(e.widen(scales[first + key % ps], SCALE_DTYPE, 1))
        for s in sums:
            e.store(s, 0, s[0] * scale, 1)

    def _value(self, table: Any, key: Any) -> Callable[[Any], Any]:
        cfg, ps, pools = self.cfg, self.cfg.page_size, self.args.pools
        part = self._page(table, key, 1)
        row = key % ps // QUAD * padded(cfg.value_dim)
        base = e.let(part * (cfg.v_part // QUAD) + row)
        shift = e.let(g.i32(key % QUAD * 8))
        scales, first = pools.value_scales(part)
        scale = e.let(e.widen(scales[first + key % ps], SCALE_DTYPE, 1))

        def element(d: Any) -> Any:
            words = T.shift_right(pools.v_words[base + d], shift)
            return word_values(e.let(words), 0, cfg.kv_dtype, 1) * scale

        return element
