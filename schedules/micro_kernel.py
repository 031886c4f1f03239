"""Rows times one block of a packed weight, with the sums in registers; and how any number of rows is cut into such tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.layout import BlockedLayout, own_vectors, usual_vectors
from llmc.schedules.linear_lanes import accumulate_lanes


class MicroKernel:
    """rows x n_block outputs in registers, accumulated over a range of k steps of one weight block.

    Args:
        x: flat view of the activations, as int32 pairs for bf16 with even k, else as elements.
        w: flat view of the weight, as int32 pairs for bf16, else as elements.
        k: columns of x (its row stride).
        dtype: of both.
        prefetch, unroll: see LinearSchedule.
        paired: whether x is viewed as pairs if w is; None = if k is even.
    """

    def __init__(
        self,
        caps: Capabilities,
        layout: BlockedLayout,
        dtype: str,
        k: int,
        x: Any,
        w: Any,
        prefetch: int,
        unroll: int = 0,
        paired: bool | None = None,
    ) -> None:
        self.unroll = unroll
        self.paired = k % 2 == 0 if paired is None else paired
        self.caps, self.layout, self.dtype, self.k, self.x, self.w = caps, layout, dtype, k, x, w
        self.lanes = caps.lanes_f32
        if layout.n_block % self.lanes:
            raise ValueError(f"n_block {layout.n_block} is not a multiple of {self.lanes} lanes")
        self.vectors = layout.n_block // self.lanes
        self.pairs = layout.k_pack == 2
        self.dot = self.pairs and caps.has_bf16_dot
        item = 4 if dtype == "float32" or self.pairs else 2
        self.step_bytes = layout.n_block * item
        self.prefetch_ahead = prefetch // self.step_bytes

    def max_rows(self) -> int:
        """Rows whose accumulators fit in the registers beside the weights of one step and a broadcast."""
        if self.caps.has_lane_operands and (self.dtype != "float32" or self.pairs):
            return 4  # a register of columns of each row, and weights on their way from 16 bits
        vectors = self.width(2)
        weights = vectors * (2 if self.pairs and not self.dot else 1)
        return max(1, min(6, (self.caps.vector_registers - weights - 2) // vectors))

    def width(self, rows: int) -> int:
        """Vectors of a block that so many rows take at a time: all, but of blocks made for a machine with more registers.

        One row uses each weight once, so that only its sums have to stay in registers.
        """
        registers = self.caps.vector_registers
        if own_vectors(self.layout, self.dtype, self.caps) is not None:
            return self.vectors
        most = registers // 2 if rows == 1 else usual_vectors(self.caps)
        return max(v for v in range(1, most + 1) if self.vectors % v == 0)

    def accumulate(
        self,
        acc: list[list[Any]],
        rows: int,
        row_base: list[Any],
        w_base: Any,
        steps: int,
        fetch: tuple[Any, Any] | None = None,
    ) -> None:
        """acc[r][v] += x[row r] . w for k steps [0, steps); bases are in elements of the views.

        The caller has laid `row_base` and `w_base` at the first step, and at the first of the accumulators' outputs.

        Args:
            fetch: where the elements of w that are asked for at the first step begin, and how far on at each further
                one; None = `prefetch` bytes ahead of their use.
        """
        nb = self.layout.n_block
        if fetch is None:
            fetch = w_base + self.prefetch_ahead * nb, nb
        done = accumulate_lanes(self, acc, row_base, w_base, steps)
        if done is not None:
            if not isinstance(steps, int) or done != steps:
                with e.loop(done, steps) as j:
                    self._step(acc, rows, row_base, w_base, j, fetch)
            return
        unroll = self.unroll or (4 if rows == 1 else 1)
        whole = steps // unroll
        with e.loop(whole) as j:
            for u in range(unroll):
                self._step(acc, rows, row_base, w_base, j * unroll + u, fetch)
        if unroll > 1 and not (isinstance(steps, int) and steps % unroll == 0):
            with e.loop(whole * unroll, steps) as j:
                self._step(acc, rows, row_base, w_base, j, fetch)

    def sums(self, rows: int, row_base: list[Any], w_base: Any, steps: int) -> list[list[Any]]:
        """accumulate from zero, over whole blocks however many vectors fit into registers."""
        width, lanes = self.width(rows), self.lanes
        whole = self.new_accumulators(rows)
        for at in range(0, self.vectors, width):
            acc = [row[at : at + width] for row in whole]
            for vector in (v for row in acc for v in row):
                e.store(vector, 0, e.splat(0.0, lanes), lanes)
            self.accumulate(acc, rows, row_base, w_base + at * lanes, steps)
        return whole

    def _step(
        self,
        acc: list[list[Any]],
        rows: int,
        row_base: list[Any],
        w_base: Any,
        j: Any,
        fetch: tuple[Any, Any],
    ) -> None:
        lanes, nb, vectors = self.lanes, self.layout.n_block, len(acc[0])
        at = w_base + j * nb
        if self.prefetch_ahead:
            line = 64 // (self.step_bytes // nb)
            # one row waits for memory alone; more rows compute, and the first level cannot hold enough of what comes
            level = 1 if rows == 1 else 2
            for i in range(0, vectors * lanes, line):
                e.prefetch(self.w, fetch[0] + j * fetch[1] + i, level=level)
        loads = [e.let(e.load(self.w, at + v * lanes, lanes)) for v in range(vectors)]
        if self.dot:
            for r in range(rows):
                a = e.let(e.splat(self._pair(row_base[r], j), lanes))
                for v in range(vectors):
                    self._update(acc[r][v], lambda c, v=v, a=a: e.dot_bf16(c, a, loads[v]))
        elif self.pairs:
            even = [e.let(e.pair_even(w, lanes)) for w in loads]
            odd = [e.let(e.pair_odd(w, lanes)) for w in loads]
            for r in range(rows):
                pair = e.let(self._pair(row_base[r], j))
                for half, weights in ((e.pair_even(pair, 1), even), (e.pair_odd(pair, 1), odd)):
                    a = e.let(e.splat(half, lanes))
                    for v in range(vectors):
                        self._update(acc[r][v], lambda c, v=v, a=a, ws=weights: c + a * ws[v])
        else:
            wide = [e.let(e.widen(w, self.dtype, lanes)) for w in loads]
            for r in range(rows):
                a = e.let(e.splat(e.widen(self.x[row_base[r] + j], self.dtype, 1), lanes))
                for v in range(vectors):
                    self._update(acc[r][v], lambda c, v=v, a=a: c + a * wide[v])

    def _update(self, acc: Any, f: Any) -> None:
        e.store(acc, 0, f(e.load(acc, 0, self.lanes)), self.lanes)

    def _pair(self, base: Any, j: Any) -> Any:
        """Columns 2j and 2j+1 of a row as one int32; an odd last column is paired with zero."""
        if self.paired:
            return self.x[base + j]
        low = tirx.Cast("int32", self.x[base + 2 * j])
        inside = base + T.min(2 * j + 1, e.i64(self.k - 1))
        high = tirx.Select(2 * j + 1 < self.k, tirx.Cast("int32", self.x[inside]), tirx.IntImm("int32", 0))
        return T.bitwise_or(low, T.shift_left(high, tirx.IntImm("int32", 16)))

    def new_accumulators(self, rows: int, width: int = 0) -> list[list[Any]]:
        """Of `width` vectors of a block (0 = all)."""
        return [[e.scratch(self.lanes) for _ in range(width or self.vectors)] for _ in range(rows)]


def row_view(x: Any, size: Any, k: int, pairs: bool) -> tuple[Any, int]:
    """Flat view of activations for MicroKernel, and elements of it per row."""
    if pairs and k % 2 == 0:
        return e.flat(x, size // 2, "int32"), k // 2
    return e.flat(x, size), k


def weight_view(w: Any, size: int, pairs: bool) -> Any:
    """Flat view of a packed weight for MicroKernel."""
    return e.flat(w, size // 2, "int32") if pairs else e.flat(w, size)


def row_sizes(largest: int) -> list[int]:
    """Row counts of the micro-kernels that cover any number of rows below `largest`, descending."""
    return [s for s in (16, 8, 4, 2, 1) if s < largest]


def for_tiles(tile: int, count: Any, body: Callable[[int, Any], None], *, whole: bool = False) -> None:
    """body(rows, start) over 0 .. count - 1 in tiles of `tile` rows, then of powers of two.

    Args:
        whole: the rest is one tile instead: more code, but no second way through the weights.
    """
    with e.loop(count // tile) as i:
        body(tile, i * tile)
    done = e.let(count // tile * tile)
    rest = e.let(count - done)
    if whole:
        for rows in range(tile - 1, 0, -1):
            with T.If(rest == rows), T.Then():
                body(rows, done)
        return
    for rows in row_sizes(tile):
        with T.If(T.bitwise_and(rest, e.i64(rows)) != 0), T.Then():
            body(rows, e.let(done + T.bitwise_and(rest, e.i64(~(2 * rows - 1)))))


def write_rows(
    micro: MicroKernel,
    acc: list[list[Any]],
    rows: list[Any],
    block: Any,
    n: int,
    bias: Any,
    in_dtype: str,
    y: Any,
    out_dtype: str,
    bias_base: Any = 0,
) -> None:
    """Add the bias and store accumulators to rows of y[., n]; columns past n are dropped."""
    epilogue = Epilogue(n, micro.layout.n_block, in_dtype, out_dtype)
    epilogue.store_held(acc, rows, block, y, micro.caps, bias, bias_base=bias_base)
