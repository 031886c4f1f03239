"""Linear layers of a mixture of experts: rows are put in order of their expert on the device, then multiplied tile by tile.

A tile is up to so many rows of one expert. The host launches as many as there can be (rows / tile + experts), and a block
finds its tile by counting through the experts' rows: the host does not read device memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities, Fp8Mma
from llmc.quant.schemes import Code
from llmc.schedules import emit as e
from llmc.schedules.experts import ExpertConfig
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import qfloat, qgemm, qgemv, qint
from llmc.schedules.gpu.qcodes import ThreadCodes, Weights
from llmc.schedules.gpu.qoperands import Operands
from llmc.schedules.gpu.rounded_inputs import round_inputs
from llmc.schedules.gpu.rows import Rows
from llmc.schedules.gpu.wide import WideWeight, layout_of
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qlayout import WARP_ROWS, QuantLayout
from llmc.schedules.qlinear import QuantLinearConfig

_THREADS = 256
_WARPS = 4
_TILES = 1  # of 16 rows: experts rarely have more
_SHARED_ROWS = 4  # rows that share one pass over the weight, without matrix units


class _Shifted:
    """A vector of an expert in those of all."""

    def __init__(self, buffer: Any, first: Any) -> None:
        self._buffer, self._first = buffer, first

    def __getitem__(self, index: Any) -> Any:
        return self._buffer[self._first + index]


def expert_linear(cfg: ExpertConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.experts.expert_linear, for a machine with threads."""
    layout = cfg.layout or layout_of(cfg.weight_dtype)
    if layout != layout_of(cfg.weight_dtype) or cfg.in_dtype != cfg.weight_dtype:
        raise ValueError(f"this kernel reads {layout_of(cfg.weight_dtype)} of x's type; found {cfg}")
    shape = layout.packed_shape(cfg.n, cfg.k)
    blocks = -(-cfg.n // WARP_ROWS)
    plain = QuantLinearConfig(cfg.n, QuantLayout("q8", WARP_ROWS, cfg.n, cfg.k), cfg.in_dtype, cfg.out_dtype)

    def weights(packed: Any, expert: Any, block: Any) -> tuple[Weights, Any]:
        size = cfg.experts * math.prod(shape)
        first = e.let(expert * shape[0] + block * (WARP_ROWS // shape[2]))
        last = e.let((expert + 1) * shape[0] - 1)
        return WideWeight(packed, size, cfg.weight_dtype, shape, first, last), e.i64(0)

    return _kernel(cfg, plain, caps, [cfg.experts, *shape], cfg.weight_dtype, blocks, weights)


def quant_expert_linear(cfg: QuantExpertConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.qexperts.quant_expert_linear, for a machine with threads."""
    layout = cfg.layout
    plain = QuantLinearConfig(layout.n, layout, cfg.in_dtype, cfg.out_dtype)
    bytes_ = math.prod(layout.packed_shape)

    def weights(packed: Any, expert: Any, block: Any) -> tuple[Weights, Any]:
        as_stored = layout.of.activations is Code.E4M3 and caps.fp8_mma is not Fp8Mma.NONE
        codes = ThreadCodes(caps, layout, packed, cfg.experts * bytes_, as_stored)
        return codes, e.let(expert * bytes_ + block * layout.block_bytes)

    shape = [cfg.experts, *layout.packed_shape]
    return _kernel(cfg, plain, caps, shape, "uint8", layout.blocks, weights)


def _kernel(
    cfg: ExpertConfig | QuantExpertConfig,
    plain: QuantLinearConfig,
    caps: Capabilities,
    packed_shape: list[int],
    packed_dtype: str,
    blocks: int,
    weights: Any,
) -> Any:
    """Both kernels.

    Args:
        plain: the product with one expert.
        weights: (packed, expert, block) -> (Weights, where the block begins).
    """
    n, k, experts, layout = plain.n, plain.layout.k, cfg.experts, plain.layout
    built: list[Any] = []
    with e.kernel(built):
        count = e.dim("N")
        x = g.tensor("x", [count, k], cfg.in_dtype)
        ids = g.tensor("ids", [count], cfg.ids_dtype)
        w = g.tensor("w", packed_shape, packed_dtype)
        bias = g.tensor("bias", [experts, n], cfg.in_dtype) if cfg.has_bias else None
        y = g.tensor("y", [count, n], cfg.out_dtype)
        with e.root():
            ops = Operands()
            ops.cfg, ops.t, ops.packed, ops.size = plain, count, w, math.prod(packed_shape)
            ops.x, ops.y = e.flat(x, count * k), e.flat(y, count * n)
            if cfg.in_dtype != "float32":
                ops.x_pairs = e.flat(x, count * k // 2, "uint32")
            if layout.listed:  # all experts have the same outliers
                ops.listed, ops.list_at = e.flat(w, ops.size // 4, "int32"), layout.list_at // 4
            of_experts = e.flat(bias, experts * n) if bias is not None else None
            order, begin = sort_rows(e.flat(ids, count), count, experts)
            round_inputs(ops, caps)
            on_units = _block_of(ops, caps)
            size = 16 * _TILES if on_units else _SHARED_ROWS
            with g.launch((e.ceildiv(count, size) + experts) * blocks, _WARPS * g.WARP) as (number, thread):
                block, tile = e.let(number % blocks), e.let(number // blocks)
                expert, first = _find_tile(begin, experts, tile, size)
                with g.when(expert < experts):
                    rows = Rows(first, e.let(e.i64(begin[expert + 1])), order)
                    if of_experts is not None:
                        ops.bias = _Shifted(of_experts, expert * n)
                    if layout.listed:
                        ops.base = e.let(expert * math.prod(layout.packed_shape))
                        ops.list_at = e.let(ops.base // 4 + layout.list_at // 4)
                    codes, base = weights(w, expert, block)
                    if on_units:
                        on_units(ops, caps, codes, _TILES, _WARPS, thread).run(block, base, rows)
                    else:
                        qgemv.run(ops, caps, codes, block, base, rows, size, _WARPS, thread)
    return built[0]


def _block_of(ops: Operands, caps: Capabilities) -> Callable[..., qgemm.Tiles] | None:
    """What multiplies tiles of rows on the matrix units; None if they cannot."""
    if qgemm.takes(ops, caps):
        return qgemm.Block
    if ops.rounded_to == "int8" and caps.has_mma_bytes:
        return qint.Block
    return qfloat.Block if ops.rounded_to == "e4m3" else None


def sort_rows(ids: Any, count: Any, experts: int) -> tuple[Any, Any]:
    """One launch of one block, a counting sort: (rows in order of their expert, begin of each expert's rows [experts + 1])."""
    order, begin = e.workspace(count, "int32"), e.workspace(experts + 1, "int32")
    with g.launch(1, _THREADS) as (_, thread):
        found = g.local(1, "int32")

        def each_row(expert: Any, body: Any) -> None:
            with e.loop(count) as i, g.when(e.i64(ids[i]) == expert):
                body(i)

        def bump(i: Any) -> None:
            e.store(found, 0, found[0] + 1, 1)

        def number_of(expert: Any) -> None:
            e.store(found, 0, g.i32(0), 1)
            each_row(expert, bump)
            e.store(begin, expert + 1, found[0], 1)

        g.strided(thread, experts, _THREADS, number_of)
        g.barrier()
        with g.when(thread == 0):
            e.store(begin, e.i64(0), g.i32(0), 1)
            with e.loop(experts) as i:
                e.store(begin, i + 1, begin[i] + begin[i + 1], 1)
        g.barrier()

        def place(expert: Any) -> None:
            e.store(found, 0, begin[expert], 1)

            def put(i: Any) -> None:
                e.store(order, e.i64(found[0]), g.i32(i), 1)
                bump(i)

            each_row(expert, put)

        g.strided(thread, experts, _THREADS, place)
    return order, begin


def _find_tile(begin: Any, experts: int, number: Any, size: int) -> tuple[Any, Any]:
    """(expert, its row in the order at which tile `number` begins); the number of experts if there is no such tile."""
    found, left = g.local(1, "int64"), g.local(1, "int64")
    e.store(found, 0, e.i64(0), 1)
    e.store(left, 0, number, 1)

    def tiles() -> Any:
        return e.ceildiv(e.i64(begin[found[0] + 1]) - e.i64(begin[found[0]]), size)

    with T.While(T.And(found[0] < experts, left[0] >= tiles())):
        e.store(left, 0, left[0] - tiles(), 1)
        e.store(found, 0, found[0] + 1, 1)
    expert = e.let(found[0])
    return expert, e.let(e.i64(begin[T.min(expert, e.i64(experts - 1))]) + left[0] * size)
