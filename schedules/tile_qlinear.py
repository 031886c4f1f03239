"""Matrix times quantized weight on tile registers, for many rows of bf16 activations.

Weights of a pass become bf16 once for all rows of a task, with scales and zero points in them: rounded to 8 bits each, which
the kernel on vectors, where scales are applied to float32 sums, does not do. It is what a source model in bf16 does too.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities, TileUnit
from llmc.quant.schemes import Code
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.qcodes import QuantCodes
from llmc.schedules.qlayout import UNIT, QuantLayout
from llmc.schedules.qlinear import QuantLinearConfig, QuantTensors
from llmc.schedules.tile_linear import pack_rows
from llmc.schedules.tile_product import RightOperands, Rows, TileProduct
from llmc.schedules.tile_tasks import BlockSums, Results, Task, by_height, tasks, tile_schedule
from llmc.schedules.tiles import ROWS, TileDot

_STEP = 32  # columns of a left operand


def quant_tiles_from(config: QuantLinearConfig, caps: Capabilities, schedule: Any) -> int:
    """The least number of rows that take tiles; 0 = none.

    Integers go through bytes; other codes only if activations are bf16, not rounded, and stand in the weight's order.
    """
    layout = config.layout
    # columns that the vector kernel adds in floating point; scales that it applies to float32 sums
    if layout.outliers or layout.of.activations is Code.E4M3:
        return 0
    usable = layout.quads or (config.in_dtype == "bfloat16" and not layout.of.order)
    return int(schedule.tiles_from) if usable and caps.tiles is not TileUnit.NONE else 0


def tile_quant_linear(cfg: QuantLinearConfig, caps: Capabilities, least: int = 1, most: int = 0) -> Any:
    """The PrimFunc (x[1 x lead, T, k], w packed, [bias], [residual like y], y[1 x lead, T, n]) with symbolic T.

    As llmc.schedules.qlinear.quant_linear. least, most: bounds of T; 0 = none.
    """
    layout, n, k = cfg.layout, cfg.n, cfg.layout.k
    nb = layout.n_block
    # unpacking is a third of the work of 256 rows
    schedule = tile_schedule(cfg, rows=512)
    epilogue = Epilogue(n, nb, cfg.in_dtype, cfg.out_dtype, cfg.activation, cfg.gated, cfg.gate_second)
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        args = QuantTensors(cfg, t)
        with e.root():
            args.view()
            results = Results(
                epilogue,
                caps,
                args.y,
                args.bias,
                args.residual,
            )
            codes = QuantCodes(caps, layout, args.w, layout.blocks * layout.block_bytes)
            rows = Rows(-(-layout.padded_k // _STEP) * 64, 2)
            left = pack_rows(caps, rows, args.x, t, k)
            text = str(codes.import_text().get("pragma_import_llvm", ""))

            def body(rows_of_task: int) -> None:
                product = TileProduct(caps, schedule, TileDot.BF16, nb, rows_of_task, rows, left)
                with tasks(product, layout.blocks, t, text) as task:
                    work = _UnpackedSums(product, task, layout, codes)

                    def finish(block: Any, r: Any, at: Any) -> None:
                        row = e.let(task.first + r)
                        results.store(block, row, work.sums, lambda v: at + product.vector_at(r, v))

                    work.run(finish)

            by_height(t, least, most, schedule.rows, body)
    return built[0]


class _UnpackedSums(BlockSums):
    """Sums over columns of a quantized weight as bf16."""

    def __init__(self, product: TileProduct, task: Task, layout: QuantLayout, codes: QuantCodes) -> None:
        super().__init__(product, task)
        self.layout, self.codes = layout, codes
        self.pieces = layout.padded_k // layout.piece
        # whole pieces and whole steps
        least = max(layout.piece, _STEP)
        columns = min(layout.padded_k, max(least, product.schedule.columns // least * least))
        self.per_pass = columns // layout.piece
        # two columns in a lane
        self.pairs = e.workspace(columns // 2 * product.n_block, "int32")

    @property
    def passes(self) -> int:
        """As of BlockSums."""
        return -(-self.pieces // self.per_pass)

    def one(self, block: Any, at: Any, p: Any) -> None:
        """As of BlockSums."""
        layout, nb = self.layout, self.product.n_block
        begin, inside = e.let(p * self.per_pass), self.per_pass
        if self.pieces % self.per_pass:
            inside = e.let(T.min(e.i64(self.per_pass), self.pieces - begin))
        base = e.let(block * layout.block_bytes)
        with e.loop(inside) as q:
            self._unpack(self.pairs, base, e.let(begin + q), e.let(q * (layout.piece // 2 * nb)))
        steps = inside * layout.piece // _STEP
        right = RightOperands(self.pairs, e.i64(0), e.let(begin * layout.piece // _STEP), steps)
        self.accumulate(at, right, True if self.passes == 1 else p == 0)

    def _unpack(self, to: Any, base: Any, p: Any, at: Any) -> None:
        """Piece p of the block, to element `at`."""
        codes, nb, vectors = self.codes, self.product.n_block, self.product.vectors
        place = codes.place(base, p)
        scales = [e.let(codes.scale(place.scales, v * ROWS, ROWS, place.tops)) for v in range(vectors)]
        shifts = None
        if codes.has_shift:
            shifts = [e.let(codes.shift(place, v * ROWS, ROWS, scales[v])) for v in range(vectors)]
        steps = codes.steps * self.layout.piece // UNIT
        with e.loop(steps) as s:
            step = codes.step(place, s, e.i64(0), vectors)
            for i in range(codes.each):
                for v in range(vectors):
                    halves = []
                    for value in step.floats(i, v):
                        value = value * scales[v]
                        value = value if shifts is None else value + shifts[v]
                        halves.append(e.narrow(e.let(value), "bfloat16", ROWS, codes.caps))
                    e.store(
                        to,
                        at + (s * codes.each + i) * nb + v * ROWS,
                        _zip(halves[0], halves[1], codes.caps),
                        ROWS,
                    )


def _zip(even: Any, odd: Any, caps: Capabilities) -> Any:
    """Lanes of pairs (even[i], odd[i]) from bf16 bits."""
    if caps.has_bf16_dot:
        return e.zip_bf16(even, odd)
    wide = e.vec("uint32", ROWS)
    high = T.shift_left(tirx.Cast(wide, odd), e.const("uint32", 16, ROWS))
    return T.reinterpret(e.vec("int32", ROWS), T.bitwise_or(tirx.Cast(wide, even), high))
