"""Matrix times packed weight, for one row or many."""

from __future__ import annotations

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
from llmc.schedules.layout import BlockedLayout, linear_layout
from llmc.schedules.micro_kernel import MicroKernel, for_tiles, row_sizes, row_view, weight_view

__all__ = [
    "EmbeddingConfig",
    "GatherConfig",
    "LinearConfig",
    "LinearSchedule",
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


def _several_tiles(t: Any, tile: int) -> Any:
    """Whether for_tiles takes several tiles for t rows, and these are few."""
    several = t <= _FEW_ROWS
    for rows in (tile, *row_sizes(tile)):
        several = tirx.And(several, t != rows)
    return several


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
                    epilogue.store_held(acc, out, block, args.y, caps, args.bias, args.residual)
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
            epilogue.store_held(acc, row, block, args.y, caps, args.bias, args.residual)
