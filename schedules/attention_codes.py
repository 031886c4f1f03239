"""Tiles over cache pages of 8-bit codes: products of codes first, scales of keys and values on scores and weights.

Codes lie in words of four (kv_plan.KVGroup). Prefill lays them out in scratch as float32 or as bf16 pairs, which hold every
code exactly; decode reads words where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.kv_plan import QUAD, SCALE_DTYPE, padded
from llmc.schedules import emit as e
from llmc.schedules.attention_pages import Ahead, in_groups
from llmc.schedules.attention_tile import Tile
from llmc.schedules.kv_codes import word_values
from llmc.schedules.norm import along
from llmc.schedules.tile_attention import UnitTile


class CodedTile(Tile):
    """A Tile over coded pages; in place with floats."""

    def _allocate(self) -> None:
        super()._allocate()
        self.key_scales, self.value_scales = e.workspace(self.block), e.workspace(self.block)

    @property
    def _per_word(self) -> int:
        """Steps in a word."""
        return QUAD // self.pack

    @property
    def _row(self) -> int:
        """Words from four tokens of the values to the next four."""
        return padded(self.cfg.value_dim)

    def _part_of(self, page: Any) -> Any:
        """Number of the part that this layer and head have on a page."""
        return self._page_base(page, 1)

    def _query_operand(self, source: Any, base: Any, j: Any) -> Any:
        """As of Tile; zero behind the last element."""
        dim = self.cfg.key_dim
        if dim % QUAD == 0:
            return super()._query_operand(source, base, j)

        def element(i: Any) -> Any:
            value = self._wide(source[base + T.min(i, e.i64(dim - 1))], 1)
            return tirx.Select(i < dim, value, e.f32(0.0))

        if not self.dot:
            return element(e.i64(j))
        return e.exact_pairs(element(e.i64(2 * j)), element(e.i64(2 * j + 1)), 1)

    def _values_of(self, words: Any, step: int, lanes: int) -> Any:
        """Step `step` of words: float32, or bf16 pairs."""
        kind = self.cfg.kv_dtype
        if not self.dot:
            return word_values(words, step, kind, lanes)
        even, odd = (word_values(words, 2 * step + i, kind, lanes) for i in range(2))
        return e.exact_pairs(even, odd, lanes)

    # -- laid out in scratch -----------------------------------------------------------------------------------------

    def _lay_out_keys(self, page: Any, keys: Any) -> None:
        lanes, ps = self.lanes, self.cfg.page_size
        self._lay_out_scales(page, keys)
        with e.loop(e.ceildiv(keys, ps)) as p:
            base = e.let(self._part_of(page + p) * (self.cfg.k_part // QUAD))
            with e.loop(padded(self.cfg.key_dim) // QUAD) as i:
                for v in range(ps // lanes):
                    words = e.let(e.load(self.args.pools.k_words, base + i * ps + v * lanes, lanes))
                    for s in range(self._per_word):
                        to = (i * self._per_word + s) * self.block + p * ps + v * lanes
                        e.store(self.keys, to, self._values_of(words, s, lanes), lanes)

    def _lay_out_values(self, page: Any, keys: Any) -> None:
        """Whole words of tokens: those behind the last are finite, and have no weight."""
        ps, dv = self.cfg.page_size, self.cfg.value_dim
        with e.loop(e.ceildiv(keys, ps)) as p:
            base = e.let(self._part_of(page + p) * (self.cfg.v_part // QUAD))
            tokens = e.let(T.min(e.i64(ps), keys - p * ps))
            with e.loop(e.ceildiv(tokens, QUAD)) as i:
                row = e.let((p * (ps // QUAD) + i) * (self._per_word * self.value_width))

                def put(d: Any, n: int, row: Any = row, base: Any = base, i: Any = i) -> None:
                    words = e.let(e.some(self.args.pools.v_words, base + i * self._row + d, n))
                    for s in range(self._per_word):
                        at = row + s * self.value_width + d
                        e.store(self.values, at, self._values_of(words, s, n), n)

                along(dv, self.caps, put)

    def _lay_out_scales(self, page: Any, keys: Any) -> None:
        """Scales of a block's keys and values as float32."""
        lanes, ps = self.lanes, self.cfg.page_size
        with e.loop(e.ceildiv(keys, ps)) as p:
            part = self._part_of(page + p)
            for to, (scales, base) in (
                (self.key_scales, self.args.pools.key_scales(part)),
                (self.value_scales, self.args.pools.value_scales(part)),
            ):
                for v in range(ps // lanes):
                    bits = e.load(scales, base + v * lanes, lanes)
                    e.store(to, p * ps + v * lanes, e.widen(bits, SCALE_DTYPE, lanes), lanes)

    # -- scales ------------------------------------------------------------------------------------------------------

    def _softmax(self, first_key: Any, first_position: Any, keys: Any) -> None:
        """As of RunningSoftmax, of the scores times the scales of their keys."""
        lanes = self.lanes
        if not self.direct:
            vectors = e.let(e.ceildiv(keys, lanes))
            with e.loop(self.used) as r, e.loop(vectors) as v:
                at = e.let(r * self.block + v * lanes)
                scaled = e.load(self.scores, at, lanes) * e.load(self.key_scales, v * lanes, lanes)
                e.store(self.scores, at, scaled, lanes)
        super()._softmax(first_key, first_position, keys)

    def _weight_of(self, p: Any, v: Any) -> Any:
        """Times the scale of the value; a weight of 0 may be of no token, and what lies in the place of its scale no number."""
        lanes = self.lanes
        scaled = p * e.load(self.value_scales, v * lanes, lanes)
        return e.let(tirx.Select(p == e.splat(0.0, lanes), e.splat(0.0, lanes), scaled))

    # -- in place ----------------------------------------------------------------------------------------------------

    def _score_pages(self, page: Any, keys: Any, last_page: Any) -> None:
        cfg, ps = self.cfg, self.cfg.page_size
        self._lay_out_scales(page, keys)
        words = padded(cfg.key_dim) // QUAD
        with e.loop(e.ceildiv(keys, ps)) as p:
            base = e.let(self._part_of(page + p) * (cfg.k_part // QUAD))
            pool = (self.args.k, cfg.k_part, padded(cfg.key_dim) * ps)
            self._score(base, p, self._ahead(pool, page, p, last_page, words))

    def _score(self, base: Any, p: Any, ahead: Ahead) -> None:
        """Scores of page p of the block, whose words begin at `base`."""
        cfg, lanes, ps = self.cfg, self.lanes, self.cfg.page_size
        for row in range(0, self.rows_padded, self.row_tile):

            def body(first: Any, vectors: int, row: int = row) -> None:
                self._multiply_words(
                    vectors,
                    padded(cfg.key_dim) // QUAD,
                    lambda r, j, n=1: e.some(self.query, (self.row + row + r) * self.k_steps + j, n),
                    lambda i, v: e.load(self.args.pools.k_words, base + i * ps + (first + v) * lanes, lanes),
                    self.scores,
                    lambda r, v: (row + r) * self.block + p * ps + (first + v) * lanes,
                    (lambda i: ahead.fetch(i, first)) if row == 0 else None,
                    lambda v: e.load(self.key_scales, p * ps + (first + v) * lanes, lanes),
                )

            in_groups(ps // lanes, self.vectors, body)

    def _weigh_pages(self, page: Any, keys: Any, last_page: Any) -> None:
        ps = self.cfg.page_size
        with e.loop(e.ceildiv(keys, ps)) as p:
            base = e.let(self._part_of(page + p) * (self.cfg.v_part // QUAD))
            tokens = e.let(T.min(e.i64(ps), keys - p * ps))
            ahead = self._values_ahead(page, p, last_page)
            self._weigh(base, p, e.let(e.ceildiv(tokens, QUAD)), ahead)

    def _values_ahead(self, page: Any, p: Any, last_page: Any) -> Ahead:
        """What to ask for while page p of a block's values is gone through."""
        ps = self.cfg.page_size
        return self._ahead((self.args.v, self.cfg.v_part, self._row * ps), page, p, last_page, ps // QUAD)

    def _weigh(self, base: Any, p: Any, rows: Any, ahead: Ahead) -> None:
        """Add the weighted values of page p of the block: so many rows of words from `base` on."""
        lanes, stride = self.lanes, self.block // self.pack
        first_step = p * (self.cfg.page_size // self.pack)
        for row in range(0, self.rows_padded, self.row_tile):

            def body(first: Any, vectors: int, row: int = row) -> None:
                self._multiply_words(
                    vectors,
                    rows,
                    lambda r, j, n=1: e.some(self.weights, (row + r) * stride + first_step + j, n),
                    lambda i, v: e.load(
                        self.args.pools.v_words, base + i * self._row + (first + v) * lanes, lanes
                    ),
                    self.out,
                    lambda r, v: (self.row + row + r) * self.value_width + (first + v) * lanes,
                    (lambda i: ahead.fetch(i, first)) if row == 0 else None,
                )

            in_groups(self.cfg.value_dim // lanes, self.vectors, body)

    def _multiply_words(
        self,
        vectors: int,
        count: Any,
        left: Callable[..., Any],
        right: Callable[[Any, int], Any],
        target: Any,
        at: Callable[[int, int], Any],
        fetch: Callable[[Any], None] | None,
        scales: Callable[[int], Any] | None = None,
    ) -> None:
        """One register tile over `count` words: target += left(row, step) x right(word, vector); see Tile._tile.

        With `scales` of vectors, target = what is multiplied with them.
        """
        lanes = self.lanes
        acc = [[e.scratch(lanes) for _ in range(vectors)] for _ in range(self.row_tile)]
        for r in range(self.row_tile):
            for v in range(vectors):
                e.store(
                    acc[r][v], 0, e.splat(0.0, lanes) if scales else e.load(target, at(r, v), lanes), lanes
                )
        with e.loop(count) as i:
            if fetch is not None:
                fetch(i)
            words = [e.let(right(i, v)) for v in range(vectors)]
            for s in range(self._per_word):
                operands = [e.let(self._values_of(w, s, lanes)) for w in words]
                for r in range(self.row_tile):
                    a = e.let(e.splat(left(r, i * self._per_word + s), lanes))
                    for v, b in enumerate(operands):
                        c = e.load(acc[r][v], 0, lanes)
                        e.store(acc[r][v], 0, e.dot_bf16(c, a, b) if self.dot else c + a * b, lanes)
        for r in range(self.row_tile):
            for v in range(vectors):
                value = e.load(acc[r][v], 0, lanes)
                e.store(target, at(r, v), value * scales(v) if scales else value, lanes)


class CodedUnitTile(CodedTile, UnitTile):
    """A UnitTile over coded pages."""
