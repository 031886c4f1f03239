"""How a tile of attention reads cache pages: laid out in scratch memory first (prefill), or in place (decode)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.kv_plan import ITEM_BYTES
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig

_LINE = 64  # bytes
PAGES_AHEAD = 2  # of this head: what arrives while a block's scores become weights


class PageReader:
    """The part of a Tile (attention_tile.py) that knows the pages' layout; Tile sets the attributes."""

    cfg: AttentionConfig
    args: Any  # Operands
    lanes: int
    dot: bool  # products of bf16 pairs
    pack: int  # 2 with dot, else 1
    block: int  # keys per block
    vectors: int  # vectors per register tile
    row_tile: int
    rows_padded: int
    k_steps: int
    value_width: int

    # -- pages laid out in scratch (prefill) -------------------------------------------------------------------------

    def _laid_out_key(self, j: Any, v: Any) -> Any:
        return e.load(self.keys, j * self.block + v * self.lanes, self.lanes)

    def _laid_out_value(self, j: Any, v: Any) -> Any:
        return e.load(self.values, j * self.value_width + v * self.lanes, self.lanes)

    def _lay_out_keys(self, page: Any, keys: Any) -> None:
        cfg, lanes, ps = self.cfg, self.lanes, self.cfg.page_size
        with e.loop(e.ceildiv(keys, ps)) as p:
            base = self._page_base(page + p, cfg.key_dim * ps)
            with e.loop(cfg.key_dim // self.pack) as j:
                for v in range(ps // lanes):
                    to = j * self.block + p * ps + v * lanes
                    e.store(self.keys, to, self._key(base, j, v), lanes)
            if cfg.key_dim % self.pack:
                j = self.k_steps - 1
                for v in range(ps // lanes):
                    low = e.load(self.args.k, base + 2 * j * ps + v * lanes, lanes)
                    vector = e.zip_bf16(low, e.const("uint16", 0, lanes))
                    e.store(self.keys, j * self.block + p * ps + v * lanes, vector, lanes)

    def _key(self, base: Any, j: Any, v: Any) -> Any:
        """Vector v of tokens of a key page for step j."""
        k, lanes, ps = self.args.k, self.lanes, self.cfg.page_size
        if not self.dot:
            return e.widen(e.load(k, base + j * ps + v * lanes, lanes), self.cfg.kv_dtype, lanes)
        at = base + 2 * j * ps + v * lanes
        return e.zip_bf16(e.load(k, at, lanes), e.load(k, at + ps, lanes))

    def _lay_out_values(self, page: Any, keys: Any) -> None:
        lanes, ps, dv = self.lanes, self.cfg.page_size, self.cfg.value_dim
        with e.loop(e.ceildiv(keys, ps)) as p:
            base = self._page_base(page + p, ps * dv)
            tokens = e.let(T.min(e.i64(ps), keys - p * ps))
            with e.loop(tokens // self.pack) as j:
                row = e.let((p * (ps // self.pack) + j) * self.value_width)
                for v in range(dv // lanes):
                    e.store(self.values, row + v * lanes, self._value(base, j, v), lanes)
                for d in range(dv // lanes * lanes, dv):
                    e.store(self.values, row + d, self._value_element(base, j, d, True), 1)
            if self.dot:
                # an odd number of tokens: what lies behind the last may be NaN, so it is replaced by zero
                with T.If(tokens % 2 == 1), T.Then():
                    j = e.let(tokens // 2)
                    row = e.let((p * (ps // 2) + j) * self.value_width)
                    with e.loop(dv) as d:
                        e.store(self.values, row + d, self._value_element(base, j, d, False), 1)

    def _value(self, base: Any, j: Any, v: Any) -> Any:
        """Vector v of dims of a value page for step j."""
        buffer, lanes, dv = self.args.v, self.lanes, self.cfg.value_dim
        if not self.dot:
            return e.widen(e.load(buffer, base + j * dv + v * lanes, lanes), self.cfg.kv_dtype, lanes)
        at = base + 2 * j * dv + v * lanes
        return e.zip_bf16(e.load(buffer, at, lanes), e.load(buffer, at + dv, lanes))

    def _value_element(self, base: Any, j: Any, d: Any, both: bool) -> Any:
        buffer, dv = self.args.v, self.cfg.value_dim
        if not self.dot:
            return e.widen(buffer[base + j * dv + d], self.cfg.kv_dtype, 1)
        low = tirx.Cast("int32", buffer[base + 2 * j * dv + d])
        if not both:
            return low
        high = tirx.Cast("int32", buffer[base + (2 * j + 1) * dv + d])
        return T.bitwise_or(low, T.shift_left(high, tirx.IntImm("int32", 16)))

    # -- pages read in place (decode) --------------------------------------------------------------------------------

    def _score_pages(self, page: Any, keys: Any) -> None:
        cfg, lanes, ps = self.cfg, self.lanes, self.cfg.page_size
        k_size, v_size = cfg.key_dim * ps, ps * cfg.value_dim
        count = e.let(e.ceildiv(keys, ps))
        with e.loop(count) as p:
            base = self._page_base(page + p, k_size)
            far = e.let(p + PAGES_AHEAD)
            # behind the last keys come the values of the same pages
            behind = T.min(T.max(e.i64(0), far - count), count - 1)
            ahead = Ahead(
                (self.args.k, self._page_base(page + T.min(far, count - 1), k_size), k_size),
                (self.args.v, self._page_base(page + behind, v_size), v_size),
                e.let(far >= count),
                self.k_steps,
                _LINE // ITEM_BYTES[cfg.kv_dtype],
            )
            for group in range(self.rows_padded // self.row_tile):
                row = group * self.row_tile

                def body(
                    first: Any,
                    vectors: int,
                    row: int = row,
                    base: Any = base,
                    p: Any = p,
                    ahead: Ahead | None = ahead if group == 0 else None,
                ) -> None:
                    def right(j: Any, v: int) -> Any:
                        if ahead is not None and v == 0:
                            ahead.fetch(j, first)
                        return self._key(base, j, first + v)

                    self._tile(
                        vectors,
                        self.k_steps,
                        lambda r, j, n=1: e.some(self.query, (row + r) * self.k_steps + j, n),
                        right,
                        self.scores,
                        lambda r, v: (row + r) * self.block + p * ps + (first + v) * lanes,
                        True,
                    )

                in_groups(ps // lanes, self.vectors, body)

    def _weigh_pages(self, page: Any, keys: Any, last_page: Any) -> None:
        cfg, lanes, ps, dv = self.cfg, self.lanes, self.cfg.page_size, self.cfg.value_dim
        k_size, v_size = cfg.key_dim * ps, ps * dv
        count = e.let(e.ceildiv(keys, ps))
        with e.loop(count) as p:
            base = self._page_base(page + p, v_size)
            tokens = e.let(T.min(e.i64(ps), keys - p * ps))
            far = e.let(p + PAGES_AHEAD)
            # behind the last values come the keys of the next block
            ahead = Ahead(
                (self.args.v, self._page_base(page + T.min(far, count - 1), v_size), v_size),
                (self.args.k, self._page_base(T.min(page + far, last_page), k_size), k_size),
                e.let(far >= count),
                ps // self.pack,
                _LINE // ITEM_BYTES[cfg.kv_dtype],
            )
            for group in range(self.rows_padded // self.row_tile):
                row = group * self.row_tile

                def body(
                    first: Any,
                    vectors: int,
                    row: int = row,
                    base: Any = base,
                    p: Any = p,
                    tokens: Any = tokens,
                    ahead: Ahead | None = ahead if group == 0 else None,
                ) -> None:
                    steps = e.let(tokens // self.pack)
                    stride = self.block // self.pack
                    first_step = p * (ps // self.pack)
                    left = lambda r, j, n=1: e.some(self.weights, (row + r) * stride + first_step + j, n)  # noqa: E731
                    at = lambda r, v: (row + r) * self.value_width + (first + v) * lanes  # noqa: E731

                    def right(j: Any, v: int) -> Any:
                        if ahead is not None and v == 0:
                            ahead.fetch(j, first)
                        return self._value(base, j, first + v)

                    def unpaired(v: int) -> Any:
                        low = e.load(self.args.v, base + 2 * steps * dv + (first + v) * lanes, lanes)
                        return e.zip_bf16(low, e.const("uint16", 0, lanes))

                    self._tile(vectors, steps, left, right, self.out, at, False)
                    if self.dot:
                        with T.If(tokens % 2 == 1), T.Then():
                            self._tile(
                                vectors,
                                0,
                                lambda r, j, n=1: left(r, steps, n),
                                right,
                                self.out,
                                at,
                                False,
                                unpaired,
                            )

                in_groups(dv // lanes, self.vectors, body)


@dataclass(frozen=True)
class Ahead:
    """Page parts that are read soon: while one is gone through step by step, another is asked for.

    A head's part of a page is a few KB, the next one lies elsewhere: too short for the streams that processors find by
    themselves. Memory is then busy also while scores become weights, and from the last page of keys to the first one of
    values.

    Attributes:
        own, other: (buffer, element at which the part begins, its elements); of the pages that are gone through, and
            of those that come behind them.
        behind: whether the part to ask for is `other`.
        steps: in which all of it is to be asked for.
        line: elements of a cache line.
    """

    own: tuple[Any, Any, int]
    other: tuple[Any, Any, int]
    behind: Any
    steps: int
    line: int

    def fetch(self, step: Any, first: Any) -> None:
        """Ask for a step's share, once for all groups of vectors; `first` = the first vector of the group."""
        if isinstance(first, int):
            if first == 0:
                self._either(step)
            return
        with T.If(first == 0), T.Then():
            self._either(step)

    def _either(self, step: Any) -> None:
        with T.If(self.behind):
            with T.Then():
                self._share(self.other, step)
            with T.Else():
                self._share(self.own, step)

    def _share(self, part: tuple[Any, Any, int], step: Any) -> None:
        buffer, base, size = part
        share = -(-size // self.steps)
        for i in range(-(-share // self.line)):
            e.prefetch(buffer, base + step * share + i * self.line, level=2)


def in_groups(count: int, size: int, body: Callable[[Any, int], None]) -> None:
    """body(first, n) for `count` things in groups of `size` and a smaller rest."""
    if count >= 2 * size:
        with e.loop(count // size) as i:
            body(e.let(i * size), size)
        done = count // size * size
    else:
        done = 0
    while done < count:
        body(done, min(size, count - done))
        done += min(size, count - done)
