"""Sums in a warpgroup's fragments become rows of y: finished, narrowed, and stored 16 bytes at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import fragments
from llmc.schedules.gpu.epilogue import finish
from llmc.schedules.gpu.qcodes import pack
from llmc.schedules.gpu.rows import Rows

_WIDE = 8 * fragments.QUAD  # columns that a quad stores at a time


class FragmentStore:
    """Stores 16 rows of a warp.

    Args:
        sums: registers, four for each 8 columns of the weight's rows (see warpgroup.mma).
        lane: of the thread in its warp.
        block_rows: rows of the weight that lie together; in a gated one the first half of them are gates: 8 or 32.
        factor: row of x -> what its sums are multiplied with first, or None.

    Attributes:
        bias: by row of the weight, or None.
    """

    def __init__(
        self,
        ops: Any,
        caps: Capabilities,
        sums: Any,
        lane: Any,
        block_rows: int = 8,
        factor: Callable[[Any], Any] = lambda row: None,
    ) -> None:
        self.ops, self.caps, self.sums, self.lane = ops, caps, sums, lane
        self.block_rows, self.factor, self.bias = block_rows, factor, ops.bias
        self.part = e.let(lane % fragments.QUAD)
        cfg = ops.cfg
        self.narrow = cfg.out_dtype != "float32"
        self.words = e.flat(ops._y, ops.t * cfg.n // 2, "uint32") if self.narrow else None
        self.residual = (
            e.flat(ops._residual, ops.t * cfg.n // 2, "uint32") if ops.residual is not None else None
        )

    def store(self, rows: Rows, first_row: Any, first: Any, count: int) -> None:
        """`count` fragments of 8 columns of y, from column `first` on, of 16 rows; what is out of range is dropped.

        Args:
            first_row: number in `rows` of the first row.
        """
        self._mine = g.held(first + self.part * 8)  # columns that the thread stores
        self._own = g.held(first + self.part * 2)  # columns whose sums it holds
        self._exact = self.ops.cfg.n % (8 * count) == 0  # no tile reaches behind the last column
        for half in range(2):
            number = g.held(first_row + self.lane // fragments.QUAD + 8 * half)
            inside = e.let(rows.inside(number))
            # rows past the last one are computed like it: all threads of a quad must take part
            row = rows.at(number)
            start = g.held(row * self.ops.cfg.n)
            factor = self.factor(row)
            for group in range(count // fragments.QUAD):
                self._store_wide(half, start, inside, group, factor)

    def _sums(self, half: int, fragment: int, factor: Any) -> list[list[Any]]:
        """Of the thread's two columns of a fragment of y: the sum, or the gate and what it multiplies."""

        def get(piece: int) -> list[Any]:
            found = [self.sums[4 * piece + 2 * half + i] for i in range(2)]
            return found if factor is None else [e.let(f * factor) for f in found]

        if not self.ops.cfg.gated:
            return [[value] for value in get(fragment)]
        if self.block_rows == 8:
            both = fragments.gates_apart(get(2 * fragment), get(2 * fragment + 1), self.lane)
        else:
            per_half = self.block_rows // 16
            first = fragment // per_half * 2 * per_half + fragment % per_half
            both = (get(first), get(first + per_half))
        if self.ops.cfg.gate_second:
            both = both[::-1]
        return [list(pair) for pair in zip(*both, strict=True)]

    def _store_wide(self, half: int, start: Any, inside: Any, group: int, factor: Any) -> None:
        """32 columns of y, of a row that begins at `start`; thread q of a quad stores 8 of them, from 8 q on."""
        ops, cfg = self.ops, self.ops.cfg
        mine = e.let(self._mine + group * _WIDE)
        whole = inside if self._exact else e.let(T.And(inside, mine < cfg.n))
        added = self._residual(start, mine) if self.residual is not None else []
        words = []
        for i in range(fragments.QUAD):
            fragment = group * fragments.QUAD + i
            at = e.let(self._own + (group * _WIDE + 8 * i))
            values = []
            for c, sums in enumerate(self._sums(half, fragment, factor)):
                # a column behind the last one takes the bias of one that there is
                known = e.let(at + c if self._exact else T.min(at + c, e.i64(cfg.n - 1)))
                value = finish(cfg, sums, known, None, self.bias, None)
                values.append(e.let(value + added[i][c]) if added else value)
            if self.narrow:
                words.append(pack(values[0], values[1], cfg.out_dtype))
                continue
            pair = g.local(2)
            for c, value in enumerate(values):
                e.store(pair, c, value, 1)
            with g.when(T.And(inside, at < cfg.n)):
                e.store(ops.y, start + at, e.load(pair, e.i64(0), 2), 2)
        if self.narrow:
            vector = g.local(fragments.QUAD, "uint32")
            for i, word in enumerate(fragments.turned(words, self.lane)):
                e.store(vector, i, word, 1)
            with g.when(whole):
                where = e.let((start + mine) // 2)
                e.store(self.words, where, e.load(vector, e.i64(0), fragments.QUAD), fragments.QUAD)

    def _residual(self, start: Any, mine: Any) -> list[list[Any]]:
        """Of each fragment what is added to the thread's two columns; anything past the last column."""
        cfg = self.ops.cfg
        column = mine if self._exact else e.let(T.min(mine, e.i64(cfg.n - 8)))
        vector = e.let(e.load(self.residual, e.let((start + column) // 2), fragments.QUAD))
        words = fragments.turned(g.elements(vector, fragments.QUAD), self.lane)
        return [fragments.unpacked(word, cfg.in_dtype) for word in words]
