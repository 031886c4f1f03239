"""Matrix times packed weight for few rows: 16-byte loads, the columns shared out among a block's warps.

The weight lies in blocks of 8 rows by 16 bytes of columns (schedules/layout.py): a warp's load is 512 consecutive bytes,
and thread l of it holds columns of row l % 8, so that only threads 8 and 16 apart have to be added up.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.epilogue import finish
from llmc.schedules.layout import BlockedLayout

ROWS = 8  # weight rows of a block
_BYTES = 16
_IN_FLIGHT = 4  # loads that a thread has under way, untuned


def words_of(dtype: str) -> int:
    """Elements in 16 bytes."""
    return _BYTES // (4 if dtype == "float32" else 2)


def layout_of(dtype: str) -> BlockedLayout:
    """The weight's layout."""
    return BlockedLayout(ROWS, words_of(dtype))


class Operands:
    """Flat views of a linear kernel's arguments; see llmc.schedules.linear.linear."""

    def __init__(self, cfg: Any, caps: Capabilities, t: Any) -> None:
        self.cfg, self.t = cfg, t
        self.shape = cfg.packed_shape(caps)
        self.outputs = 2 * cfg.n if cfg.gated else cfg.n
        ones = [1] * cfg.lead
        self._x = g.tensor("x", [*ones, t, cfg.k], cfg.in_dtype)
        self._w = g.tensor("w", self.shape, cfg.weight_dtype)
        self._bias = g.tensor("bias", [self.outputs], cfg.in_dtype) if cfg.has_bias else None
        self._residual = g.tensor("residual", [*ones, t, cfg.n], cfg.in_dtype) if cfg.has_residual else None
        self._y = g.tensor("y", [*ones, t, cfg.n], cfg.out_dtype)

    def view(self) -> None:
        """Make the views; inside the root block."""
        cfg, t = self.cfg, self.t
        blocks, steps, nb, kp = self.shape
        self.x = e.flat(self._x, t * cfg.k)
        self.w = e.flat(self._w, blocks * steps * nb * kp)
        self.bias = e.flat(self._bias, self.outputs) if self._bias is not None else None
        self.residual = e.flat(self._residual, t * cfg.n) if self._residual is not None else None
        self.y = e.flat(self._y, t * cfg.n)

    w_first = 0  # element of w at which the weight begins

    @property
    def aligned(self) -> bool:
        """Whether rows of x lie on multiples of 16 bytes."""
        return bool(self.cfg.k % self.shape[3] == 0)

    def x_at(self, token: Any) -> Any:
        """Element at which a row of x begins."""
        return token * self.cfg.k

    def store(self, caps: Capabilities, sums: list[Any], column: Any, row: Any) -> None:
        """Finish and store y[row, column]; out of range is dropped."""
        cfg = self.cfg
        with g.when(T.And(column < cfg.n, row < self.t)):
            value = finish(cfg, sums, column, row, self.bias, self.residual)
            e.store(self.y, row * cfg.n + column, g.narrow(value, cfg.out_dtype, caps), 1)


def element(vector: Any, i: int, dtype: str) -> Any:
    """Element i of a 16-byte vector, as float32."""
    return e.let(e.widen(tirx.Shuffle([vector], [i]), dtype, 1))


def gemv(ops: Operands, caps: Capabilities, rows: int, warps: int, in_flight: int = _IN_FLIGHT) -> None:
    """One launch: a block computes 8 weight rows (4 gated outputs) for `rows` rows of x.

    Args:
        rows: of x per block; the last block drops those past the end.
        warps: of a block; they share the columns and add up at the end.
        in_flight: loads that a thread has under way.
    """
    row_blocks = e.ceildiv(ops.t, rows)
    with g.launch(ops.shape[0] * row_blocks, warps * g.WARP) as (number, thread):
        block, first = e.let(number // row_blocks), e.let(number % row_blocks * rows)
        gemv_block(ops, caps, rows, warps, block, first, thread, in_flight)


def gemv_block(
    ops: Any,
    caps: Capabilities,
    rows: int,
    warps: int,
    block: Any,
    first: Any,
    thread: Any,
    in_flight: int = _IN_FLIGHT,
) -> None:
    """What a block of the launch does: weight rows of `block`, rows of x from `first` on; others as of gemv.

    Args:
        ops: Operands, or of the same members.
    """
    cfg = ops.cfg
    _, steps, nb, kp = ops.shape
    whole = ops.aligned
    partial = g.shared(warps * rows * ROWS, name="partial")
    acc = [g.local(1) for _ in range(rows)]
    for a in acc:
        e.store(a, 0, e.f32(0.0), 1)
    # rows past the last one are computed from a copy of it
    bases = [e.let(ops.x_at(T.min(first + r, ops.t - 1))) for r in range(rows)]

    def weight_at(j: Any) -> Any:
        return e.let(e.load(ops.w, ((block * steps + j) * nb + thread % ROWS) * kp + ops.w_first, kp))

    def multiply(j: Any, weight: Any) -> None:
        parts = [element(weight, i, cfg.weight_dtype) for i in range(kp)]
        for r in range(rows):
            if whole:
                line = e.let(e.load(ops.x, bases[r] + j * kp, kp))
                values = [element(line, i, cfg.in_dtype) for i in range(kp)]
            else:
                values = [_guarded(ops, bases[r], j * kp + i) for i in range(kp)]
            for value, part in zip(values, parts, strict=True):
                e.store(acc[r], 0, acc[r][0] + value * part, 1)

    # all loads of a turn are under way before the first is used
    stride = g.WARP // ROWS * warps
    turns = steps // (stride * in_flight)
    with e.loop(turns) as turn:
        at = [e.let((turn * in_flight + u) * stride + thread // ROWS) for u in range(in_flight)]
        weights = [weight_at(j) for j in at]
        for j, weight in zip(at, weights, strict=True):
            multiply(j, weight)
    rest = turns * in_flight * stride
    if rest < steps:
        g.strided(e.i64(thread // ROWS) + rest, steps, stride, lambda j: multiply(j, weight_at(j)))
    for r in range(rows):
        g.warp_reduce(acc[r], g.add, first=16, last=ROWS)
    with g.when(thread % g.WARP < ROWS):
        for r in range(rows):
            e.store(partial, (thread // g.WARP * rows + r) * ROWS + thread % ROWS, acc[r][0], 1)
    g.barrier()
    _store_sums(ops, caps, partial, block, first, rows, warps, thread)


def _guarded(ops: Any, base: Any, column: Any) -> Any:
    cfg = ops.cfg
    value = T.if_then_else(column < cfg.k, e.widen(ops.x[base + column], cfg.in_dtype, 1), e.f32(0.0))
    return e.let(value)


def _store_sums(
    ops: Any,
    caps: Capabilities,
    partial: Any,
    block: Any,
    first: Any,
    rows: int,
    warps: int,
    thread: Any,
) -> None:
    cfg = ops.cfg
    per_block = ROWS // 2 if cfg.gated else ROWS

    def total(r: Any, i: Any) -> Any:
        register = g.local(1)
        e.store(register, 0, partial[r * ROWS + i], 1)
        for w in range(1, warps):
            e.store(register, 0, register[0] + partial[(w * rows + r) * ROWS + i], 1)
        return e.let(register[0])

    def one(i: Any) -> None:
        r, c = e.let(i // per_block), e.let(i % per_block)
        sums = [total(r, c)]
        if cfg.gated:
            sums.append(total(r, c + per_block))
            if cfg.gate_second:
                sums.reverse()
        ops.store(caps, sums, e.let(block * per_block + c), e.let(first + r))

    g.strided(thread, rows * per_block, warps * g.WARP, one)
