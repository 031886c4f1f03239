"""Matrix times quantized weight with integer arithmetic: activations are rounded to int8 per row on the fly.

One packed weight serves one row and many. Up to FEW rows multiply while codes are unpacked in registers; more go through
a piece of the weight that is unpacked into the first-level cache once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.iactivations import IntActivations, quantize_rows
from llmc.schedules.idot import IntDot
from llmc.schedules.linear import for_tiles
from llmc.schedules.qcodes import QuantCodes
from llmc.schedules.qlayout import UNIT, QuantLayout
from llmc.schedules.qlinear import QuantLinearConfig

FEW = 4
_PIECE = 256  # columns of a piece: with 64 rows of bytes, half of a first-level cache

Vectors = list[list[Any]]


class IntBlocks:
    """Multiplies rows of int8 activations with blocks of a weight in quads.

    Args:
        w: the packed weight as declared; `copies` of them behind one another (experts).
        prefetch: bytes that the weight stream is asked for ahead of its use.
    """

    def __init__(
        self, caps: Capabilities, layout: QuantLayout, w: Any, copies: int = 1, prefetch: int = 2304
    ) -> None:
        self.caps, self.layout, self.prefetch = caps, layout, prefetch
        blocks, self.block_bytes = layout.packed_shape
        size = copies * blocks * self.block_bytes
        self.codes = QuantCodes(caps, layout, w, size)
        self.words = e.flat(w, size // 4, "int32")
        self.dot = IntDot(caps, layout.of.bits)
        self.lanes, self.nb = self.codes.lanes, layout.n_block
        self.vectors = self.codes.vectors
        self.grouped = layout.groups > 1
        self.nibbles = layout.of.bits == 4

    def parallel(self, extent: Any) -> Any:
        """e.parallel with the functions that integer products need."""
        return T.parallel(e.i64(extent), annotations=self.dot.import_text())

    def prepare(self, in_dtype: str, x: Any, rows: Any) -> IntActivations:
        """Rows of x, [rows, k] in in_dtype, rounded."""
        return quantize_rows(self.caps, self.layout, in_dtype, x, rows, self.dot.offset)

    @property
    def max_rows(self) -> int:
        """Rows whose sums fit into the registers beside the weights of a step and a broadcast."""
        spare = self.caps.vector_registers - (self.vectors + 1) * self.dot.registers
        return max(1, min(6, spare // self.vectors))

    def few(self, x: IntActivations, rows: list[Any], base: Any) -> Vectors:
        """float32 sums of a few rows of x times the block whose bytes begin at `base`."""
        layout, lanes = self.layout, self.lanes
        acc = self._scratch(len(rows), "float32")
        part = self._scratch(len(rows), "int32")
        self._fill(acc, lambda r: e.splat(0.0, lanes))
        with e.loop(layout.groups) as g:
            group = e.let(base + g * layout.group_bytes)
            starts = [e.let(e.splat(x.starts[row * layout.groups + g], lanes)) for row in rows]
            self._fill(part, lambda r: starts[r])
            columns = [e.let(row * x.stride + g * (layout.group // 4)) for row in rows]
            with e.loop(layout.group // UNIT) as u:
                unit = e.let(group + u * layout.unit_bytes)
                for line in range(0, layout.unit_bytes + (layout.scale_bytes if self.nibbles else 0), 64):
                    e.prefetch(self.codes.bytes, unit + self.prefetch + line)
                self._few_unit(x, part, unit, [e.let(c + u * (UNIT // 4)) for c in columns])
            tail = e.let(group + layout.group // UNIT * layout.unit_bytes)
            self._scale(acc, part, lambda v: self.codes.scale(tail, v * lanes, lanes))
        self._scale_rows(acc, x, rows)
        return acc

    def _few_unit(self, x: IntActivations, part: Vectors, unit: Any, columns: list[Any]) -> None:
        """part plus a unit's products; more than two rows take its words in a loop: less code."""
        words = UNIT // 8 if self.nibbles else UNIT // 4
        base = e.let(unit // 4)
        if len(columns) <= 2:
            sums = [[e.load(vector, 0, self.lanes) for vector in row] for row in part]
            for j in range(words):
                sums = self._word(x, sums, base, columns, j)
            self._store(part, sums)
            return
        with e.loop(words) as j:
            sums = [[e.load(vector, 0, self.lanes) for vector in row] for row in part]
            self._store(part, self._word(x, sums, base, columns, j))

    def _word(self, x: IntActivations, sums: Vectors, base: Any, columns: list[Any], j: Any) -> Vectors:
        """sums plus word j of every row of a unit times those of x: one quad, or two of 4-bit codes."""
        quads = 2 if self.nibbles else 1
        spread = [[self.dot.activations(x.data[c + (j * quads + h)]) for h in range(quads)] for c in columns]
        out: Vectors = [[] for _ in columns]
        for v in range(self.vectors):
            word = e.let(e.load(self.words, base + j * self.nb + v * self.lanes, self.lanes))
            parts = [self.dot.weights(w) for w in self._quads(word)]
            for r in range(len(columns)):
                value = sums[r][v]
                for h, weights in enumerate(parts):
                    value = e.let(self.dot.add(value, weights, spread[r][h]))
                out[r].append(value)
        return out

    def _quads(self, word: Any) -> list[Any]:
        """A word of codes as vectors of bytes, four columns each."""
        if not self.nibbles:
            return [word]
        mask = e.const("int32", 0x0F0F0F0F, self.lanes)
        high = T.shift_right(word, e.const("int32", 4, self.lanes))
        return [e.let(T.bitwise_and(word, mask)), e.let(T.bitwise_and(high, mask))]

    def many(
        self,
        x: IntActivations,
        count: Any,
        most: int,
        base: Any,
        row_of: Callable[[Any], Any],
        write: Callable[[Vectors, list[Any]], None],
    ) -> None:
        """Rows row_of(0 .. count - 1) times a block, piece by piece of its columns.

        Args:
            most: upper bound of count.
            write: gets (sums, rows) once they are complete.
        """
        layout, lanes, nb = self.layout, self.lanes, self.nb
        size = max(_PIECE, layout.group) if self.grouped else _PIECE
        piece = _Piece(self, size) if self.nibbles else None
        partial = e.workspace(most * nb, "float32" if self.grouped else "int32")
        with e.loop(count) as r:
            start = e.const("int32", 0, lanes)
            if not self.grouped:
                start = e.let(e.splat(x.starts[row_of(r)], lanes))
            for v in range(self.vectors):
                zero = e.splat(0.0, lanes) if self.grouped else start
                e.store(partial, r * nb + v * lanes, zero, lanes)
        with e.loop(-(-layout.padded_k // size)) as p:
            first = e.let(p * size)
            columns = e.let(T.min(e.i64(size), layout.padded_k - first))
            if piece is not None:
                piece.fill(base, first, columns)

            def tile_of(rows: int, start: Any) -> None:
                index = [e.let(row_of(start + r)) for r in range(rows)]
                bases = [e.let(i * x.stride + first // 4) for i in index]
                to = e.let(start * nb)
                if not self.grouped:
                    if piece is None:
                        source, begin = self.words, e.let((base + first * nb) // 4)
                    else:
                        source, begin = piece.words, e.i64(0)
                    self._tile(x, bases, source, begin, columns // 4, partial, to, None)
                    return
                assert piece is not None
                with e.loop(columns // layout.group) as g:
                    number = e.let(first // layout.group + g)
                    starts = [e.let(e.splat(x.starts[i * layout.groups + number], lanes)) for i in index]
                    begin = e.let(g * (layout.group // 4))
                    scale = lambda v, g=g: e.load(piece.scales, g * nb + v * lanes, lanes)  # noqa: E731
                    at = [e.let(b + begin) for b in bases]
                    self._tile(
                        x, at, piece.words, e.let(begin * nb), layout.group // 4, partial, to, scale, starts
                    )

            for_tiles(self.max_rows, count, tile_of)
        with e.loop(count) as r:
            acc = self._scratch(1, "float32")
            tail = e.let(base + layout.padded_k // UNIT * layout.unit_bytes)
            for v in range(self.vectors):
                value = e.load(partial, r * nb + v * lanes, lanes)
                if not self.grouped:
                    value = tirx.Cast(e.vec("float32", lanes), value)
                    value = value * self.codes.scale(tail, v * lanes, lanes)
                e.store(acc[0][v], 0, value, lanes)
            rows = [e.let(row_of(r))]
            self._scale_rows(acc, x, rows)
            write(acc, rows)

    def _tile(
        self,
        x: IntActivations,
        bases: list[Any],
        source: Any,
        begin: Any,
        quads: Any,
        partial: Any,
        to: Any,
        scale: Callable[[int], Any] | None,
        starts: list[Any] | None = None,
    ) -> None:
        """partial[row] += the products of `quads` quads; with scales it is float32, else the int32 sums themselves."""
        lanes, nb = self.lanes, self.nb
        sums = self._scratch(len(bases), "int32")
        for r, row in enumerate(sums):
            for v, vector in enumerate(row):
                at = to + r * nb + v * lanes
                e.store(vector, 0, starts[r] if starts is not None else e.load(partial, at, lanes), lanes)
        with e.loop(quads) as q:
            weights = []
            for v in range(self.vectors):
                word = e.let(e.load(source, begin + q * nb + v * lanes, lanes))
                weights.append(self.dot.weights(word))
            for r, row in enumerate(sums):
                spread = self.dot.activations(x.data[bases[r] + q])
                for v, vector in enumerate(row):
                    e.store(vector, 0, self.dot.add(e.load(vector, 0, lanes), weights[v], spread), lanes)
        for v in range(self.vectors):
            factor = e.let(scale(v)) if scale is not None else None
            for r, row in enumerate(sums):
                at = e.let(to + r * nb + v * lanes)
                value = e.load(row[v], 0, lanes)
                if factor is not None:
                    value = e.load(partial, at, lanes) + tirx.Cast(e.vec("float32", lanes), value) * factor
                e.store(partial, at, value, lanes)

    def store(
        self,
        acc: Vectors,
        epilogue: Epilogue,
        rows: list[Any],
        block: Any,
        y: Any,
        bias: Any,
        residual: Any,
        bias_base: Any = 0,
    ) -> None:
        """Apply the epilogue to sums and store them to rows of y."""
        epilogue.store(
            lambda r, v: e.load(acc[r][v], 0, self.lanes),
            lambda r, v, i: acc[r][v][i],
            rows,
            block,
            y,
            self.caps,
            bias,
            residual,
            bias_base,
        )

    def _scale(self, acc: Vectors, part: Vectors, scale: Callable[[int], Any]) -> None:
        """acc += part * scale."""
        for v in range(self.vectors):
            factor = e.let(scale(v))
            for total, sums in zip(acc, part, strict=True):
                value = tirx.Cast(e.vec("float32", self.lanes), e.load(sums[v], 0, self.lanes)) * factor
                e.store(total[v], 0, e.load(total[v], 0, self.lanes) + value, self.lanes)

    def _scale_rows(self, acc: Vectors, x: IntActivations, rows: list[Any]) -> None:
        """acc *= the scale of its row of x."""
        for row, vectors in zip(rows, acc, strict=True):
            factor = e.let(e.splat(x.scales[row], self.lanes))
            for vector in vectors:
                e.store(vector, 0, e.load(vector, 0, self.lanes) * factor, self.lanes)

    def _scratch(self, rows: int, dtype: str) -> Vectors:
        return [[e.scratch(self.lanes, dtype) for _ in range(self.vectors)] for _ in range(rows)]

    def _fill(self, vectors: Vectors, value: Callable[[int], Any]) -> None:
        self._store(vectors, [[value(r)] * len(row) for r, row in enumerate(vectors)])

    def _store(self, vectors: Vectors, values: Vectors) -> None:
        for row, new in zip(vectors, values, strict=True):
            for vector, value in zip(row, new, strict=True):
                e.store(vector, 0, value, self.lanes)


class _Piece:
    """Columns of a block of 4-bit codes, unpacked: bytes in quads, and the scales of its groups in float32."""

    def __init__(self, work: IntBlocks, columns: int) -> None:
        self.work = work
        self.words = e.workspace(columns // 4 * work.nb, "int32")
        self.scales = e.workspace(columns // work.layout.group * work.nb)

    def fill(self, base: Any, first: Any, columns: Any) -> None:
        """Unpack `columns` columns from `first` of the block at `base`."""
        work, layout = self.work, self.work.layout
        lanes, nb = work.lanes, work.nb
        with e.loop(columns // layout.group) as g:
            group = e.let(base + (first // layout.group + g) * layout.group_bytes)
            with e.loop(layout.group // 8) as j:
                at = e.let(group + j * (4 * nb))
                for line in range(0, 4 * nb, 64):
                    e.prefetch(work.codes.bytes, at + work.prefetch + line)
                for v in range(work.vectors):
                    word = e.let(e.load(work.words, at // 4 + v * lanes, lanes))
                    for h, quad in enumerate(work._quads(word)):
                        to = (g * (layout.group // 4) + 2 * j + h) * nb + v * lanes
                        e.store(self.words, to, quad, lanes)
            tail = e.let(group + layout.group // UNIT * layout.unit_bytes)
            for v in range(work.vectors):
                e.store(self.scales, g * nb + v * lanes, work.codes.scale(tail, v * lanes, lanes), lanes)


def int_linear(cfg: QuantLinearConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[1 x lead, T, k], w packed, [bias], [residual like y], y[1 x lead, T, n]) with symbolic T."""
    layout, n, k = cfg.layout, cfg.n, cfg.layout.k
    bias_n = 2 * n if cfg.gated else n
    epilogue = Epilogue(
        n, layout.n_block, cfg.in_dtype, cfg.out_dtype, cfg.activation, cfg.gated, cfg.gate_second
    )
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
            bf = e.flat(bias, bias_n) if bias is not None else None
            rf = e.flat(residual, t * n) if residual is not None else None
            yf = e.flat(y, t * n)
            work = IntBlocks(caps, layout, w, prefetch=cfg.prefetch)
            rounded = work.prepare(cfg.in_dtype, e.flat(x, t * k), t)

            def write(block: Any, acc: Vectors, rows: list[Any]) -> None:
                work.store(acc, epilogue, rows, block, yf, bf, rf)

            with T.If(t <= FEW):
                with T.Then(), work.parallel(layout.blocks) as block:

                    def rows_at(rows: int, start: Any) -> None:
                        at = [e.let(start + r) for r in range(rows)]
                        write(block, work.few(rounded, at, e.let(block * work.block_bytes)), at)

                    for_tiles(FEW, t, rows_at)
                with T.Else():
                    row_blocks = (t + (cfg.t_block - 1)) // cfg.t_block
                    with work.parallel(layout.blocks * row_blocks) as task:
                        block = e.let(task // row_blocks)
                        first = e.let(task % row_blocks * cfg.t_block)
                        work.many(
                            rounded,
                            e.let(T.min(e.i64(cfg.t_block), t - first)),
                            cfg.t_block,
                            e.let(block * work.block_bytes),
                            lambda r: first + r,
                            lambda acc, rows: write(block, acc, rows),
                        )
    return built[0]
