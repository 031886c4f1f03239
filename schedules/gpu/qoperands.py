"""Arguments of a matmul kernel with a quantized weight, and what happens to its sums."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.epilogue import finish
from llmc.schedules.gpu.qcodes import e4m3_float
from llmc.schedules.gpu.rows import Rows
from llmc.schedules.qlayout import OUTLIER_BYTES, WARP_ROWS
from llmc.schedules.qlinear import QuantLinearConfig


class Operands:
    """Views of a kernel's arguments, and what becomes of its sums.

    Attributes:
        cfg: what is computed.
        t: rows of x.
        x: flat, in cfg.in_dtype; x_pairs: two elements in an uint32, for 16-bit types.
        packed, size: the packed weight as declared, and its bytes.
        bias, residual, y: flat, or None.
        listed: int32 view of the packed weight if it lists columns: their order, or those that are outliers.
        list_at: where in it the list of this weight begins.
        base: the byte of the packed weight at which this one begins (of several experts).
        rounded, row_scales: [T, padded_k] of rounded_to, and float32 [T] or [T, groups], after rounded_inputs.round_inputs.
        rounded_to: int8, e4m3 (as uint8), or bfloat16 (as uint16, of e4m3 numbers); "" = x is not rounded.
        groups: scales of a row.
    """

    cfg: QuantLinearConfig
    t: Any
    x: Any
    x_pairs: Any = None
    packed: Any = None
    size: int = 0
    bias: Any = None
    residual: Any = None
    y: Any = None
    listed: Any = None
    list_at: Any = 0
    base: Any = 0
    rounded: Any = None
    row_scales: Any = None
    rounded_to: str = ""
    groups: int = 1

    @property
    def pairs_dtype(self) -> str:
        """Of x_pairs."""
        return self.rounded_to or self.cfg.in_dtype

    @property
    def columns(self) -> int:
        """Of a row of x_pairs."""
        return self.cfg.layout.padded_k if self.rounded_to else self.cfg.layout.k

    def group_scale(self, row: Any, column: Any) -> Any:
        """What the products of a group of columns are multiplied with, of a row of x; None if that is left for the end."""
        if self.groups == 1:
            return None
        return e.let(self.row_scales[e.i64(row) * self.groups + column // self.cfg.layout.group])

    def element(self, token: Any, column: Any) -> Any:
        """x[token, stored column] as float32; 0 past the last column."""
        cfg, layout = self.cfg, self.cfg.layout
        if self.rounded is not None:
            return _wide(self.rounded[token * layout.padded_k + column], self.rounded_to)
        at = column
        if layout.of.order:
            at = e.i64(self.listed[self.list_at + T.min(column, layout.k - 1)])
        value = lambda: e.widen(self.x[token * layout.k + at], cfg.in_dtype, 1)  # noqa: E731
        if layout.padded_k == layout.k:
            return value()
        return T.if_then_else(column < layout.k, value(), e.f32(0.0))

    def halves(self, c: Any) -> tuple[Any, Any]:
        """Of a gated weight's block, the rows that make its output c: gate, and what it multiplies."""
        return c, c + WARP_ROWS // 2

    def store_sums(
        self, caps: Capabilities, sums: Any, block: Any, rows: Rows, shape: tuple[int, int, int], thread: Any
    ) -> None:
        """Add up what the warps have and store a block's outputs.

        Args:
            sums: float32 in shared memory, of `shape` (warps, rows, elements from one row to the next).
            rows: of x.
        """
        cfg = self.cfg
        warps, count, width = shape
        per_block = WARP_ROWS // 2 if cfg.gated else WARP_ROWS

        def total(row: Any, c: Any) -> Any:
            register = g.local(1)
            e.store(register, 0, sums[row * width + c], 1)
            for w in range(1, warps):
                e.store(register, 0, register[0] + sums[(w * count + row) * width + c], 1)
            return e.let(register[0])

        def one(i: Any) -> None:
            r, c = e.let(i // per_block), e.let(i % per_block)
            column = e.let(block * per_block + c)
            with g.when(T.And(rows.inside(r), column < cfg.n)):
                own, other = self.halves(c) if cfg.gated else (c, c)
                found, row = [total(r, own)], rows.at(r)
                if cfg.gated:
                    found.append(total(r, other))
                    if cfg.gate_second:
                        found.reverse()
                if self.row_scales is not None and self.groups == 1:
                    found = [e.let(f * self.row_scales[row]) for f in found]
                if cfg.layout.outliers:
                    halves = (own, other) if cfg.gated else (c,)
                    halves = halves[::-1] if cfg.gate_second else halves
                    found = [
                        self._with_outliers(f, row, block, r) for f, r in zip(found, halves, strict=True)
                    ]
                value = finish(cfg, found, column, row, self.bias, self.residual)
                e.store(self.y, row * cfg.n + column, g.narrow(value, cfg.out_dtype, caps), 1)

        g.strided(thread, count * per_block, warps * g.WARP, one)

    def _with_outliers(self, total: Any, row: Any, block: Any, output: Any) -> Any:
        """A sum plus the products of the columns that were left out of it; `output` counts in the block."""
        layout = self.cfg.layout
        weights = e.flat(self.packed, self.size // OUTLIER_BYTES, "bfloat16")
        first = e.let((self.base + block * layout.block_bytes + layout.outliers_at) // OUTLIER_BYTES + output)
        register = g.local(1)
        e.store(register, 0, total, 1)
        with e.loop(layout.outliers) as j:
            column = e.i64(self.listed[self.list_at + j])
            x = e.widen(self.x[row * layout.k + column], self.cfg.in_dtype, 1)
            weight = e.widen(weights[first + j * layout.n_block], "bfloat16", 1)
            e.store(register, 0, register[0] + x * weight, 1)
        return e.let(register[0])


def _wide(value: Any, kind: str) -> Any:
    """float32 of a rounded element."""
    if kind == "e4m3":
        return e4m3_float(tirx.Cast("uint32", value))
    return tirx.Cast("float32", value) if kind == "int8" else e.widen(value, kind, 1)


class QuantOperands(Operands):
    """The arguments of llmc.schedules.qlinear.quant_linear."""

    def __init__(self, cfg: QuantLinearConfig, t: Any) -> None:
        self.cfg, self.t = cfg, t
        layout, ones = cfg.layout, [1] * cfg.lead
        if layout.n_block != WARP_ROWS:
            raise ValueError(f"threads read blocks of {WARP_ROWS} rows; found {layout.as_text()}")
        self._outputs = 2 * cfg.n if cfg.gated else cfg.n
        self.size = math.prod(layout.packed_shape)
        self._x = g.tensor("x", [*ones, t, layout.k], cfg.in_dtype)
        self.packed = g.tensor("w", list(layout.packed_shape), "uint8")
        self._bias = g.tensor("bias", [self._outputs], cfg.in_dtype) if cfg.has_bias else None
        self._residual = g.tensor("residual", [*ones, t, cfg.n], cfg.in_dtype) if cfg.has_residual else None
        self._y = g.tensor("y", [*ones, t, cfg.n], cfg.out_dtype)

    def view(self) -> None:
        """Make the views; inside the root block."""
        cfg, t = self.cfg, self.t
        count = t * cfg.layout.k
        self.x = e.flat(self._x, count)
        self.x_pairs = e.flat(self._x, count // 2, "uint32") if cfg.in_dtype != "float32" else None
        self.bias = e.flat(self._bias, self._outputs) if self._bias is not None else None
        self.residual = e.flat(self._residual, t * cfg.n) if self._residual is not None else None
        self.y = e.flat(self._y, t * cfg.n)
        if cfg.layout.listed:
            self.listed, self.list_at = e.flat(self.packed, self.size // 4, "int32"), cfg.layout.list_at // 4
