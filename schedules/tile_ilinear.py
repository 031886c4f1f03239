"""Matrix times quantized weight in integers on tile registers, for many rows of activations rounded to int8.

Reads the packed weight of llmc.schedules.ilinear ("quads" of llmc.schedules.qlayout) and gives the same integers. 8-bit codes are
right operands where they lie; 4-bit codes of a pass are unpacked to signed bytes once for all rows of a task, and sums of a group
are scaled and added to float32 totals as soon as they are complete.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.iactivations import IntActivations, quantize_rows
from llmc.schedules.idot import IntDot
from llmc.schedules.qcodes import QuantCodes
from llmc.schedules.qlayout import UNIT, QuantLayout
from llmc.schedules.qlinear import QuantLinearConfig, QuantTensors
from llmc.schedules.tile_product import PAIR, RightOperands, Rows, TileProduct
from llmc.schedules.tile_tasks import BlockSums, Results, Task, by_height, tasks, tile_schedule
from llmc.schedules.tiles import ELEMENTS, ROW_BYTES, ROWS, TileDot

_WORDS = ROWS * 4  # columns of a right operand


def tile_int_linear(cfg: QuantLinearConfig, caps: Capabilities, least: int = 1, most: int = 0) -> Any:
    """The PrimFunc (x[1 x lead, T, k], w packed, [bias], [residual like y], y[1 x lead, T, n]) with symbolic T.

    As llmc.schedules.ilinear.int_linear. least, most: bounds of T; 0 = none.
    """
    layout, n = cfg.layout, cfg.n
    nb, nibbles = layout.n_block, layout.of.bits == 4
    schedule = tile_schedule(cfg, columns=256 if nibbles else 512)
    epilogue = Epilogue(n, nb, cfg.in_dtype, cfg.out_dtype, cfg.activation, cfg.gated, cfg.gate_second)
    dot = IntDot(caps, layout.of.bits)
    text = str(dot.import_text()["pragma_import_llvm"])
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
            rows = Rows(-(-layout.padded_k // ROW_BYTES) * ROW_BYTES, 1)
            rounded = quantize_rows(
                caps, layout, cfg.in_dtype, args.x, t, 0 if nibbles else dot.offset, tiled=rows
            )
            codes = QuantCodes(caps, layout, args.w, layout.blocks * layout.block_bytes)
            words = e.flat(args.w, layout.blocks * layout.block_bytes // 4, "int32")

            def body(rows_of_task: int) -> None:
                kind = TileDot.SIGNED if nibbles else TileDot.SIGNED_UNSIGNED
                inner = min(ROW_BYTES, layout.group)
                product = TileProduct(caps, schedule, kind, nb, rows_of_task, rows, rounded.data, inner)
                with tasks(product, layout.blocks, t, text) as task:
                    work = (_Nibbles if nibbles else _Bytes)(product, task, layout, rounded, codes, words)

                    def finish(block: Any, r: Any, at: Any) -> None:
                        row = e.let(task.first + r)
                        factor = e.let(e.splat(rounded.scales[row], ROWS))
                        acc = e.scratch(nb)
                        for v in range(product.vectors):
                            e.store(acc, v * ROWS, work.value(block, r, at, v) * factor, ROWS)
                        results.store(block, row, acc, lambda v: v * ROWS)

                    work.run(finish)

            by_height(t, least, most, schedule.rows, body)
    return built[0]


class _IntSums(BlockSums):
    """What both widths of codes have in common."""

    def __init__(
        self,
        product: TileProduct,
        task: Task,
        layout: QuantLayout,
        x: IntActivations,
        codes: QuantCodes,
        words: Any,
    ) -> None:
        super().__init__(product, task, "float32" if layout.of.bits == 4 else "int32")
        self.layout, self.x, self.codes, self.words = layout, x, codes, words

    @abstractmethod
    def value(self, block: Any, r: Any, at: Any, v: int) -> Any:
        """float32: vector v of row r's sums without the row's scale; the block's begin at element `at`."""


class _Bytes(_IntSums):
    """Sums of 8-bit codes with one scale per output: integers until the end."""

    @property
    def steps(self) -> int:
        """Right operands in the columns."""
        return self.layout.padded_k // _WORDS

    @property
    def chunk(self) -> int:
        """Steps of a pass."""
        return max(1, min(self.steps, self.product.schedule.columns // _WORDS))

    @property
    def passes(self) -> int:
        """As of BlockSums."""
        return -(-self.steps // self.chunk)

    def start(self, at: Any) -> None:
        """What codes are too large by, times the sum of a row."""
        with e.loop(self.task.count) as r:
            start = e.let(e.splat(self.x.starts[self.task.first + r], ROWS))
            for v in range(self.product.vectors):
                e.store(self.sums, at + self.product.vector_at(r, v), start, ROWS)

    def one(self, block: Any, at: Any, p: Any) -> None:
        """As of BlockSums."""
        begin, size = e.let(p * self.chunk), self.chunk
        if self.steps % self.chunk:
            size = e.let(T.min(e.i64(self.chunk), self.steps - begin))
        base = e.let(block * (self.layout.block_bytes // 4) + begin * (ROWS * self.product.n_block))
        following = None if self.task.most == 1 else base + self.layout.block_bytes // 4
        self.accumulate(at, RightOperands(self.words, base, begin, size), False, self.chunk, following)

    def value(self, block: Any, r: Any, at: Any, v: int) -> Any:
        """As of _IntSums."""
        layout = self.layout
        tail = e.let(block * layout.block_bytes + layout.padded_k // UNIT * layout.unit_bytes)
        whole = e.load(self.sums, at + self.product.vector_at(r, v), ROWS)
        return tirx.Cast(e.vec("float32", ROWS), whole) * self.codes.scale(tail, v * ROWS, ROWS)


class _Nibbles(_IntSums):
    """Sums of 4-bit codes with a scale per group: float32 totals."""

    def __init__(
        self,
        product: TileProduct,
        task: Task,
        layout: QuantLayout,
        x: IntActivations,
        codes: QuantCodes,
        words: Any,
    ) -> None:
        super().__init__(product, task, layout, x, codes, words)
        nb = product.n_block
        self.piece = e.workspace(self.per_pass * (layout.group // 4) * nb, "int32")
        self.scales = e.workspace(self.per_pass * nb)
        # of one group, one pair of row tiles and one part of the block
        self.part = e.workspace(product.part_size, "int32")

    @property
    def per_pass(self) -> int:
        """Groups of a pass."""
        return max(1, min(self.layout.groups, self.product.schedule.columns // self.layout.group))

    @property
    def passes(self) -> int:
        """As of BlockSums."""
        return -(-self.layout.groups // self.per_pass)

    def start(self, at: Any) -> None:
        """Zeros: totals are added to as vectors."""
        pairs = e.let((self.task.count + (PAIR - 1)) // PAIR)
        with e.loop(pairs * (self.product.part_at(1, 0) // ROWS)) as i:
            e.store(self.sums, at + i * ROWS, e.splat(0.0, ROWS), ROWS)

    def one(self, block: Any, at: Any, p: Any) -> None:
        """As of BlockSums."""
        begin, inside = e.let(p * self.per_pass), self.per_pass
        if self.layout.groups % self.per_pass:
            inside = e.let(T.min(e.i64(self.per_pass), self.layout.groups - begin))
        self._unpack(e.let(block * self.layout.block_bytes), begin, inside)

        def body(pair: Any, part: int) -> None:
            with e.loop(inside) as g:
                self._group(at, g, begin, pair, part)

        self.product.over(self.task.count, body)

    def value(self, block: Any, r: Any, at: Any, v: int) -> Any:
        """As of _IntSums."""
        return e.load(self.sums, at + self.product.vector_at(r, v), ROWS)

    def _unpack(self, base: Any, begin: Any, count: Any) -> None:
        """`count` groups from `begin` on: signed bytes in quads, and float32 scales."""
        layout, nb = self.layout, self.product.n_block
        with e.loop(count) as g:
            at = e.let(base + (begin + g) * layout.group_bytes)
            with e.loop(layout.group // 8) as j:
                for v in range(self.product.vectors):
                    word = e.let(e.load(self.words, (at + j * (4 * nb)) // 4 + v * ROWS, ROWS))
                    halves = (word, T.shift_right(word, e.const("int32", 4, ROWS)))
                    for h, half in enumerate(halves):
                        to = (g * (layout.group // 4) + 2 * j + h) * nb + v * ROWS
                        e.store(self.piece, to, _signed(half), ROWS)
            tail = e.let(at + layout.group // UNIT * layout.unit_bytes)
            for v in range(self.product.vectors):
                e.store(self.scales, g * nb + v * ROWS, self.codes.scale(tail, v * ROWS, ROWS), ROWS)

    def _group(self, at: Any, g: Any, begin: Any, pair: Any, part: int) -> None:
        """Totals of a pair and a part += group g of the pass, scaled."""
        product, layout, nb = self.product, self.layout, self.product.n_block
        each = layout.group // product.inner
        first = e.let((begin + g) * each)
        right = RightOperands(self.piece, e.let(g * (layout.group // 4 * nb)), first, each)
        number = e.let(self.task.first // PAIR + pair)
        product.accumulate(self.task.tiles, self.part, e.i64(0), number, part, right, True)
        vector, width = product.parts[part]
        factors = [e.let(e.load(self.scales, g * nb + (vector + c) * ROWS, ROWS)) for c in range(width)]
        to = e.let(at + product.part_at(pair, part))
        with e.loop(ROWS) as r:
            for tile in range(width * product.heights):
                here = tile * ELEMENTS + r * ROWS
                value = tirx.Cast(e.vec("float32", ROWS), e.load(self.part, here, ROWS))
                total = e.load(self.sums, to + here, ROWS) + value * factors[tile % width]
                e.store(self.sums, to + here, total, ROWS)


def _signed(word: Any) -> Any:
    """Bytes whose lower halves are codes c, as signed bytes c - 8."""
    code = T.reinterpret("int8x64", T.bitwise_and(word, e.const("int32", 0x0F0F0F0F, ROWS)))
    return T.reinterpret(e.vec("int32", ROWS), code - e.const("int8", 8, ROW_BYTES))
