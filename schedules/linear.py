"""Matrix times packed weight, for one row or many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.gather import EmbeddingConfig, GatherConfig, embedding, gather_rows
from llmc.schedules.gpu.configs import GpuLinearSchedule, kind_of
from llmc.schedules.layout import BlockedLayout, linear_layout, own_vectors, usual_vectors
from llmc.schedules.linear_lanes import accumulate_lanes

__all__ = [
    "EmbeddingConfig",
    "GatherConfig",
    "LinearConfig",
    "LinearSchedule",
    "MicroKernel",
    "embedding",
    "gather_rows",
    "linear",
]

_ANY = 1 << 30  # more rows than any step has
_FEW_ROWS = (
    16  # up to so many rows a product waits for its weights, even where it takes several tiles of rows
)


@dataclass(frozen=True)
class LinearSchedule:
    """How a linear kernel goes through its loops.

    Attributes:
        vectors: vectors of outputs per weight block; 0 = linear_layout's. Decides the packed layout, so all schedules
            of one weight agree in it.
        rows_tile: rows that share one pass over a weight block; 0 = what the registers allow.
        k_block: columns per pass, so that a piece of a weight block stays in the second-level cache.
        t_block: rows of one task.
        unroll: k steps per turn of the inner loop; 0 = 4 for one row, else 1.
        prefetch: bytes that the weight stream is asked for ahead of its use; 0 = never.
        few_bytes: for at most 16 rows in several tiles, a weight block is cut into pieces of so many bytes, which stay
            in the first-level cache for all tiles; while they go through one piece the next comes from memory. 0 = no
            such cut.
        block_fast: neighbouring tasks take the same rows and the next weight block, instead of the next rows.
        tiles_from: rows from which on a machine with tile registers uses them; 0 = never. What follows is for those:
        tile_rows, tile_columns, tile_blocks, tile_unroll, tile_prefetch, tile_wide: see TileSchedule in tile_product.py.
    """

    vectors: int = 0
    rows_tile: int = 0
    k_block: int = 2048
    t_block: int = 240
    unroll: int = 0
    prefetch: int = 2304
    block_fast: bool = False
    few_bytes: int = 16384
    tiles_from: int = 9
    tile_rows: int = 0
    tile_columns: int = 0
    tile_blocks: int = 0
    tile_unroll: int = 2
    tile_prefetch: bool = True
    tile_wide: bool = False


_DEFAULT = ByRows((LinearSchedule(),))


@dataclass(frozen=True)
class LinearConfig:
    """y[T, n] = x[T, k] @ weight[n, k].T (+ bias[n]).

    Attributes:
        n, k: outputs and inputs.
        in_dtype, weight_dtype: of x and the weight; the same.
        out_dtype: of y; float32 or in_dtype.
        has_bias: a bias[n] (gated: [2n]) of in_dtype follows the weight.
        lead: unit dimensions before T in x and y.
        layout: of the packed weight; None = what the schedules say.
        schedule: a LinearSchedule per number of rows; all with the same `vectors`.
        activation, gated, gate_second: see LinearAttrs in llmc/ops.py; a gated weight holds 2n rows.
        has_residual: a residual of y's shape and in_dtype follows the bias.
    """

    n: int
    k: int
    in_dtype: str
    weight_dtype: str
    out_dtype: str
    has_bias: bool = False
    lead: int = 0
    layout: BlockedLayout | None = None
    schedule: ByRows[LinearSchedule] = _DEFAULT
    activation: str = ""
    gated: bool = False
    gate_second: bool = False
    has_residual: bool = False

    def __post_init__(self) -> None:
        if len({choice.vectors for choice in self.schedule.choices}) > 1:
            raise ValueError("all schedules of a weight must have the same vectors: it is packed once")

    def weight_layout(self, caps: Capabilities) -> BlockedLayout:
        """Layout of the packed weight."""
        if self.layout is not None:
            return self.layout
        return linear_layout(self.weight_dtype, caps, self.schedule.choices[0].vectors)

    def packed_shape(self, caps: Capabilities) -> tuple[int, int, int, int]:
        """Shape of the packed weight; a gated one has gate and up in turns, half a block of each."""
        layout = self.weight_layout(caps)
        if not self.gated:
            return layout.packed_shape(self.n, self.k)
        blocks = -(-self.n // (layout.n_block // 2))
        return (blocks, *layout.packed_shape(layout.n_block, self.k)[1:])

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "schedule": self.schedule.to_json()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> LinearConfig:
        layout = values.get("layout")
        kind = kind_of(values["schedule"], LinearSchedule, GpuLinearSchedule)
        schedule = ByRows.from_json(kind, values["schedule"])
        layout = BlockedLayout(**layout) if layout else None
        return LinearConfig(**{**values, "layout": layout, "schedule": schedule})


class MicroKernel:
    """rows x n_block outputs in registers, accumulated over a range of k steps of one weight block.

    Args:
        x: flat view of the activations, as int32 pairs for bf16 with even k, else as elements.
        w: flat view of the weight, as int32 pairs for bf16, else as elements.
        k: columns of x (its row stride).
        dtype: of both.
        prefetch, unroll: see LinearSchedule.
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
    ) -> None:
        self.unroll = unroll
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
        if self.k % 2 == 0:
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


def _several_tiles(t: Any, tile: int) -> Any:
    """Whether for_tiles takes several tiles for t rows, and these are few."""
    several = t <= _FEW_ROWS
    for rows in (tile, *row_sizes(tile)):
        several = tirx.And(several, t != rows)
    return several


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
    store_rows(
        Epilogue(n, micro.layout.n_block, in_dtype, out_dtype),
        micro,
        acc,
        rows,
        block,
        y,
        bias,
        None,
        bias_base,
    )


def store_rows(
    epilogue: Epilogue,
    micro: MicroKernel,
    acc: list[list[Any]],
    rows: list[Any],
    block: Any,
    y: Any,
    bias: Any,
    residual: Any,
    bias_base: Any = 0,
) -> None:
    """Apply the epilogue to accumulators and store them to rows of y."""
    epilogue.store(
        lambda r, v: e.load(acc[r][v], 0, micro.lanes),
        lambda r, v, i: acc[r][v][i],
        rows,
        block,
        y,
        micro.caps,
        bias,
        residual,
        bias_base,
    )


def linear(cfg: LinearConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[1 x lead, T, k], w packed, [bias[n]], [residual like y], y[1 x lead, T, n]) with symbolic T.

    Rows are taken in tiles whose accumulators stay in registers; a task is a weight block times t_block rows, so
    one row (GEMV) streams the weight once over all threads, and many rows reuse a piece of it from the cache.
    """
    layout = cfg.weight_layout(caps)
    if cfg.in_dtype != cfg.weight_dtype:
        raise ValueError(f"x is {cfg.in_dtype}, the weight {cfg.weight_dtype}; they must be the same")
    n, k = cfg.n, cfg.k
    blocks, steps, nb, kp = cfg.packed_shape(caps)
    rows_n = 2 * n if cfg.gated else n
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ones = [1] * cfg.lead
        x = e.tensor("x", [*ones, t, k], cfg.in_dtype)
        w = e.tensor("w", [blocks, steps, nb, kp], cfg.weight_dtype)
        bias = e.tensor("bias", [rows_n], cfg.in_dtype) if cfg.has_bias else None
        residual = e.tensor("residual", [*ones, t, n], cfg.in_dtype) if cfg.has_residual else None
        y = e.tensor("y", [*ones, t, n], cfg.out_dtype)
        with e.root():
            pairs = kp == 2
            xf, x_stride = row_view(x, t * k, k, pairs)
            args = _Operands(
                x=xf,
                x_stride=x_stride,
                w=weight_view(w, blocks * steps * nb * kp, pairs),
                bias=e.flat(bias, rows_n) if bias is not None else None,
                residual=e.flat(residual, t * n) if residual is not None else None,
                y=e.flat(y, t * n),
            )
            cfg.schedule.emit(t, lambda schedule, most: _all_rows(cfg, caps, layout, args, t, schedule, most))
    return built[0]


@dataclass(frozen=True)
class _Operands:
    """Flat views of a linear kernel's arguments; elements of x per row."""

    x: Any
    x_stride: int
    w: Any
    bias: Any
    residual: Any
    y: Any


def _all_rows(
    cfg: LinearConfig,
    caps: Capabilities,
    layout: BlockedLayout,
    args: _Operands,
    t: Any,
    schedule: LinearSchedule,
    most: int,
) -> None:
    """All t rows by one schedule; `most` bounds them (0 = any number)."""
    n, k = cfg.n, cfg.k
    blocks, steps, nb, kp = cfg.packed_shape(caps)
    epilogue = Epilogue(n, nb, cfg.in_dtype, cfg.out_dtype, cfg.activation, cfg.gated, cfg.gate_second)
    micro = MicroKernel(caps, layout, cfg.in_dtype, k, args.x, args.w, schedule.prefetch, schedule.unroll)
    lanes = micro.lanes
    tile = min(schedule.rows_tile or micro.max_rows(), most or _ANY)
    t_block = -(-min(schedule.t_block, most or _ANY) // tile) * tile
    # columns of an odd k are paired up from the row's beginning: such rows are not cut
    cut = not (kp == 2 and k % 2)
    # a piece of a block that is taken in parts takes no more of the cache than that of an own one
    parts = micro.vectors // micro.width(tile)
    large = min(steps, max(1, schedule.k_block // kp // parts)) if cut else steps
    small = (
        min(large, max(1, schedule.few_bytes // micro.step_bytes)) if cut and schedule.few_bytes else large
    )
    few = _several_tiles(t, tile) if small < large and most != 1 else None
    chunk = large if few is None else e.opaque(tirx.Select(few, e.i64(small), e.i64(large)))
    chunks = (steps + (chunk - 1)) // chunk
    row_blocks = (t + (t_block - 1)) // t_block
    with e.parallel(blocks * row_blocks, caps) as task:
        block = e.opaque(task % blocks if schedule.block_fast else task // row_blocks)
        first = e.opaque((task // blocks if schedule.block_fast else task % row_blocks) * t_block)
        count = e.opaque(T.min(e.i64(t_block), t - first))
        # with an activation too: its polynomial is then in the code once, not per row of the tiles
        one_pass = isinstance(chunks, int) and chunks == 1
        in_parts = any(micro.width(rows) < micro.vectors for rows in (1, tile))
        partial = None if one_pass and not cfg.activation and not in_parts else e.workspace(t_block * nb)

        def fetch_of(rows: int, start: Any, at: Any, size: Any) -> tuple[Any, Any] | None:
            """What `rows` rows from `start` ask for: with few rows, their share of the piece behind this one."""
            if few is None:
                return None
            usual = at + micro.prefetch_ahead * nb
            share = at + size * nb + start * size * nb // t
            return (
                e.let(tirx.Select(few, share, usual)),
                e.let(tirx.Select(few, (rows * nb + t - 1) // t, e.i64(nb))),
            )

        def tile_of(rows: int, start: Any, begin: Any, size: Any) -> None:
            """`rows` rows from `start` of the task over k steps [begin, begin + size)."""
            width = micro.width(rows)
            bases = [e.let((first + start + r) * args.x_stride + begin) for r in range(rows)]
            with e.loop_or_once(micro.vectors // width) as part:
                acc = micro.new_accumulators(rows, width)
                of = part * (width * lanes)
                sums = [
                    (acc[r][v], (start + r) * nb + of + v * lanes) for r in range(rows) for v in range(width)
                ]
                for vector, at in sums:
                    value = e.splat(0.0, lanes) if partial is None else e.load(partial, at, lanes)
                    e.store(vector, 0, value, lanes)
                from_ = e.let((block * steps + begin) * nb + of)
                micro.accumulate(acc, rows, bases, from_, size, fetch_of(rows, start, from_, size))
                if partial is None:
                    out = [e.let(first + start + r) for r in range(rows)]
                    store_rows(epilogue, micro, acc, out, block, args.y, args.bias, args.residual)
                    return
                for vector, at in sums:
                    e.store(partial, at, e.load(vector, 0, lanes), lanes)

        def all_rows(begin: Any, size: Any) -> None:
            for_tiles(tile, count, lambda rows, start: tile_of(rows, start, begin, size))

        if partial is None:
            all_rows(e.i64(0), steps)
            return
        with e.loop(count * micro.vectors) as i:
            e.store(partial, i * lanes, e.splat(0.0, lanes), lanes)
        with e.loop(chunks) as c:
            begin = e.let(c * chunk)
            all_rows(begin, e.let(T.min(e.i64(chunk), steps - begin)))
        with e.loop(count) as r:
            acc = micro.new_accumulators(1)
            for v in range(micro.vectors):
                value = e.load(partial, r * nb + v * lanes, lanes)
                e.store(acc[0][v], 0, value, lanes)
            row = [e.let(first + r)]
            store_rows(epilogue, micro, acc, row, block, args.y, args.bias, args.residual)
