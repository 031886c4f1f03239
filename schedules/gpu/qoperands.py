"""Arguments of a matmul kernel with a quantized weight, and what happens to its sums."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.epilogue import finish
from llmc.schedules.qlayout import WARP_ROWS
from llmc.schedules.qlinear import QuantLinearConfig


class QuantOperands:
    """Flat views of the arguments of llmc.schedules.qlinear.quant_linear."""

    def __init__(self, cfg: QuantLinearConfig, t: Any) -> None:
        self.cfg, self.t = cfg, t
        layout, ones = cfg.layout, [1] * cfg.lead
        if layout.n_block != WARP_ROWS:
            raise ValueError(f"threads read blocks of {WARP_ROWS} rows; found {layout.as_text()}")
        outputs = 2 * cfg.n if cfg.gated else cfg.n
        self.size = 1
        for extent in layout.packed_shape:
            self.size *= extent
        self._outputs = outputs
        self._x = g.tensor("x", [*ones, t, layout.k], cfg.in_dtype)
        self.packed = g.tensor("w", list(layout.packed_shape), "uint8")
        self._bias = g.tensor("bias", [outputs], cfg.in_dtype) if cfg.has_bias else None
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
        self.order = e.flat(self.packed, self.size // 4, "int32") if cfg.layout.of.order else None
        # float32 [T]: what a row's sums are multiplied with, for int8 activations
        self.row_scales: Any = None
        # int8 [T, padded_k]: the rounded rows of x
        self.rounded: Any = None

    def element(self, token: Any, column: Any) -> Any:
        """x[token, stored column] as float32; 0 past the last column."""
        cfg, layout = self.cfg, self.cfg.layout
        if self.rounded is not None:
            return tirx.Cast("float32", self.rounded[token * layout.padded_k + column])
        at = column
        if layout.of.order:
            at = e.i64(self.order[layout.order_at // 4 + T.min(column, layout.k - 1)])
        value = lambda: e.widen(self.x[token * layout.k + at], cfg.in_dtype, 1)  # noqa: E731
        if layout.padded_k == layout.k:
            return value()
        return T.if_then_else(column < layout.k, value(), e.f32(0.0))

    def store_sums(
        self,
        caps: Capabilities,
        sums: Any,
        block: Any,
        first: Any,
        rows: int,
        width: int,
        warps: int,
        thread: Any,
    ) -> None:
        """Add up what the warps have, [warps, rows, width] in shared memory, and store rows first .. of a block's outputs."""
        cfg = self.cfg
        per_block = WARP_ROWS // 2 if cfg.gated else WARP_ROWS

        def total(row: Any, c: Any) -> Any:
            register = g.local(1)
            e.store(register, 0, sums[row * width + c], 1)
            for w in range(1, warps):
                e.store(register, 0, register[0] + sums[(w * rows + row) * width + c], 1)
            return e.let(register[0])

        def one(i: Any) -> None:
            r, c = e.let(i // per_block), e.let(i % per_block)
            row, column = e.let(first + r), e.let(block * per_block + c)
            with g.when(T.And(row < self.t, column < cfg.n)):
                found = [total(r, c)]
                if cfg.gated:
                    found.append(total(r, c + per_block))
                    if cfg.gate_second:
                        found.reverse()
                if self.row_scales is not None:
                    found = [e.let(f * self.row_scales[row]) for f in found]
                value = finish(cfg, found, column, row, self.bias, self.residual)
                e.store(self.y, row * cfg.n + column, g.narrow(value, cfg.out_dtype, caps), 1)

        g.strided(thread, rows * per_block, warps * g.WARP, one)
