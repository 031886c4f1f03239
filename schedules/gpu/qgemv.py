"""Matrix times quantized weight in plain arithmetic: for float32, and machines without matrix units for the type.

Thread l of a warp computes row l of a block of 32; the warps of a block of threads share out the columns. x comes from the
caches: all threads of a warp read the same elements.
"""

from __future__ import annotations

import math
from typing import Any

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.qcodes import COLUMNS, ThreadCodes, Weights
from llmc.schedules.gpu.qoperands import Operands
from llmc.schedules.gpu.rows import Rows
from llmc.schedules.qcodes import Place
from llmc.schedules.qlayout import UNIT, WARP_ROWS


def gemv(ops: Operands, caps: Capabilities, rows: int, warps: int) -> None:
    """One launch over all of y.

    Args:
        rows: of x per block; the last block drops those past the end.
        warps: of a block.
    """
    layout = ops.cfg.layout
    row_blocks = e.ceildiv(ops.t, rows)
    with g.launch(row_blocks * layout.blocks, warps * g.WARP) as (number, thread):
        block, of = e.let(number // row_blocks), Rows(e.let(number % row_blocks * rows), ops.t)
        codes = ThreadCodes(caps, layout, ops.packed, ops.size)
        run(ops, caps, codes, block, e.let(block * layout.block_bytes), of, rows, warps, thread)


def run(
    ops: Operands,
    caps: Capabilities,
    codes: Weights,
    block: Any,
    base: Any,
    of: Rows,
    rows: int,
    warps: int,
    thread: Any,
) -> None:
    """What a block of threads does: up to `rows` rows times the block of the weight that begins at `base`."""
    shape = (warps, rows, WARP_ROWS)
    sums = g.shared(math.prod(shape), name="sums")
    codes.load_table(thread, warps * g.WARP)
    if codes.has_table:
        g.barrier()
    lane, warp = e.let(thread % g.WARP), e.let(thread // g.WARP)
    tokens = [of.at(r) for r in range(rows)]
    total = [g.local(1) for _ in range(rows)]
    for t in total:
        e.store(t, 0, e.f32(0.0), 1)

    def one(number: Any) -> None:
        place = codes.chunk_at(base, number)
        column = e.let(number * codes.chunk)
        for half in range(codes.subgroups):
            group = codes.group_at(place, half) if codes.subgroups > 1 else place
            _group(ops, codes, total, tokens, group, column, half, lane)

    g.strided(warp, codes.padded_k // codes.chunk, warps, one)
    for r in range(rows):
        e.store(sums, (warp * rows + r) * WARP_ROWS + lane, total[r][0], 1)
    g.barrier()
    ops.store_sums(caps, sums, block, of, shape, thread)


def _group(
    ops: Operands,
    codes: Weights,
    total: list[Any],
    tokens: list[Any],
    place: Place,
    column: Any,
    half: int,
    lane: Any,
) -> None:
    """A group's part of a chunk."""
    zero = codes.zero(place, lane)
    part = [g.local(1) for _ in tokens] if codes.scaled else total
    row_sums = [g.local(1) for _ in tokens] if codes.offsets else []
    for register in (*(part if codes.scaled else ()), *row_sums):
        e.store(register, 0, e.f32(0.0), 1)
    covered = UNIT // codes.subgroups
    with g.loop(codes.chunk // UNIT) as u, g.loop(covered // COLUMNS) as s:
        first = e.let(half * covered + s * COLUMNS)
        words = codes.words(codes.unit_at(place, u), first, COLUMNS, lane)
        values = codes.floats(words, COLUMNS, zero)
        for r, token in enumerate(tokens):
            for i, value in enumerate(values):
                x = e.let(ops.element(token, column + u * UNIT + first + i))
                e.store(part[r], 0, part[r][0] + value * x, 1)
                if row_sums:
                    e.store(row_sums[r], 0, row_sums[r][0] + x, 1)
    if not codes.scaled:
        return
    scale, offset = codes.scale_of(place, lane)
    for r, token in enumerate(tokens):
        factor = ops.group_scale(token, column)
        product = part[r][0] * scale
        value = total[r][0] + (product if factor is None else product * factor)
        if offset is not None:
            value = value + row_sums[r][0] * offset
        e.store(total[r], 0, value, 1)
