"""Matrix times quantized weight in integers on tile registers, for many rows of activations rounded to int8.

Reads the packed weight of llmc.schedules.ilinear ("quads" of llmc.schedules.qlayout) and gives the same integers. 8-bit codes are
right operands where they lie; 4-bit codes of a pass are unpacked to signed bytes once for all rows of a task, and sums of a group
are scaled and added to float32 totals as soon as they are complete.
"""

from __future__ import annotations

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
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tile_product import PAIR, RightOperands, Rows, TileProduct
from llmc.schedules.tile_tasks import Results, Task, by_height, tasks, tile_schedule
from llmc.schedules.tiles import ELEMENTS, ROW_BYTES, ROWS, TileDot

_WORDS = ROWS * 4  # columns of a right operand


def tile_int_linear(cfg: QuantLinearConfig, caps: Capabilities, least: int = 1, most: int = 0) -> Any:
    """The PrimFunc (x[1 x lead, T, k], w packed, [bias], [residual like y], y[1 x lead, T, n]) with symbolic T.

    As llmc.schedules.ilinear.int_linear. least, most: bounds of T; 0 = none.
    """
    layout, n, k = cfg.layout, cfg.n, cfg.layout.k
    bias_n = 2 * n if cfg.gated else n
    nb, nibbles = layout.n_block, layout.of.bits == 4
    schedule = tile_schedule(cfg, 256 if nibbles else 512)
    epilogue = Epilogue(n, nb, cfg.in_dtype, cfg.out_dtype, cfg.activation, cfg.gated, cfg.gate_second)
    dot = IntDot(caps, layout.of.bits)
    text = str(dot.import_text()["pragma_import_llvm"])
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ones = [1] * cfg.lead
        x = e.tensor("x", [*ones, t, k], cfg.in_dtype)
        w = e.tensor("w", list(layout.packed_shape), "uint8")
        bias = e.tensor("bias", [bias_n], cfg.in_dtype) if cfg.has_bias else None
        residual = e.tensor("residual", [*ones, t, n], cfg.in_dtype) if cfg.has_residual else None
        y = e.tensor("y", [*ones, t, n], cfg.out_dtype)
        with e.root():
            results = Results(
                epilogue,
                caps,
                e.flat(y, t * n),
                e.flat(bias, bias_n) if bias is not None else None,
                e.flat(residual, t * n) if residual is not None else None,
            )
            rows = Rows(-(-layout.padded_k // ROW_BYTES) * ROW_BYTES, 1)
            rounded = quantize_rows(
                caps, layout, cfg.in_dtype, e.flat(x, t * k), t, 0 if nibbles else dot.offset, rows
            )
            codes = QuantCodes(caps, layout, w, layout.blocks * layout.block_bytes)
            words = e.flat(w, layout.blocks * layout.block_bytes // 4, "int32")

            def body(rows_of_task: int) -> None:
                kind = TileDot.SIGNED if nibbles else TileDot.SIGNED_UNSIGNED
                inner = min(ROW_BYTES, layout.group)
                product = TileProduct(caps, schedule, kind, nb, rows_of_task, rows, rounded.data, inner)
                block_sums = (_Nibbles if nibbles else _Bytes)(product, layout, rounded, codes, words)
                with tasks(product, layout.blocks, t, text) as task:
                    base = e.let(task.block * layout.block_bytes)
                    block_sums.run(task, base)
                    with e.loop(task.count) as r:
                        factor = e.let(e.splat(rounded.scales[task.first + r], ROWS))
                        acc = e.scratch(nb)
                        for v in range(product.vectors):
                            e.store(acc, v * ROWS, block_sums.value(base, r, v) * factor, ROWS)
                        results.store(task, r, acc, lambda v: v * ROWS)

            by_height(t, least, most, schedule.rows, body)
    return built[0]


class _Bytes:
    """Sums of 8-bit codes with one scale per output: integers until the end."""

    def __init__(
        self, product: TileProduct, layout: QuantLayout, x: IntActivations, codes: QuantCodes, words: Any
    ) -> None:
        self.product, self.layout, self.x, self.codes, self.words = product, layout, x, codes, words
        self.sums: Any = None

    def run(self, task: Task, base: Any) -> None:
        """The sums of the task's rows times the block at byte `base`."""
        product, nb = self.product, self.product.n_block
        self.sums = sums = e.workspace(product.size, "int32")
        # what codes are too large by, times the sum of a row, is what its sums begin with
        with e.loop(task.count) as r:
            start = e.let(e.splat(self.x.starts[task.first + r], ROWS))
            for v in range(product.vectors):
                e.store(sums, product.vector_at(r, v), start, ROWS)
        steps = self.layout.padded_k // _WORDS
        chunk = max(1, min(steps, product.schedule.columns // _WORDS))
        with e.loop(-(-steps // chunk)) as p:
            begin = e.let(p * chunk)
            size = chunk if steps % chunk == 0 else e.let(T.min(e.i64(chunk), steps - begin))
            at = e.let(base // 4 + begin * (ROWS * nb))
            right = RightOperands(self.words, at, begin, size)
            product.over(
                task.count,
                lambda pair, part: product.accumulate(
                    task.tiles,
                    sums,
                    e.let(product.part_at(pair, part)),
                    e.let(task.first // PAIR + pair),
                    part,
                    right,
                    False,
                    product.ahead(right, pair, part, chunk),
                ),
            )

    def value(self, base: Any, r: Any, v: int) -> Any:
        """float32 sums without the row's scale."""
        tail = e.let(base + self.layout.padded_k // UNIT * self.layout.unit_bytes)
        whole = e.load(self.sums, self.product.vector_at(r, v), ROWS)
        return tirx.Cast(e.vec("float32", ROWS), whole) * self.codes.scale(tail, v * ROWS, ROWS)


class _Nibbles:
    """Sums of 4-bit codes with a scale per group: float32 totals."""

    def __init__(
        self, product: TileProduct, layout: QuantLayout, x: IntActivations, codes: QuantCodes, words: Any
    ) -> None:
        self.product, self.layout, self.codes, self.words = product, layout, codes, words
        self.totals: Any = None

    def run(self, task: Task, base: Any) -> None:
        """As of _Bytes."""
        product, layout, nb = self.product, self.layout, self.product.n_block
        self.totals = e.workspace(product.size)
        pairs = e.let((task.count + (PAIR - 1)) // PAIR)
        with e.loop(pairs * (product.part_at(1, 0) // ROWS)) as i:
            e.store(self.totals, i * ROWS, e.splat(0.0, ROWS), ROWS)
        group = layout.group
        per_pass = max(1, min(layout.groups, product.schedule.columns // group))
        piece = e.workspace(per_pass * (group // 4) * nb, "int32")
        scales = e.workspace(per_pass * nb)
        part_sums = e.workspace(product.size // (-(-product.most // PAIR) * len(product.parts)), "int32")
        with e.loop(-(-layout.groups // per_pass)) as p:
            begin = e.let(p * per_pass)
            inside = per_pass
            if layout.groups % per_pass:
                inside = e.let(T.min(e.i64(per_pass), layout.groups - begin))
            self._unpack(piece, scales, base, begin, inside)

            def body(pair: Any, part: int, begin: Any = begin, inside: Any = inside) -> None:
                with e.loop(inside) as g:
                    self._group(task, piece, scales, part_sums, g, begin, pair, part)

            product.over(task.count, body)

    def value(self, base: Any, r: Any, v: int) -> Any:
        """As of _Bytes."""
        return e.load(self.totals, self.product.vector_at(r, v), ROWS)

    def _unpack(self, piece: Any, scales: Any, base: Any, begin: Any, count: Any) -> None:
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
                        e.store(piece, to, _signed(half), ROWS)
            tail = e.let(at + layout.group // UNIT * layout.unit_bytes)
            for v in range(self.product.vectors):
                e.store(scales, g * nb + v * ROWS, self.codes.scale(tail, v * ROWS, ROWS), ROWS)

    def _group(
        self,
        task: Task,
        piece: Any,
        scales: Any,
        part_sums: Any,
        g: Any,
        begin: Any,
        pair: Any,
        part: int,
    ) -> None:
        """totals[pair, part] += group g of the pass, scaled."""
        product, layout, nb = self.product, self.layout, self.product.n_block
        each = layout.group // product.inner
        right = RightOperands(piece, e.let(g * (layout.group // 4 * nb)), e.let((begin + g) * each), each)
        product.accumulate(
            task.tiles, part_sums, e.i64(0), e.let(task.first // PAIR + pair), part, right, True
        )
        vector, width = product.parts[part]
        factors = [e.let(e.load(scales, g * nb + (vector + c) * ROWS, ROWS)) for c in range(width)]
        to = e.let(product.part_at(pair, part))
        with e.loop(ROWS) as r:
            for tile in range(width * product.heights):
                at = tile * ELEMENTS + r * ROWS
                value = tirx.Cast(e.vec("float32", ROWS), e.load(part_sums, at, ROWS)) * factors[tile % width]
                e.store(self.totals, to + at, e.load(self.totals, to + at, ROWS) + value, ROWS)


def _signed(word: Any) -> Any:
    """Bytes whose lower halves are codes c, as signed bytes c - 8."""
    code = T.reinterpret("int8x64", T.bitwise_and(word, e.const("int32", 0x0F0F0F0F, ROWS)))
    return T.reinterpret(e.vec("int32", ROWS), code - e.const("int8", 8, ROW_BYTES))
