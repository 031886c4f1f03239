"""Matrix times quantized weight, for one row or many: codes are unpacked on the way, sums are in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.layout import BlockedLayout
from llmc.schedules.linear import MicroKernel, row_sizes, store_rows
from llmc.schedules.qcodes import PAIRS, QuantCodes
from llmc.schedules.qlayout import UNIT, QuantLayout

# up to so many rows multiply while unpacking in registers; more go through an unpacked piece in the cache
FEW = 4
_SERIAL_ROWS = 2  # a parallel launch costs more than preparing this many rows


@dataclass(frozen=True)
class QuantLinearConfig:
    """y[T, n] = x[T, k] @ dequantize(weight)[n, k].T (+ bias[n]).

    Attributes:
        n: outputs.
        layout: of the packed weight; has its scheme and k, and n unless gated (then see llmc.schedules.qlayout.in_turns).
        in_dtype: of x; float32, float16 or bfloat16.
        out_dtype: of y; float32 or in_dtype.
        has_bias: a bias[n] (gated: [2n]) of in_dtype follows the weight.
        lead: unit dimensions before T in x and y.
        t_block: rows of one task.
        prefetch: bytes that the weight stream is asked for ahead of its use; 0 = that is left to the machine.
        activation, gated, gate_second: see LinearAttrs in llmc/ops.py.
        has_residual: a residual of y's shape and in_dtype follows the bias.
    """

    n: int
    layout: QuantLayout
    in_dtype: str
    out_dtype: str
    has_bias: bool = False
    lead: int = 0
    t_block: int = 240
    prefetch: int = 2304
    activation: str = ""
    gated: bool = False
    gate_second: bool = False
    has_residual: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> QuantLinearConfig:
        return QuantLinearConfig(**{**values, "layout": QuantLayout(**values["layout"])})


@dataclass(frozen=True)
class Activations:
    """x as the multiply wants it.

    Attributes:
        data: flat; int32 pairs if `dot`, else float32.
        stride: elements of it per row.
        dot: bf16 pairs for a two-way dot product.
        sums: sum over each piece of columns, float32 [rows, pieces]; for weights with zero points.
    """

    data: Any
    stride: int
    dot: bool
    sums: Any | None


class QuantBlocks:
    """Multiplies rows of x with blocks of a quantized weight.

    Args:
        x: flat view of the activations in in_dtype, [rows, k].
        w: the packed weight as declared; `copies` of them behind one another (experts).
    """

    def __init__(
        self,
        caps: Capabilities,
        layout: QuantLayout,
        in_dtype: str,
        x: Any,
        rows: Any,
        w: Any,
        copies: int = 1,
        prefetch: int = 2304,
    ) -> None:
        self.caps, self.layout, self.in_dtype = caps, layout, in_dtype
        self.x, self.rows, self.prefetch = x, rows, prefetch
        blocks, self.block_bytes = layout.packed_shape
        self.w_size = copies * blocks * self.block_bytes
        self.codes = QuantCodes(caps, layout, w, self.w_size)
        self.lanes, self.vectors = self.codes.lanes, self.codes.vectors
        self.pieces = layout.padded_k // layout.piece
        self.units = layout.piece // UNIT
        dot = in_dtype == "bfloat16" and caps.has_bf16_dot
        self.few_dot = dot and self.codes.fused_pairs
        self.many_dot = dot and self.codes.exact_in_bf16

    def parallel(self, extent: Any) -> Any:
        """e.parallel with the functions that unpacking needs."""
        return T.parallel(e.i64(extent), annotations=self.codes.import_text())

    def prepare(self, dot: bool) -> Activations:
        """x, converted and padded if need be."""
        layout = self.layout
        k, padded = layout.k, layout.padded_k
        stride = padded // 2 if dot else padded
        sums = None if layout.of.symmetric else e.workspace(self.rows * self.pieces)
        direct = k == padded and (dot or self.in_dtype == "float32")
        if direct:
            data = e.flat(self.x, self.rows * stride, "int32") if dot else self.x
        else:
            data = e.workspace(self.rows * padded, "uint16" if dot else "float32")
        if not direct or sums is not None:
            self._each_row(lambda r: self._prepare_row(r, None if direct else data, sums))
        if dot and not direct:
            data = e.flat(data, self.rows * stride, "int32")
        return Activations(data, stride, dot, sums)

    def _each_row(self, body: Callable[[Any], None]) -> None:
        with T.If(self.rows <= _SERIAL_ROWS):
            with T.Then(), e.loop(self.rows) as r:
                body(r)
            with T.Else(), e.parallel(self.rows, self.caps) as r:
                body(r)

    def _prepare_row(self, r: Any, data: Any | None, sums: Any | None) -> None:
        k, padded, lanes = self.layout.k, self.layout.padded_k, self.lanes
        source, target = e.let(r * k), e.let(r * padded)

        if data is not None:
            widened = str(data.dtype) == "float32"

            def converted(value: Any, width: int) -> Any:
                return e.widen(value, self.in_dtype, width) if widened else value

            with e.loop(k // lanes) as j:
                value = e.load(self.x, source + j * lanes, lanes)
                e.store(data, target + j * lanes, converted(value, lanes), lanes)
            with e.loop(k // lanes * lanes, k) as j:
                e.store(data, target + j, converted(self.x[source + j], 1), 1)
            with e.loop(k, padded) as j:
                e.store(data, target + j, tirx.const(0, str(data.dtype)), 1)
        if sums is not None:
            piece = self.layout.piece
            with e.loop(self.pieces) as p:
                total = e.scratch(1)
                e.store(total, 0, e.f32(0.0), 1)
                begin = e.let(p * piece)
                with e.loop(begin, T.min(begin + piece, e.i64(k))) as j:
                    e.store(total, 0, total[0] + e.widen(self.x[source + j], self.in_dtype, 1), 1)
                e.store(sums, r * self.pieces + p, total[0], 1)

    def micro(self, x: Activations, scratch: Any) -> MicroKernel:
        """The plain micro-kernel over an unpacked piece; also what stores results."""
        layout = BlockedLayout(self.layout.n_block, 2 if x.dot else 1)
        dtype = "bfloat16" if x.dot else "float32"
        return MicroKernel(self.caps, layout, dtype, self.layout.padded_k, x.data, scratch, 0)

    def few(self, x: Activations, micro: MicroKernel, rows: list[Any], base: Any) -> list[list[Any]]:
        """Accumulators of a few rows of x times the block whose bytes begin at `base`."""
        count = len(rows)
        acc, part = micro.new_accumulators(count), micro.new_accumulators(count)
        self._zero(acc)
        starts = [e.let(row * x.stride) for row in rows]
        with e.loop(self.pieces) as p:
            at, tail = self._piece(base, p)
            self._zero(part)
            with e.loop(self.units) if self.units > 1 else _once() as u:
                unit = e.let(at + u * self.layout.unit_bytes)
                step = PAIRS if x.dot else UNIT
                columns = [e.let(s + (p * self.units + u) * step) for s in starts]
                for line in range(0, self.layout.unit_bytes, 64):
                    e.prefetch(self.codes.bytes, unit + self.prefetch + line)
                # chains of values, not of stores: a quarter of the statements, which passes over TIR are slow at
                sums = [[e.load(vector, 0, self.lanes) for vector in row] for row in part]
                for t in range(PAIRS):
                    sums = self._multiply(x, sums, columns, unit, t)
                for r in range(count):
                    for v in range(self.vectors):
                        e.store(part[r][v], 0, sums[r][v], self.lanes)
            for v in range(self.vectors):
                scale = e.let(self.codes.scale(tail, v * self.lanes, self.lanes))
                shift = None
                if x.sums is not None:
                    shift = e.let(self.codes.zero(tail, v * self.lanes, self.lanes))
                for r, row in enumerate(rows):
                    value = e.load(part[r][v], 0, self.lanes)
                    if x.sums is not None:
                        value = value - shift * e.splat(x.sums[row * self.pieces + p], self.lanes)
                    e.store(acc[r][v], 0, e.load(acc[r][v], 0, self.lanes) + value * scale, self.lanes)
        return acc

    def _multiply(self, x: Activations, sums: Any, columns: list[Any], unit: Any, t: int) -> list[list[Any]]:
        """sums plus columns 2t and 2t + 1 of a unit times those of x."""
        lanes = self.lanes
        out: list[list[Any]] = [[] for _ in columns]
        splats = 1 if x.dot else 2
        a = [
            [e.let(e.splat(x.data[column + splats * t + p], lanes)) for p in range(splats)]
            for column in columns
        ]
        for v in range(self.vectors):
            if x.dot:
                pairs = e.let(self.codes.pairs(unit, t, v))
                for r in range(len(columns)):
                    out[r].append(e.let(e.dot_bf16(sums[r][v], a[r][0], pairs)))
                continue
            even, odd = (e.let(f) for f in self.codes.floats(unit, t, v))
            for r in range(len(columns)):
                out[r].append(e.let(sums[r][v] + a[r][0] * even + a[r][1] * odd))
        return out

    def many(
        self,
        x: Activations,
        count: Any,
        most: int,
        base: Any,
        row_of: Callable[[Any], Any],
        write: Callable[[MicroKernel, list[list[Any]], list[Any]], None],
    ) -> None:
        """Rows row_of(0 .. count - 1) times a block: each piece is unpacked once for all of them.

        Args:
            most: upper bound of count.
            write: gets (micro-kernel, accumulators, rows) once they are complete.
        """
        layout, lanes, nb = self.layout, self.lanes, self.layout.n_block
        steps = layout.piece // 2 if x.dot else layout.piece
        scratch = e.workspace(steps * nb, "int32" if x.dot else "float32")
        partial = e.workspace(most * nb)
        micro = self.micro(x, scratch)
        tile = micro.max_rows()
        with e.loop(count * self.vectors) as i:
            e.store(partial, i * lanes, e.splat(0.0, lanes), lanes)
        with e.loop(self.pieces) as p:
            at, tail = self._piece(base, p)
            with e.loop(self.units) if self.units > 1 else _once() as u:
                self._unpack(x, scratch, e.let(at + u * layout.unit_bytes), u)

            def tile_of(rows: int, start: Any) -> None:
                acc = micro.new_accumulators(rows)
                self._zero(acc)
                index = [e.let(row_of(start + r)) for r in range(rows)]
                micro.accumulate(acc, rows, [e.let(i * x.stride + p * steps) for i in index], 0, steps)
                for v in range(self.vectors):
                    scale = e.let(self.codes.scale(tail, v * lanes, lanes))
                    for r in range(rows):
                        value = e.load(acc[r][v], 0, lanes)
                        if x.sums is not None:
                            shift = self.codes.zero(tail, v * lanes, lanes)
                            value = value - shift * e.splat(x.sums[index[r] * self.pieces + p], lanes)
                        to = e.let((start + r) * nb + v * lanes)
                        e.store(partial, to, e.load(partial, to, lanes) + value * scale, lanes)

            for_tiles(tile, count, tile_of)
        with e.loop(count) as r:
            acc = micro.new_accumulators(1)
            for v in range(self.vectors):
                e.store(acc[0][v], 0, e.load(partial, r * nb + v * lanes, lanes), lanes)
            write(micro, acc, [e.let(row_of(r))])

    def _unpack(self, x: Activations, scratch: Any, unit: Any, u: Any) -> None:
        """A unit into the piece, as the micro-kernel reads it."""
        lanes, nb = self.lanes, self.layout.n_block
        for t in range(PAIRS):
            for v in range(self.vectors):
                if x.dot:
                    to = (u * PAIRS + t) * nb + v * lanes
                    e.store(scratch, to, self._pairs(unit, t, v), lanes)
                    continue
                for p, values in enumerate(self.codes.floats(unit, t, v)):
                    e.store(scratch, (u * UNIT + 2 * t + p) * nb + v * lanes, values, lanes)

    def _pairs(self, unit: Any, t: int, v: int) -> Any:
        if self.codes.fused_pairs:
            return self.codes.pairs(unit, t, v)
        even, odd = (e.narrow(f, "bfloat16", self.lanes, self.caps) for f in self.codes.floats(unit, t, v))
        return e.zip_bf16(e.let(even), e.let(odd))

    def _piece(self, base: Any, p: Any) -> tuple[Any, Any]:
        """(first byte of piece p's units, first byte of its scales) in the block at `base`."""
        layout = self.layout
        size = self.units * layout.unit_bytes
        per_group = layout.group // layout.piece
        group = e.let(base + p // per_group * layout.group_bytes)
        at = e.let(group + p % per_group * size)
        return at, e.let(group + per_group * size)

    def _zero(self, acc: list[list[Any]]) -> None:
        for row in acc:
            for vector in row:
                e.store(vector, 0, e.splat(0.0, self.lanes), self.lanes)


def for_tiles(tile: int, count: Any, body: Callable[[int, Any], None]) -> None:
    """body(rows, start) over 0 .. count - 1 in tiles of `tile` rows, then of powers of two."""
    with e.loop(count // tile) as i:
        body(tile, i * tile)
    done = e.let(count // tile * tile)
    rest = e.let(count - done)
    for rows in row_sizes(tile):
        with T.If(T.bitwise_and(rest, e.i64(rows)) != 0), T.Then():
            body(rows, e.let(done + T.bitwise_and(rest, e.i64(~(2 * rows - 1)))))


@contextmanager
def _once() -> Iterator[Any]:
    """A loop of one turn."""
    yield e.i64(0)


def quant_linear(cfg: QuantLinearConfig, caps: Capabilities) -> Any:
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
            work = QuantBlocks(caps, layout, cfg.in_dtype, e.flat(x, t * k), t, w, prefetch=cfg.prefetch)

            def write(block: Any, micro: MicroKernel, acc: list[list[Any]], rows: list[Any]) -> None:
                store_rows(epilogue, micro, acc, rows, block, yf, bf, rf)

            with T.If(t <= FEW):
                with T.Then():
                    few = work.prepare(work.few_dot)
                    micro = work.micro(few, work.codes.bytes)
                    with work.parallel(layout.blocks) as block:

                        def rows_at(rows: int, start: Any) -> None:
                            at = [e.let(start + r) for r in range(rows)]
                            acc = work.few(few, micro, at, e.let(block * work.block_bytes))
                            write(block, micro, acc, at)

                        for_tiles(FEW, t, rows_at)
                with T.Else():
                    many = work.prepare(work.many_dot)
                    row_blocks = (t + (cfg.t_block - 1)) // cfg.t_block
                    with work.parallel(layout.blocks * row_blocks) as task:
                        block = e.let(task // row_blocks)
                        first = e.let(task % row_blocks * cfg.t_block)
                        work.many(
                            many,
                            e.let(T.min(e.i64(cfg.t_block), t - first)),
                            cfg.t_block,
                            e.let(block * work.block_bytes),
                            lambda r: first + r,
                            lambda micro, acc, rows: write(block, micro, acc, rows),
                        )
    return built[0]
