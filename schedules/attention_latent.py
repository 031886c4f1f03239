"""A tile of attention over latent vectors: one page is both the keys and the values of all heads.

Pages are dim-major, as keys are. The scores' lanes run over tokens, from a block that is laid out once for all heads; the
weighted sum would want token-major values, so its lanes run over query rows instead (there are many: all heads read one
vector), and an element of the page, or a pair of tokens, is broadcast from where it lies:

    out[d, rows] += page[d, token] * weights[token, rows]

Only the softmax's weights are turned around, which are few; nothing of a page is copied for its values.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig, DecodeSchedule, PrefillSchedule
from llmc.schedules.attention_pages import in_groups
from llmc.schedules.attention_tile import Operands, Tile

_NEAR_STEPS = 96  # of which a block of 64 keys takes 24 KB
_LINE = 32  # elements of a cache line, of 16 bits


class LatentTile(Tile):
    """A Tile whose sums are turned: out[value dim, row], rows padded to whole vectors.

    Pages are never read in place for the scores, and there is one cached head.
    """

    def __init__(
        self,
        cfg: AttentionConfig,
        caps: Capabilities,
        args: Operands,
        tokens: int,
        pages: int,
        schedule: PrefillSchedule | DecodeSchedule,
        direct: bool,
        heads: int = 1,
    ) -> None:
        super().__init__(cfg, caps, args, tokens, pages, schedule, direct=False, heads=heads)
        self._tile_rows()
        self.columns = -(-self.rows // self.lanes) * self.lanes  # rows in whole vectors
        whole = cfg.key_dim % self.pack == 0
        self.chunk = next(
            (n for n in range(_NEAR_STEPS, 1, -1) if self.k_steps % n == 0 and whole), self.k_steps
        )
        wide = caps.vector_registers >= 32
        self.side = min(
            4 if wide else 2, self.columns // self.lanes
        )  # vectors of rows whose sums are in registers
        self.dims = (16 if wide else 8) // self.side  # dims likewise

    def _tile_rows(self) -> None:
        """Rows of a register tile: fewer than there could be, where that leaves less of the last tile empty."""

        def cost(size: int) -> float:
            # multiplications of a step, and loads of operands of which two go at a time
            return -(-self.rows // size) * (size * self.vectors + (size + self.vectors) / 2)

        self.row_tile = min(range(self.row_tile, max(1, self.row_tile - 3), -1), key=cost)
        self.rows_padded = -(-self.rows // self.row_tile) * self.row_tile

    def _allocate(self) -> None:
        operand = "int32" if self.dot else "float32"
        self.query = e.workspace(self.rows_padded * self.k_steps, operand)
        self.keys = e.workspace(self.chunk * self.block, operand)
        self.scores = e.workspace(self.rows_padded * self.block)
        self.weights = e.workspace(self.rows_padded * self.block // self.pack, operand)
        self.turned = e.workspace(self.block // self.pack * self.columns, operand)
        self.out = e.workspace(self.cfg.value_dim * self.columns)
        self.line = e.workspace(self.value_width)
        self.largest = e.workspace(self.rows_padded)
        self.total = e.workspace(self.rows_padded * self.lanes)
        self.factor = e.workspace(self.columns)  # by which the sums of a row shrink

    def _clear(self, row: Any) -> None:
        pass  # all rows at once, in start

    def start(self, first_token: Any, kv_head: Any, rows: Any) -> None:
        super().start(first_token, kv_head, rows)
        lanes = self.lanes
        with e.loop(self.cfg.value_dim * self.columns // lanes) as i:
            e.store(self.out, i * lanes, e.splat(0.0, lanes), lanes)
        # columns without a row are multiplied too, and never stored
        zero = e.const("int32", 0, lanes) if self.dot else e.splat(0.0, lanes)
        with e.loop(self.block // self.pack * self.columns // lanes) as i:
            e.store(self.turned, i * lanes, zero, lanes)

    def visit(self, table: Any, first_key: Any, end_key: Any, first_position: Any) -> None:
        """As of Tile."""
        keys = e.let(T.min(e.i64(self.block), end_key - first_key))
        page = e.let(table + first_key // self.cfg.page_size)
        self._scores(page, keys)
        for v in range(self.columns // self.lanes):
            e.store(self.factor, v * self.lanes, e.splat(1.0, self.lanes), self.lanes)
        self._softmax(first_key, first_position, keys)
        steps = self.block // self.pack
        with e.loop(self.used) as r, e.loop(steps) as j:
            e.store(self.turned, j * self.columns + r, self.weights[r * steps + j], 1)
        self._weigh(page, keys, e.let(table + (end_key - 1) // self.cfg.page_size))

    def _scores(self, page: Any, keys: Any) -> None:
        """Scores of all rows, so many steps at a time that what is laid out stays in the nearest cache for all of them."""
        cfg, lanes, ps = self.cfg, self.lanes, self.cfg.page_size
        with e.loop(self.rows_padded * self.block // lanes) as i:
            e.store(self.scores, i * lanes, e.splat(0.0, lanes), lanes)
        with e.loop_or_once(self.k_steps // self.chunk) as number:
            first = e.let(number * self.chunk)
            if self.chunk == self.k_steps:
                self._lay_out_keys(page, keys)
            else:
                with e.loop(e.ceildiv(keys, ps)) as p:
                    base = e.let(self._page_base(page + p, cfg.k_part) + first * (self.pack * ps))
                    with e.loop(self.chunk) as j:
                        for v, vector in enumerate(self._keys(base, j, 0, ps // lanes)):
                            e.store(self.keys, j * self.block + p * ps + v * lanes, vector, lanes)
            with e.loop(e.ceildiv(self.used, self.row_tile)) as group:
                row = e.let(group * self.row_tile)

                def part(start: Any, count: int, row: Any = row) -> None:
                    self._tile(
                        count,
                        self.chunk,
                        lambda r, j, n=1: e.some(self.query, (row + r) * self.k_steps + first + j, n),
                        lambda j, v, n: self._laid_out_keys(j, start + v, n),
                        self.scores,
                        lambda r, v: (row + r) * self.block + (start + v) * lanes,
                        clear=False,
                    )

                in_groups(self.block // lanes, self.vectors, part)

    def _shrink(self, row: Any, factor: Any) -> None:
        e.store(self.factor, row, e.lane(factor, 0), 1)

    def _weigh(self, page: Any, keys: Any, last_page: Any) -> None:
        """Add up the block's values; meanwhile the next block is asked for."""
        in_groups(
            self.columns // self.lanes,
            self.side,
            lambda first, side: in_groups(
                self.cfg.value_dim,
                self.dims,
                lambda dim, dims: self._sums(page, keys, last_page, first, side, dim, dims),
            ),
        )

    def _sums(self, page: Any, keys: Any, last_page: Any, first: Any, side: int, dim: Any, dims: int) -> None:
        """out[dim : dim + dims] of `side` vectors of rows."""
        cfg, lanes, ps = self.cfg, self.lanes, self.cfg.page_size
        at = lambda d, v: (dim + d) * self.columns + (first + v) * lanes  # noqa: E731
        factors = [e.let(e.load(self.factor, (first + v) * lanes, lanes)) for v in range(side)]
        acc = [[e.scratch(lanes) for _ in range(side)] for _ in range(dims)]
        for d in range(dims):
            for v in range(side):
                e.store(acc[d][v], 0, e.load(self.out, at(d, v), lanes) * factors[v], lanes)

        def step(element: Any, row: Any) -> None:
            """element(d) is what is multiplied with the weights at `row`."""
            weights = [e.let(e.load(self.turned, row + v * lanes, lanes)) for v in range(side)]
            for d in range(dims):
                value = e.let(e.splat(element(d), lanes))
                for v in range(side):
                    c = e.load(acc[d][v], 0, lanes)
                    total = e.dot_bf16(c, value, weights[v]) if self.dot else c + value * weights[v]
                    e.store(acc[d][v], 0, total, lanes)

        with e.loop(e.ceildiv(keys, ps)) as p:
            base = self._page_base(page + p, cfg.k_part)
            tokens = e.let(T.min(e.i64(ps), keys - p * ps))
            own = e.let((base + dim * ps) // self.pack)
            row = e.let(p * (ps // self.pack) * self.columns + first * lanes)
            following = T.min(page + p + self.pages, last_page)
            share = dims * self.pack * cfg.key_dim // cfg.value_dim  # elements of a page per step
            ahead = e.let(self._page_base(following, cfg.k_part) + dim * ps * cfg.key_dim // cfg.value_dim)
            with e.loop(tokens // self.pack) as j:
                for i in range(-(-share // _LINE)):
                    e.prefetch(self.args.k, ahead + j * share + i * _LINE, level=2)
                step(lambda d: self._element(own + d * (ps // self.pack) + j), row + j * self.columns)
            if self.dot:
                # an odd number of tokens: what lies behind the last may be NaN, so it is replaced by zero
                with T.If(tokens % 2 == 1), T.Then():
                    j = e.let(tokens // 2)
                    low = lambda d: T.bitwise_and(  # noqa: E731
                        self._element(own + d * (ps // 2) + j), e.const("int32", 0xFFFF, 1)
                    )
                    step(low, row + j * self.columns)
        for d in range(dims):
            for v in range(side):
                e.store(self.out, at(d, v), e.load(acc[d][v], 0, lanes), lanes)

    def _element(self, at: Any) -> Any:
        """An element of the pool as float32, or a pair of tokens."""
        if self.dot:
            return self.args.k_pairs[at]
        return e.widen(self.args.k[at], self.cfg.kv_dtype, 1)

    def row_sums(self, row: Any) -> tuple[Any, Any]:
        with e.loop(self.cfg.value_dim) as d:
            e.store(self.line, d, self.out[d * self.columns + row], 1)
        return self.line, e.i64(0)
