"""One warp's rows against a tile of keys in shared memory, on the matrix units (Dao 2023, "FlashAttention-2").

Scores and weights never leave the registers: the weights of one matmul are the first operand of the next one as they lie.
Exponents are in units of log 2, so that a weight costs one fma and one ex2; the scale of the scores is in the fma.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_tile import Operands
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.attention_pages import PAD, PageTiles
from llmc.schedules.gpu.attention_tile import heads_per_tile
from llmc.schedules.gpu.qcodes import pack

LN2, _LOG2E = math.log(2.0), 1.0 / math.log(2.0)
_LOWEST, _MASKED = -1e30, -1e29  # of what was masked; scores below the second were
_HELD = 128  # largest head whose query stays in registers (of 16 rows per warp)


def takes(cfg: AttentionConfig, caps: Capabilities) -> bool:
    """Whether heads are of a size and type that the matrix units take."""
    has = {"bfloat16": caps.has_mma_bf16, "float16": caps.has_mma_f16}.get(cfg.dtype, False)
    sizes = cfg.key_dim % 16 == 0 and cfg.value_dim % 16 == 0
    pages = cfg.kv_dtype == cfg.dtype or (cfg.coded and caps.has_mma_bf16)
    return has and caps.has_async_copy and pages and sizes and cfg.scale > 0


class HeadTile:
    """The memory of a block, and the cached head and query heads that it works for; made inside the launch.

    Args:
        cut: how the block is cut; it knows its `shared_bytes(cfg)`.
        unit_number: number of the (cached head, share of its query heads).
    """

    def __init__(
        self,
        cfg: AttentionConfig,
        caps: Capabilities,
        args: Operands,
        cut: Any,
        thread: Any,
        unit_number: Any,
    ) -> None:
        self.cfg, self.caps, self.args, self.cut, self.thread = cfg, caps, args, cut, thread
        group, self.share = cfg.heads // cfg.kv_heads, heads_per_tile(cfg)
        shares = group // self.share
        self.kv_head = g.held(unit_number // shares)
        self.first_head = g.held(self.kv_head * group + unit_number % shares * self.share)
        self.memory = g.arena(cut.shared_bytes(cfg))


def query_line(cfg: AttentionConfig) -> int:
    """Elements from one row of queries in shared memory to the next."""
    return cfg.key_dim + PAD


class Fragment:
    """A thread's four sums of 16 rows by 8 columns, in registers of their own or as a part of more."""

    def __init__(self, registers: Any, first: int = 0) -> None:
        self.registers, self._first = registers, first

    def __getitem__(self, i: int) -> Any:
        return self.registers[self._first + i]

    def put(self, i: int, value: Any) -> None:
        e.store(self.registers, self._first + i, value, 1)


class WarpTile:
    """Registers and steps of a warp.

    Args:
        pages: the tiles of keys.
        query: where the block's queries begin in the same memory, row by row.
        first_row: the warp's first row; rows are heads of neighbouring tokens, row = token * share + head.
        position: of row 0's token in its sequence, int32.
        first_head: of row 0.
        tiles: of 16 rows.
    """

    def __init__(
        self,
        cfg: AttentionConfig,
        caps: Capabilities,
        args: Operands,
        pages: PageTiles,
        query: int,
        lane: Any,
        first_row: Any,
        position: Any,
        first_head: Any,
        share: int,
        tiles: int = 1,
    ) -> None:
        self.cfg, self.caps, self.args, self.pages, self.lane = cfg, caps, args, pages, lane
        self.query, self.first_row, self.share, self.tiles = query, first_row, share, tiles
        self.first_head = first_head
        self.plain = not cfg.softcap and args.alibi is None
        # what scores are multiplied with to become exponents of 2
        self.unit = cfg.scale * _LOG2E if self.plain else 1.0
        # thread l holds rows l / 4 and l / 4 + 8 of each tile
        self.rows = [
            [e.let(first_row + lane // 4 + (16 * m + 8 * i)) for i in range(2)] for m in range(tiles)
        ]
        self.places = [[g.held(position + row // share) for row in rows] for rows in self.rows]
        self.first_place = g.held(position + first_row // share)
        self.last_place = g.held(position + (first_row + (16 * tiles - 1)) // share)
        self._query_at = g.held((first_row + lane % 16) * query_line(cfg) + (query + lane // 16 * 8))
        self.out = self._sums()
        self.largest, self.total = ([[g.local(1) for _ in range(2)] for _ in range(tiles)] for _ in range(2))
        self._held: list[Any] = []

    def one_place(self, position: Any) -> None:
        """All rows are of the token at `position` (int32), also those that fill the tile up."""
        self.first_place = self.last_place = position
        self.places = [[self.first_place] * 2 for _ in self.rows]

    def _sums(self) -> list[list[Fragment]]:
        return [[Fragment(g.local(4)) for _ in range(self.columns // 8)] for _ in range(self.tiles)]

    @property
    def columns(self) -> int:
        """Elements of the value that the warp adds up."""
        return self.cfg.value_dim

    @property
    def _first_column(self) -> Any:
        """Key of the thread's first score, from the first of the tile."""
        return self.lane % 4 * 2

    def _column(self, n: int, j: int) -> int:
        """Key of score j of the n-th 8 columns, from the thread's first."""
        return n * 8 + j

    @property
    def steps(self) -> int:
        """Of 16 elements of the key that the warp multiplies."""
        return self.cfg.key_dim // 16

    @property
    def kept_steps(self) -> int:
        """Of so many steps the queries stay in registers; of the others they are read again for each tile of keys."""
        return self.steps if self.tiles == 1 and self.cfg.key_dim <= _HELD else 0

    def start(self) -> None:
        """Clear the running softmax; if queries are kept, they are in shared memory, behind a barrier."""
        for m in range(self.tiles):
            for registers in self.out[m]:
                for i in range(4):
                    registers.put(i, e.f32(0.0))
            for i in range(2):
                e.store(self.largest[m][i], 0, e.f32(_LOWEST), 1)
                e.store(self.total[m][i], 0, e.f32(0.0), 1)
        self._held = [self._query(0, step) for step in range(self.kept_steps)]

    def _query(self, m: int, step: int) -> Any:
        registers = g.local(4, "uint32")
        at = self._query_at + (16 * m * query_line(self.cfg) + step * 16)
        unit.load_x4(registers, self.pages.memory, at)
        return registers

    def _corner(self, base: Any, line: int) -> Any:
        """Where the lane's row of the first 16 x 16 of a tile begins, for `_transposed`."""
        return g.held(base + (self.lane % 16 * line + self.lane // 16 * 8))

    def _transposed(self, corner: Any, offset: int) -> Any:
        """16 x 16 elements at an offset as second operands of two mma: columns 0..7, 8..15."""
        registers = g.local(4, "uint32")
        unit.load_x4(registers, self.pages.memory, corner + offset, transposed=True)
        return registers

    def visit(self, base: Any, first: Any, end: Any) -> None:
        """Attend to the tile of keys that begins at element `base` of the memory and at key `first` (int32)."""
        scores = self._score(base)
        if not self.plain:
            self._finish_scores(scores, first)
        self._mask(scores, first, end)
        for m in range(self.tiles):
            self._softmax(m, scores[m])
        self._weigh(base, scores)

    def _score(self, base: Any) -> list[list[Fragment]]:
        """Products of queries and keys: [tile][8 keys]."""
        cfg, keys, line = self.cfg, self.pages.keys, self.pages.k_line
        corner = self._corner(base, line)
        scores = [[Fragment(g.local(4)) for _ in range(keys // 8)] for _ in range(self.tiles)]
        for registers in (r for row in scores for r in row):
            for i in range(4):
                registers.put(i, e.f32(0.0))
        for step in range(self.steps):
            if step < len(self._held):
                left = [self._held[step]]
            else:
                left = [self._query(m, step) for m in range(self.tiles)]
            for pair in range(keys // 16):
                right = self._transposed(corner, step * 16 * line + pair * 16)
                for m in range(self.tiles):
                    unit.mma(scores[m][2 * pair].registers, left[m], right, 0, cfg.dtype)
                    unit.mma(scores[m][2 * pair + 1].registers, left[m], right, 2, cfg.dtype)
        return scores

    def _finish_scores(self, scores: list[list[Fragment]], first: Any) -> None:
        """Cap and slope, in units of log 2."""
        cfg, args = self.cfg, self.args
        for m in range(self.tiles):
            for i in range(2):
                slope = None
                if args.alibi is not None:
                    head = self.first_head + self.rows[m][i] % self.share
                    slope = e.let(args.alibi[head] * e.f32(_LOG2E))
                    ahead = e.let(first + self._first_column - self.places[m][i])
                for n, registers in enumerate(scores[m]):
                    for j in range(2):
                        value = registers[2 * i + j]
                        if cfg.softcap:
                            value = g.tanh(e.let(value * e.f32(cfg.scale / cfg.softcap)))
                            value = value * e.f32(cfg.softcap * _LOG2E)
                        else:
                            value = value * e.f32(cfg.scale * _LOG2E)
                        if slope is not None:
                            value = value + slope * T.Cast("float32", ahead + self._column(n, j))
                        registers.put(2 * i + j, value)

    def _mask(self, scores: list[list[Fragment]], first: Any, end: Any) -> None:
        """Make scores of keys that a row does not see very low; only where there may be such keys."""
        cfg = self.cfg
        last = e.let(first + (self.pages.keys - 1))
        partly = T.Or(last >= end, last > self.first_place)
        if cfg.window:
            partly = T.Or(partly, self.last_place - first >= cfg.window)
        if cfg.chunk:
            partly = T.Or(partly, self.last_place // cfg.chunk * cfg.chunk > first)
        with g.when(partly):
            for m in range(self.tiles):
                for i in range(2):
                    own, place = e.let(first + self._first_column), self.places[m][i]
                    high = g.held(T.min(place, end - 1) - own)
                    low = None
                    if cfg.window:
                        low = place - (cfg.window - 1)
                    if cfg.chunk:
                        begin = place // cfg.chunk * cfg.chunk
                        low = begin if low is None else T.max(low, begin)
                    low = None if low is None else g.held(low - own)
                    for n, registers in enumerate(scores[m]):
                        for j in range(2):
                            column = g.i32(self._column(n, j))
                            seen = column <= high
                            if low is not None:
                                seen = T.And(seen, column >= low)
                            at = 2 * i + j
                            registers.put(at, T.Select(seen, registers[at], e.f32(_LOWEST)))

    def _softmax(self, m: int, scores: list[Fragment]) -> None:
        """Scores to weights; the four threads of a row agree on its maximum, and each keeps a sum of its own."""
        for i in range(2):
            top, added = g.local(1), g.local(1)
            old = g.held(self.largest[m][i][0])
            e.store(top, 0, old, 1)
            for registers in scores:
                for j in range(2):
                    e.store(top, 0, T.max(top[0], registers[2 * i + j]), 1)
            g.warp_reduce(top, T.max, first=2)
            # of a row that sees nothing yet all weights become 2^-huge, not 2^0
            shift = g.held(T.Select(top[0] <= e.f32(_MASKED), e.f32(0.0), top[0] * e.f32(self.unit)))
            e.store(added, 0, e.f32(0.0), 1)
            for registers in scores:
                for j in range(2):
                    weight = e.let(g.exp2(e.let(registers[2 * i + j] * e.f32(self.unit) - shift)))
                    registers.put(2 * i + j, weight)
                    e.store(added, 0, added[0] + weight, 1)
            with g.when(top[0] > old):  # seldom, once some keys have been seen
                factor = e.let(g.exp2(e.let(old * e.f32(self.unit) - shift)))
                e.store(self.largest[m][i], 0, top[0], 1)
                e.store(self.total[m][i], 0, self.total[m][i][0] * factor, 1)
                for registers in self.out[m]:
                    for j in range(2):
                        registers.put(2 * i + j, registers[2 * i + j] * factor)
            e.store(self.total[m][i], 0, self.total[m][i][0] + added[0], 1)

    def _weigh(self, base: Any, weights: list[list[Fragment]]) -> None:
        cfg, pages = self.cfg, self.pages
        corner = self._value_corner(base)
        for step in range(pages.keys // 16):
            left = [self._weight_operand(weights[m], step) for m in range(self.tiles)]
            for pair in range(self.columns // 16):
                right = self._value_operand(corner, step * 16, pair * 16)
                for m in range(self.tiles):
                    unit.mma(self.out[m][2 * pair].registers, left[m], right, 0, cfg.dtype)
                    unit.mma(self.out[m][2 * pair + 1].registers, left[m], right, 2, cfg.dtype)

    def _weight_operand(self, weights: list[Fragment], step: int) -> Any:
        """Weights of 16 keys as a first operand."""
        left = g.local(4, "uint32")
        for half in range(2):
            for i in range(2):
                source = weights[2 * step + half]
                e.store(left, 2 * half + i, pack(source[2 * i], source[2 * i + 1], self.cfg.dtype), 1)
        return left

    def _value_corner(self, base: Any) -> Any:
        return self._corner(base + self.pages.v_offset, self.pages.v_line)

    def _value_operand(self, corner: Any, key: int, column: int) -> Any:
        """Values of 16 keys, columns 0..7 and 8..15 from `column` on, as second operands of two mma."""
        return self._transposed(corner, key * self.pages.v_line + column)

    def add_up(self) -> None:
        """Complete the sums of rows; after the last tile of keys."""
        for totals in self.total:
            for total in totals:
                g.warp_reduce(total, g.add, first=2)
