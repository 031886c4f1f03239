"""Each head of a tensor times a weight of its own: the matmuls of one weight, with a head more to a block's number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import gemm
from llmc.schedules.gpu.gemv import ROWS, gemv_block, layout_of, words_of
from llmc.schedules.gpu.rope import rotate
from llmc.schedules.head_linear import HeadLinearConfig
from llmc.schedules.rope import HeadOperands

_WARPS = 4  # of a block that does not use the matrix units
_SHARED_ROWS = 4  # tokens that share one pass over the weight there


class _Head:
    """The operands of one head's product, as the kernels for linear layers take them (gemv.Operands)."""

    gated = False

    def __init__(
        self, cfg: HeadLinearConfig, caps: Capabilities, x: Any, w: Any, y: Any, t: Any, head: Any
    ) -> None:
        attrs = cfg.attrs
        self.cfg, self.x, self.w, self.y, self.t = self, x, w, y, t
        self.n, self.k, self.in_dtype, self.weight_dtype = cfg.n, cfg.k, cfg.dtype, cfg.dtype
        self.shape = cfg.packed_shape(caps)[1:]
        step = e.i64(attrs.head_stride)
        self.w_first = e.let(head * math.prod(self.shape))
        self._x_first = e.let(head * (step * t if attrs.head_major else step) + attrs.offset)
        self._row, self._head, self._of = attrs.token_stride, head, cfg
        self.aligned = _aligned(cfg)

    def x_at(self, token: Any) -> Any:
        """Element at which a row of x begins."""
        return token * self._row + self._x_first

    def store(self, caps: Capabilities, sums: list[Any], column: Any, row: Any) -> None:
        """Finish and store y[row, column]; out of range is dropped."""
        of = self._of
        with g.when(T.And(column < self.n, row < self.t)):
            at = (row * of.attrs.heads + self._head) * of.width + column
            e.store(self.y, at, g.narrow(e.let(sums[0]), of.dtype, caps), 1)


def _aligned(cfg: HeadLinearConfig) -> bool:
    """Whether all heads of x lie on multiples of 16 bytes, and are so long."""
    attrs, unit = cfg.attrs, words_of(cfg.dtype)
    return all(v % unit == 0 for v in (cfg.k, attrs.offset, attrs.token_stride, attrs.head_stride))


def head_linear(cfg: HeadLinearConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.head_linear.head_linear, for a machine with threads."""
    if cfg.layout not in (None, layout_of(cfg.dtype)):
        raise ValueError(f"the weight is {cfg.layout}; this kernel reads {layout_of(cfg.dtype)}")
    attrs, heads = cfg.attrs, cfg.attrs.heads
    shape = cfg.packed_shape(caps)
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ops = HeadOperands(cfg, caps, t)
        w = g.tensor("w", list(shape), cfg.dtype)
        y = g.tensor("y", [1, t, heads, cfg.width], cfg.dtype)
        with e.root():
            ops.view()
            wf, out = e.flat(w, math.prod(shape)), e.flat(y, t * heads * cfg.width)

            def launch(
                rows: int, columns: int, threads: int, body: Callable[[_Head, Any, Any, Any], None]
            ) -> None:
                """body(operands, first row, number of the piece of columns, thread) in tiles of rows x columns."""
                row_blocks, pieces = e.ceildiv(t, rows), -(-shape[1] * ROWS // columns)
                products = e.let(row_blocks * (heads * pieces))
                rest = t if attrs.rest is not None else 0
                with g.launch(products + rest, threads) as (number, thread):
                    with g.when(number < products):
                        # neighbouring blocks read the same weights: they stay in the second-level cache
                        first, piece = e.let(number % row_blocks * rows), e.let(number // row_blocks)
                        head = e.let(piece // pieces)
                        body(
                            _Head(cfg, caps, ops.sources[0], wf, out, t, head),
                            first,
                            e.let(piece % pieces),
                            thread,
                        )
                    if attrs.rest is not None:
                        with g.when(number >= products):
                            _rest(cfg, caps, ops, out, e.let(number - products), thread, threads)

            def by_threads(rows: int) -> None:
                launch(
                    *(rows, ROWS, _WARPS * g.WARP),
                    lambda head, first, block, thread: gemv_block(
                        head, caps, rows, _WARPS, block, first, thread
                    ),
                )

            def on_units(tile: gemm.TileConfig) -> None:
                launch(
                    *(tile.rows, tile.columns, tile.threads),
                    lambda head, first, piece, thread: gemm.Block(
                        head, caps, tile, first, e.let(piece * (tile.columns // ROWS)), thread
                    ).run(),
                )

            with T.If(t == 1):
                with T.Then():
                    by_threads(1)
                with T.Else():
                    if _on_units(cfg, caps):
                        with T.If(t <= gemm.FEW_ROWS.rows):
                            with T.Then():
                                on_units(gemm.FEW_ROWS)
                            with T.Else():
                                on_units(gemm.SOME_ROWS)
                    else:
                        by_threads(_SHARED_ROWS)
    return built[0]


def _on_units(cfg: HeadLinearConfig, caps: Capabilities) -> bool:
    has = {"bfloat16": caps.has_mma_bf16, "float16": caps.has_mma_f16}
    return has.get(cfg.dtype, False) and caps.has_async_copy and _aligned(cfg)


def _rest(
    cfg: HeadLinearConfig,
    caps: Capabilities,
    ops: HeadOperands,
    out: Any,
    token: Any,
    thread: Any,
    threads: int,
) -> None:
    """What follows the product in all heads of a token."""
    heads = cfg.attrs.heads

    def store(head: Any, d: Any, value: Any) -> None:
        at = (token * heads + head) * cfg.width + cfg.n + d
        e.store(out, at, g.narrow(e.let(value), cfg.dtype, caps), 1)

    rotate(ops, 0, token, (e.i64(0), heads), thread, store, threads)
