"""The plain micro-kernel on machines with more than lanes by lanes: matrix instructions, lane operands, halves.

Each way takes whole turns of a few steps; what is left is the caller's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.schedules import emit as e
from llmc.schedules.matrix_tile import multiply_bf16, multiply_lanes

if TYPE_CHECKING:
    from llmc.schedules.micro_kernel import MicroKernel

Vectors = list[list[Any]]


def accumulate_lanes(
    micro: MicroKernel, acc: Vectors, row_base: list[Any], w_base: Any, steps: Any
) -> Any | None:
    """acc[r][v] += x[row r] . w for the first of `steps` k steps; arguments as of MicroKernel.accumulate.

    Returns:
        How many steps are done; None if the machine has nothing of this kind, and nothing is done.
    """
    caps, rows = micro.caps, len(acc)
    if micro.pairs and not micro.paired:
        return None
    if micro.dot and caps.has_bf16_mma and rows > 1:
        return _tiles(micro, acc, row_base, w_base, steps)
    if caps.has_f16_fma and micro.dtype == "float16" and len(acc[0]) % 2 == 0:
        return _halves(micro, acc, row_base, w_base, steps)
    if caps.has_lane_operands:
        return _lanes(micro, acc, row_base, w_base, steps)
    return None


def _tiles(micro: MicroKernel, acc: Vectors, row_base: list[Any], w_base: Any, steps: Any) -> Any:
    """bf16 by matrix instructions, two steps at a time."""
    nb, lanes = micro.layout.n_block, micro.lanes
    multiply_bf16(
        acc,
        steps,
        lambda r, j: e.load(micro.x, row_base[r] + j, 2),
        lambda j, v: e.load(micro.w, w_base + j * nb + v * lanes, lanes),
    )
    return steps // 2 * 2


def _halves(micro: MicroKernel, acc: Vectors, row_base: list[Any], w_base: Any, steps: Any) -> Any:
    """float16 by widening multiply-adds, eight columns of a row in a register."""
    nb, lanes, eight = micro.layout.n_block, micro.lanes, 2 * micro.lanes
    with e.loop(steps // eight) as j:
        rows = [e.let(e.load(micro.x, base + j * eight, eight)) for base in row_base]
        for i in range(eight):
            for v in range(0, len(acc[0]), 2):
                at = w_base + (j * eight + i) * nb + v * lanes
                weight = e.let(e.load(micro.w, at, eight))
                for r, row in enumerate(rows):
                    one = e.let(e.splat(e.lane(row, i), eight))
                    for h, vector in enumerate(acc[r][v : v + 2]):
                        e.store(vector, 0, e.fma_halves(e.load(vector, 0, lanes), weight, one, h), lanes)
    return steps // eight * eight


def _lanes(micro: MicroKernel, acc: Vectors, row_base: list[Any], w_base: Any, steps: Any) -> Any:
    """float32, what is widened to it, or dot products of pairs, four steps at a time."""
    nb, lanes = micro.layout.n_block, micro.lanes

    def wide(buffer: Any, at: Any) -> list[Any]:
        value = e.load(buffer, at, lanes)
        if micro.dot:
            return [value]
        if not micro.pairs:
            return [e.widen(value, micro.dtype, lanes)]
        pair = e.let(value)
        return [e.pair_even(pair, lanes), e.pair_odd(pair, lanes)]

    multiply_lanes(
        acc,
        steps,
        lambda r, j: wide(micro.x, row_base[r] + j),
        lambda j, v: wide(micro.w, w_base + j * nb + v * lanes),
        *([e.dot_bf16] if micro.dot else []),
    )
    return steps // lanes * lanes
