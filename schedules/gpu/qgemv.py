"""Matrix times quantized weight in plain arithmetic: for float32, and machines without matrix units for the type.

Thread l of a warp computes row l of a block of 32; the warps of a block of threads share out the columns. x comes from the
caches: all threads of a warp read the same elements.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.qcodes import COLUMNS, ThreadCodes
from llmc.schedules.gpu.qoperands import QuantOperands
from llmc.schedules.qcodes import Place
from llmc.schedules.qlayout import UNIT, WARP_ROWS


def gemv(ops: QuantOperands, caps: Capabilities, rows: int, warps: int) -> None:
    """One launch over all of y.

    Args:
        rows: of x per block; the last block drops those past the end.
        warps: of a block.
    """
    layout = ops.cfg.layout
    row_blocks = e.ceildiv(ops.t, rows)
    with g.launch(row_blocks * layout.blocks, warps * g.WARP) as (number, thread):
        block, first = e.let(number // row_blocks), e.let(number % row_blocks * rows)
        sums = g.shared(warps * rows * WARP_ROWS, name="sums")
        codes = ThreadCodes(caps, layout, ops.packed, ops.size)
        codes.load_table(thread, warps * g.WARP)
        if codes.has_table:
            g.barrier()
        lane, warp = e.let(thread % g.WARP), e.let(thread // g.WARP)
        tokens = [e.let(T.min(first + r, ops.t - 1)) for r in range(rows)]
        total = [g.local(1) for _ in range(rows)]
        for t in total:
            e.store(t, 0, e.f32(0.0), 1)
        base = e.let(block * layout.block_bytes)

        def one(number: Any) -> None:
            place = codes.chunk_at(base, number)
            column = e.let(number * codes.chunk)
            for half in range(codes.subgroups):
                group = codes.group_at(place, half) if codes.subgroups > 1 else place
                _group(ops, codes, total, tokens, group, column, half, lane)

        g.strided(warp, layout.padded_k // codes.chunk, warps, one)
        for r in range(rows):
            e.store(sums, (warp * rows + r) * WARP_ROWS + lane, total[r][0], 1)
        g.barrier()
        ops.store_sums(caps, sums, block, first, rows, WARP_ROWS, warps, thread)


def _group(
    ops: QuantOperands,
    codes: ThreadCodes,
    total: list[Any],
    tokens: list[Any],
    place: Place,
    column: Any,
    half: int,
    lane: Any,
) -> None:
    """A group's part of a chunk."""
    layout = codes.layout
    zero = codes.zero(place, lane)
    part = [g.local(1) for _ in tokens]
    row_sums = [g.local(1) for _ in tokens] if layout.of.offsets else []
    for register in (*part, *row_sums):
        e.store(register, 0, e.f32(0.0), 1)
    covered = UNIT // codes.subgroups
    with g.loop(codes.chunk // UNIT) as u, g.loop(covered // COLUMNS) as s:
        first = e.let(half * covered + s * COLUMNS)
        words = codes.words(e.let(place.units + u * layout.unit_bytes), first, COLUMNS, lane)
        values = codes.floats(words, COLUMNS, zero)
        for r, token in enumerate(tokens):
            for i, value in enumerate(values):
                x = e.let(ops.element(token, column + u * UNIT + first + i))
                e.store(part[r], 0, part[r][0] + value * x, 1)
                if row_sums:
                    e.store(row_sums[r], 0, row_sums[r][0] + x, 1)
    scale = e.let(codes.codes.scale(place.scales, lane, 1, place.tops))
    offset = e.let(codes.codes.offset(place, lane, 1)) if layout.of.offsets else None
    for r in range(len(tokens)):
        value = total[r][0] + part[r][0] * scale
        if offset is not None:
            value = value + row_sums[r][0] * offset
        e.store(total[r], 0, value, 1)
