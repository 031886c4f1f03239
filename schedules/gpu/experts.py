"""Linear layers of a mixture of experts: rows in order of their expert (sort_experts.py), multiplied tile by tile.

A tile is up to so many rows of one expert. The host launches as many as there can be (rows / tile + experts), and each warp
finds its tile among the experts' rows: the host does not read device memory. How large tiles are follows from the rows
that an expert has on average, which the host knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities, Fp8Mma
from llmc.quant.schemes import Code
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows
from llmc.schedules.experts import ExpertConfig, plan_size
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import qfloat, qgemm, qgemv, qint, warpgroup_gemm, warpgroup_qgemm
from llmc.schedules.gpu.configs import GpuExpertSchedule, Way, emit_by_rows, schedules_in
from llmc.schedules.gpu.qcodes import ThreadCodes, Weights
from llmc.schedules.gpu.qoperands import Operands
from llmc.schedules.gpu.rounded_inputs import round_inputs
from llmc.schedules.gpu.rows import Shifted
from llmc.schedules.gpu.sort_experts import ExpertTiles
from llmc.schedules.gpu.wide import WideWeight, layout_of
from llmc.schedules.linear import LinearConfig
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qlayout import WARP_ROWS, QuantLayout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tune_experts import ExpertKernel

_WARPS = 4
_ACTIVE = 8  # experts that have rows, at least, in the usual model
_COLUMNS = 128  # that a warp asks for at a time
_FEWEST_ROWS = 4  # of an expert on average: a tile of 8 rows
_FEW_ROWS = 16  # of an expert on average: a tile of 16 rows, of which few experts need more than two
_SHARED_ROWS = 4  # rows that share one pass over the weight, without matrix units


def expert_linear(kernel: ExpertKernel | ExpertConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[N,k], plan, w packed, [bias[E,n]], y[N,n]) of llmc.schedules.experts, for a machine with threads.

    The plan is that of sort_experts.py.
    """
    cfg, schedule = kernel if isinstance(kernel, ExpertKernel) else (kernel, ByRows((GpuExpertSchedule(),)))
    layout = cfg.layout or layout_of(cfg.weight_dtype)
    if layout != layout_of(cfg.weight_dtype) or cfg.in_dtype != cfg.weight_dtype:
        raise ValueError(f"this kernel reads {layout_of(cfg.weight_dtype)} of x's type; found {cfg}")
    return _build(Dense(cfg), cfg, caps, schedules_in(schedule, GpuExpertSchedule))


def quant_expert_linear(cfg: QuantExpertConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.qexperts.quant_expert_linear, with a plan for ids as expert_linear."""
    return _build(_Quantized(cfg), cfg, caps, ByRows((GpuExpertSchedule(),)))


def _build(weight: _Experts, cfg: Any, caps: Capabilities, schedules: ByRows[GpuExpertSchedule]) -> Any:
    n, k, experts = weight.plain.n, weight.plain.layout.k, cfg.experts
    built: list[Any] = []
    with e.kernel(built):
        count = e.dim("N")
        x = g.tensor("x", [count, k], cfg.in_dtype)
        plan = g.tensor("plan", [plan_size(count, experts)], "int32")
        packed = g.tensor("w", weight.shape, weight.dtype)
        bias = g.tensor("bias", [experts, n], cfg.in_dtype) if cfg.has_bias else None
        y = g.tensor("y", [count, n], cfg.out_dtype)
        with e.root():
            weight.view(count, x, e.flat(plan, plan_size(count, experts)), packed, bias, y)
            emit_by_rows(schedules, count, lambda schedule, most: weight.run(caps, schedule, most))
    return built[0]


class _Experts:
    """The weights of all experts, and the launches with them.

    Attributes:
        experts: how many.
        plain: the product with one expert, as if its weight were quantized.
        shape, dtype: of the packed weights.
        blocks: of 32 rows of an expert's weight.
    """

    experts: int
    plain: QuantLinearConfig
    shape: list[int]
    dtype: str
    blocks: int

    def view(self, count: Any, x: Any, plan: Any, packed: Any, bias: Any, y: Any) -> None:
        """Make views of the arguments; inside the root block."""
        cfg, n, k = self.plain, self.plain.n, self.plain.layout.k
        self.count, self.plan, self.packed = count, plan, packed
        self.bias = e.flat(bias, self.experts * n) if bias is not None else None
        self.ops = ops = Operands()
        ops.cfg, ops.t, ops.packed, ops.size = cfg, count, packed, math.prod(self.shape)
        ops.x, ops.y = e.flat(x, count * k), e.flat(y, count * n)
        if cfg.in_dtype != "float32":
            ops.x_pairs = e.flat(x, count * k // 2, "uint32")
        if cfg.layout.listed:  # all experts have the same outliers
            ops.listed, ops.list_at = e.flat(packed, ops.size // 4, "int32"), cfg.layout.list_at // 4
        self.arguments = (x, y)

    def weights(self, caps: Capabilities, expert: Any, block: Any) -> tuple[Weights, Any]:
        """(a block of an expert's weight, where it begins)."""
        raise NotImplementedError

    def takes_warpgroups(self, caps: Capabilities) -> bool:
        """Whether the kernel on warpgroups can do it."""
        raise NotImplementedError

    def on_warpgroups(self, caps: Capabilities, schedule: GpuExpertSchedule) -> None:
        """The launch on warpgroups."""
        raise NotImplementedError

    # -- launches ----------------------------------------------------------------------------------------------------

    def run(self, caps: Capabilities, schedule: GpuExpertSchedule, most: int) -> None:
        """The launches of a schedule for up to `most` rows (0 = any)."""
        round_inputs(self.ops, caps)
        if schedule.way != Way.UNTUNED:
            self._as(caps, schedule)
            return
        if _block_of(self.ops, caps) is None:
            self._as(caps, GpuExpertSchedule(Way.THREADS, rows=_SHARED_ROWS, warps=_WARPS))
            return
        warps = self._warps(caps)
        fewest, few = (GpuExpertSchedule(Way.UNITS, tiles=tiles, warps=warps) for tiles in (0, 1))
        many = GpuExpertSchedule(Way.UNITS, tiles=qfloat.most_tiles(self.plain.layout, caps), warps=_WARPS)
        if self.takes_warpgroups(caps):
            wide, narrow = warpgroup_gemm.WIDE, warpgroup_gemm.NARROW
            # every expert has a tile of rows, at least: enough for every multiprocessor?
            enough = self.experts * -(-self.plain.n // wide.columns) >= caps.multiprocessors
            tile = wide if enough else narrow
            many = GpuExpertSchedule(Way.WARPGROUPS, tile_columns=tile.columns, stages=tile.stages)
        choices = [(_FEWEST_ROWS * self.experts, fewest), (_FEW_ROWS * self.experts, few)]

        def from_here(number: int) -> None:
            if number == len(choices):
                self._as(caps, many)
                return
            limit, schedule = choices[number]
            if 0 < most <= limit:
                self._as(caps, schedule)
                return
            with T.If(self.count <= limit):
                with T.Then():
                    self._as(caps, schedule)
                with T.Else():
                    from_here(number + 1)

        from_here(0)

    def _warps(self, caps: Capabilities) -> int:
        """Warps of a block where experts have few rows: more for small experts, if each has columns to ask for."""
        wanted = 32 * caps.multiprocessors // (_ACTIVE * self.blocks)
        most = self.plain.layout.k // _COLUMNS
        warps = _WARPS
        while warps < 16 and 2 * warps <= min(wanted, most):
            warps *= 2
        return warps

    def _as(self, caps: Capabilities, schedule: GpuExpertSchedule) -> None:
        if schedule.way == Way.WARPGROUPS:
            self.on_warpgroups(caps, schedule)
            return
        ops, warps = self.ops, schedule.warps
        size = qgemm.rows_of(schedule.tiles) if schedule.way == Way.UNITS else schedule.rows
        most = ExpertTiles.most(self.count, self.experts, size)
        with g.launch(most * self.blocks, warps * g.WARP) as (number, thread):
            block, tile = g.held(number % self.blocks), g.held(g.i32(number // self.blocks))
            found, rows = ExpertTiles(self.plan, self.experts, size, thread).find(tile)
            with g.when(found >= 0):
                expert = g.held(e.i64(found))
                if self.bias is not None:
                    ops.bias = Shifted(self.bias, expert * self.plain.n)
                layout = self.plain.layout
                if layout.listed:
                    ops.base = e.let(expert * math.prod(layout.packed_shape))
                    ops.list_at = e.let(ops.base // 4 + layout.list_at // 4)
                codes, base = self.weights(caps, expert, block)
                if schedule.way == Way.THREADS:
                    qgemv.run(ops, caps, codes, block, base, rows, size, warps, thread)
                    return
                made: Any = _block_of(ops, caps)
                made(ops, caps, codes, schedule.tiles, warps, thread).run(block, base, rows)


def _block_of(ops: Operands, caps: Capabilities) -> Callable[..., qgemm.Tiles] | None:
    """What multiplies tiles of rows on the matrix units; None if they cannot."""
    if qgemm.takes(ops, caps):
        return qgemm.Block
    if ops.rounded_to == "int8" and caps.has_mma_bytes:
        return qint.Block
    return qfloat.Block if ops.rounded_to == "e4m3" else None


def tile_of(schedule: GpuExpertSchedule) -> warpgroup_gemm.WarpgroupTile:
    """The tile of a schedule for warpgroups; those that fetch find experts, too, and take more registers for it.

    Raises:
        ValueError: it is none.
    """
    return warpgroup_gemm.WarpgroupTile(schedule.tile_columns, schedule.stages, 2, 56, 224)


class DenseOperands:
    """What warpgroup_gemm asks of a linear kernel's arguments, with the weights of all experts below each other.

    Attributes:
        shape: of one expert's packed weight.
    """

    def __init__(self, cfg: ExpertConfig, shape: tuple[int, ...], of: _Experts) -> None:
        kinds = (cfg.in_dtype, cfg.weight_dtype, cfg.out_dtype)
        self.cfg = LinearConfig(cfg.n, cfg.k, *kinds, has_bias=cfg.has_bias)
        self.t, self.shape, self.x, self.y, self.bias = of.count, shape, of.ops.x, of.ops.y, of.bias
        self.w = e.flat(of.packed, math.prod(of.shape))
        self._x, self._y = of.arguments
        self.residual = self._residual = None


class Dense(_Experts):
    """Weights in their own type."""

    def __init__(self, cfg: ExpertConfig) -> None:
        self.cfg, self.experts, self.dtype = cfg, cfg.experts, cfg.weight_dtype
        self.one = layout_of(cfg.weight_dtype).packed_shape(cfg.n, cfg.k)
        self.shape, self.blocks = [cfg.experts, *self.one], -(-cfg.n // WARP_ROWS)
        layout = QuantLayout("q8", WARP_ROWS, cfg.n, cfg.k)
        self.plain = QuantLinearConfig(cfg.n, layout, cfg.in_dtype, cfg.out_dtype)

    def weights(self, caps: Capabilities, expert: Any, block: Any) -> tuple[Weights, Any]:
        first = e.let(expert * self.one[0] + block * (WARP_ROWS // self.one[2]))
        last = e.let((expert + 1) * self.one[0] - 1)
        size = math.prod(self.shape)
        return WideWeight(self.packed, size, self.cfg.weight_dtype, self.one, first, last), e.i64(0)

    def takes_warpgroups(self, caps: Capabilities) -> bool:
        return warpgroup_gemm.takes(self.cfg, caps)

    def on_warpgroups(self, caps: Capabilities, schedule: GpuExpertSchedule) -> None:
        tile = tile_of(schedule)
        ops = DenseOperands(self.cfg, self.one, self)
        warpgroup_gemm.gemm(ops, caps, tile, (self.plan, self.experts))


class _Quantized(_Experts):
    """Codes with scales."""

    def __init__(self, cfg: QuantExpertConfig) -> None:
        layout = cfg.layout
        self.experts, self.dtype, self.layout = cfg.experts, "uint8", layout
        self.shape, self.blocks = [cfg.experts, *layout.packed_shape], layout.blocks
        self.plain = QuantLinearConfig(layout.n, layout, cfg.in_dtype, cfg.out_dtype)

    def weights(self, caps: Capabilities, expert: Any, block: Any) -> tuple[Weights, Any]:
        as_stored = self.layout.of.activations is Code.E4M3 and caps.fp8_mma is not Fp8Mma.NONE
        codes = ThreadCodes(caps, self.layout, self.packed, math.prod(self.shape), as_stored)
        size = math.prod(self.layout.packed_shape)
        return codes, e.let(expert * size + block * self.layout.block_bytes)

    def takes_warpgroups(self, caps: Capabilities) -> bool:
        return warpgroup_qgemm.takes(self.ops, caps)

    def on_warpgroups(self, caps: Capabilities, schedule: GpuExpertSchedule) -> None:
        self.ops._y, self.ops._residual, self.ops.bias = self.arguments[1], None, self.bias
        warpgroup_qgemm.gemm(self.ops, caps, (self.plan, self.experts))
