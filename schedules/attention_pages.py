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


class PageReader:
    """The part of a Tile (attention_tile.py) that knows the pages' layout; Tile sets the attributes."""

    cfg: AttentionConfig
    args: Any  # Operands
    lanes: int
    direct: bool
    heads: int  # neighbouring cached heads of the tile
    first_head: Any
    kv_head: Any  # the one that is gone through
    row: Any  # its first row
    pages: int  # per block
    dot: bool  # products of bf16 pairs
    pack: int  # 2 with dot, else 1
    block: int  # keys per block
    vectors: int  # vectors per register tile
    row_tile: int
    rows_padded: int
    k_steps: int
    value_width: int

    # -- pages laid out in scratch (prefill) -------------------------------------------------------------------------

    def _laid_out_keys(self, j: Any, first: Any, count: int) -> list[Any]:
        at = lambda v: j * self.block + (first + v) * self.lanes  # noqa: E731
        return [e.load(self.keys, at(v), self.lanes) for v in range(count)]

    def _laid_out_values(self, j: Any, first: Any, count: int) -> list[Any]:
        at = lambda v: j * self.value_width + (first + v) * self.lanes  # noqa: E731
        return [e.load(self.values, at(v), self.lanes) for v in range(count)]

    def _lay_out_keys(self, page: Any, keys: Any) -> None:
        cfg, lanes, ps = self.cfg, self.lanes, self.cfg.page_size
        with e.loop(e.ceildiv(keys, ps)) as p:
            base = self._page_base(page + p, cfg.k_part)
            with e.loop(cfg.key_dim // self.pack) as j:
                for v, vector in enumerate(self._keys(base, j, 0, ps // lanes)):
                    e.store(self.keys, j * self.block + p * ps + v * lanes, vector, lanes)
            if cfg.key_dim % self.pack:
                j = self.k_steps - 1
                for v in range(ps // lanes):
                    vector = self._pairs(self.args.k, base + 2 * j * ps + v * lanes, None)
                    e.store(self.keys, j * self.block + p * ps + v * lanes, vector, lanes)

    def _keys(self, base: Any, j: Any, first: Any, count: int) -> list[Any]:
        """Vectors first .. first + count - 1 of tokens of a key page for step j."""
        return self._vectors_of(
            self.args.k, base + self.pack * j * self.cfg.page_size, self.cfg.page_size, first, count
        )

    def _vectors_of(self, buffer: Any, row: Any, size: int, first: Any, count: int) -> list[Any]:
        """Vectors of the operand of a step, whose elements of a page (or two rows of `size` elements) begin at `row`."""
        lanes = self.lanes
        at = lambda v: row + (first + v) * lanes  # noqa: E731
        if not self.dot:
            return [self._elements(buffer, at(v), lanes) for v in range(count)]
        vectors: list[Any] = []
        for v in range(0, count - 1, 2):
            vectors += e.zip_bf16_halves(*(e.load(buffer, at(v) + i * size, 2 * lanes) for i in (0, 1)))
        if count % 2:
            vectors.append(self._pairs(buffer, at(count - 1), size))
        return vectors

    def _elements(self, buffer: Any, at: Any, lanes: int) -> Any:
        """float32 of neighbouring elements of a page."""
        return e.widen(e.some(buffer, at, lanes), self.cfg.kv_dtype, lanes)

    def _pairs(self, buffer: Any, at: Any, ahead: int | None) -> Any:
        """bf16 pairs of a vector of elements and of the one that lies `ahead` elements further; None: of zeros."""
        lanes = self.lanes
        second = e.const("uint16", 0, lanes) if ahead is None else e.load(buffer, at + ahead, lanes)
        return e.zip_bf16(e.load(buffer, at, lanes), second)

    def _lay_out_values(self, page: Any, keys: Any) -> None:
        lanes, ps, dv = self.lanes, self.cfg.page_size, self.cfg.value_dim
        with e.loop(e.ceildiv(keys, ps)) as p:
            base = self._page_base(page + p, self.cfg.v_part)
            tokens = e.let(T.min(e.i64(ps), keys - p * ps))
            with e.loop(tokens // self.pack) as j:
                row = e.let((p * (ps // self.pack) + j) * self.value_width)
                for v, vector in enumerate(self._values(base, j, 0, dv // lanes)):
                    e.store(self.values, row + v * lanes, vector, lanes)
                for d in range(dv // lanes * lanes, dv):
                    e.store(self.values, row + d, self._value_element(base, j, d, True), 1)
            if self.dot:
                # an odd number of tokens: what lies behind the last may be NaN, so it is replaced by zero
                with T.If(tokens % 2 == 1), T.Then():
                    j = e.let(tokens // 2)
                    row = e.let((p * (ps // 2) + j) * self.value_width)
                    with e.loop(dv) as d:
                        e.store(self.values, row + d, self._value_element(base, j, d, False), 1)

    def _values(self, base: Any, j: Any, first: Any, count: int) -> list[Any]:
        """Vectors first .. first + count - 1 of dims of a value page for step j."""
        dv = self.cfg.value_dim
        return self._vectors_of(self.args.v, base + self.pack * j * dv, dv, first, count)

    def _value_element(self, base: Any, j: Any, d: Any, both: bool) -> Any:
        buffer, dv = self.args.v, self.cfg.value_dim
        if not self.dot:
            return self._elements(buffer, base + j * dv + d, 1)
        at = base + 2 * j * dv + d
        low = tirx.Cast("int32", buffer[at])
        if not both:
            return low
        high = tirx.Cast("int32", buffer[at + dv])
        return T.bitwise_or(low, T.shift_left(high, tirx.IntImm("int32", 16)))

    # -- pages read in place (decode) --------------------------------------------------------------------------------

    def fetch_first(self, table: Any, first_key: Any, end_key: Any) -> None:
        """Ask for the first block, which no block before it does; before `start`."""
        if not self.direct:
            return
        cfg, ps = self.cfg, self.cfg.page_size
        count = T.min(e.i64(self.pages), e.ceildiv(end_key - first_key, ps))
        for buffer, size in ((self.args.k, cfg.k_part), (self.args.v, cfg.v_part)):
            with e.loop(count) as p:
                base = self._page_base(table + first_key // ps + p, size, self.first_head)
                line = _LINE // ITEM_BYTES[cfg.kv_dtype]
                with e.loop(self.heads * size // line) as i:
                    e.prefetch(buffer, base + i * line, level=2)

    def _ahead(self, pool: tuple[Any, int, int], page: Any, p: Any, last_page: Any, steps: int) -> Ahead:
        """What to ask for while page p of a block is gone through: a part of the next block.

        Heads take turns block by block, but their parts are asked for in the order of memory, page by page: the parts of
        neighbouring heads make one piece.

        Args:
            pool: (buffer, elements of a head's part of a page, the same without scales).
        """
        number = e.let((self.kv_head - self.first_head) * self.pages + p)
        far = T.min(page + self.pages + T.truncdiv(number, self.heads), last_page)
        head = self.first_head + T.truncmod(number, self.heads)
        line = _LINE // ITEM_BYTES[self.cfg.kv_dtype]
        buffer, part, size = pool
        return Ahead(buffer, self._page_base(far, part, head), size, steps, line, self.cfg.coded)

    def _score_pages(self, page: Any, keys: Any, last_page: Any) -> None:
        cfg, lanes, ps = self.cfg, self.lanes, self.cfg.page_size
        k_size = cfg.key_dim * ps
        with e.loop(e.ceildiv(keys, ps)) as p:
            base = self._page_base(page + p, cfg.k_part)
            ahead = self._ahead((self.args.k, cfg.k_part, k_size), page, p, last_page, self.k_steps)
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
                    def right(j: Any, v: int, n: int) -> list[Any]:
                        if ahead is not None and v == 0:
                            ahead.fetch(j, first)
                        return self._keys(base, j, first + v, n)

                    self._tile(
                        vectors,
                        self.k_steps,
                        lambda r, j, n=1: e.some(self.query, (self.row + row + r) * self.k_steps + j, n),
                        right,
                        self.scores,
                        lambda r, v: (row + r) * self.block + p * ps + (first + v) * lanes,
                        True,
                    )

                in_groups(ps // lanes, self.vectors, body)

    def _weigh_pages(self, page: Any, keys: Any, last_page: Any) -> None:
        cfg, lanes, ps, dv = self.cfg, self.lanes, self.cfg.page_size, self.cfg.value_dim
        with e.loop(e.ceildiv(keys, ps)) as p:
            base = self._page_base(page + p, cfg.v_part)
            tokens = e.let(T.min(e.i64(ps), keys - p * ps))
            ahead = self._ahead((self.args.v, cfg.v_part, ps * dv), page, p, last_page, ps // self.pack)
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
                    at = lambda r, v: (self.row + row + r) * self.value_width + (first + v) * lanes  # noqa: E731

                    def right(j: Any, v: int, n: int) -> list[Any]:
                        if ahead is not None and v == 0:
                            ahead.fetch(j, first)
                        return self._values(base, j, first + v, n)

                    def unpaired(v: int) -> Any:
                        return self._pairs(self.args.v, base + 2 * steps * dv + (first + v) * lanes, None)

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
    """A page part that is read soon: while one is gone through step by step, another is asked for.

    A head's part of a page is a few KB, the next one lies elsewhere: too short for the streams that processors find by
    themselves.

    Attributes:
        buffer, base, size: the part to ask for begins at buffer[base] and has `size` elements, without scales.
        steps: in which all of it is to be asked for.
        line: elements of a cache line.
        scales: whether there are some behind the elements.
    """

    buffer: Any
    base: Any
    size: int
    steps: int
    line: int
    scales: bool

    def fetch(self, step: Any, first: Any) -> None:
        """Ask for a step's share, once for all groups of vectors; `first` = the first vector of the group."""
        if isinstance(first, int):
            if first == 0:
                self._share(step)
            return
        with T.If(first == 0), T.Then():
            self._share(step)

    def _share(self, step: Any) -> None:
        share = -(-self.size // self.steps)
        for i in range(-(-share // self.line)):
            e.prefetch(self.buffer, self.base + step * share + i * self.line, level=2)
        if self.scales:
            with T.If(step == 0), T.Then():
                e.prefetch(self.buffer, self.base + self.size, level=2)


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
