"""Matrix times quantized weight for many rows, on matrix units that read both operands from shared memory.

The warpgroup that fetches unpacks: it loads the codes of a stage while it waits for the one before, and writes them as numbers
that the matrix units know, 16-bit floats or signed bytes. They carry no scale: the sums of a group are multiplied with
it in float32 and added up, as the other matmuls of these weights do. With int8 activations (qint.quantize_rows) the sums of a
group are integers. With e4m3 activations (qfloat.quantize_rows) codes need no unpacking, and sums leave the matrix units after
each stage of 128 columns, because these add with fewer bits than float32 has (qfloat.py says more).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.quant.schemes import Code
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import qint, warpgroup_block
from llmc.schedules.gpu import warpgroup as wg
from llmc.schedules.gpu.many_rows import WARPGROUP_ROWS
from llmc.schedules.gpu.qcodes import ThreadCodes
from llmc.schedules.gpu.qoperands import Operands
from llmc.schedules.gpu.warpgroup_block import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    CHUNKS,
    PIECE_ROWS,
    Block,
    Rows,
    Tiles,
    WarpgroupTile,
)
from llmc.schedules.gpu.warpgroup_block import Place as PlaceOfTile
from llmc.schedules.qcodes import Place
from llmc.schedules.qlayout import UNIT, WARP_ROWS, QuantLayout

# a warp that fetches has one block of 32 rows of the weight
TILE = WarpgroupTile(128, 5, 2, 96, 200)
_ANYWHERE = Place(0, 0, 0, 0, 0)  # symmetric codes have the same zero point everywhere
_COLUMNS = 8  # that are unpacked at a time


def takes(ops: Operands, caps: Capabilities) -> bool:
    """Whether this kernel can do it.

    16-bit x and y on multiples of 16 bytes; codes that are numbers themselves, with a scale per row or per group of columns
    that fills stages or divides them; no offsets, no outliers, no order of columns.
    """
    cfg, layout = ops.cfg, ops.cfg.layout
    of = layout.of
    simple = not (of.order or of.offsets or of.super_group or of.outlier_share)
    number = of.code is Code.INT or (of.code is Code.E4M3 and of.bits == 8)
    return (
        caps.has_wgmma
        and cfg.in_dtype in ("bfloat16", "float16")
        and cfg.n % 8 == 0
        and layout.k % 8 == 0
        and simple
        and number
        and (of.activations is None or of.symmetric)
        and _Groups.of(layout, 2 * CHUNKS * _COLUMNS if of.activation_bits else CHUNKS * _COLUMNS) is not None
    )


def gemm(ops: Operands, caps: Capabilities, experts: tuple[Any, int] | None = None) -> None:
    """One launch over all of y; after round_inputs where activations are rounded.

    Args:
        experts: as of warpgroup_block.launch.
    """
    outputs = ops.cfg.layout.blocks * WARP_ROWS
    made = _MADE[ops.cfg.layout.of.activations]
    make = lambda thread, tiles: made(ops, caps, thread, tiles)  # noqa: E731
    warpgroup_block.launch(ops.t, outputs, caps, TILE, make, experts)


def many_rows(ops: Operands, caps: Capabilities, otherwise: Callable[[], None], most: int = 0) -> None:
    """The launches for more than a few rows, up to `most` (0 = any); `otherwise` makes the one without warpgroups."""
    if not takes(ops, caps) or 0 < most <= WARPGROUP_ROWS:
        otherwise()
        return
    with T.If(ops.t <= WARPGROUP_ROWS):
        with T.Then():
            otherwise()
        with T.Else():
            gemm(ops, caps)


@dataclass(frozen=True)
class _Groups:
    """How groups that share a scale lie in stages.

    Attributes:
        stages: of a group; 0 = a stage has several groups.
        columns: of a group.
    """

    stages: int
    columns: int

    @staticmethod
    def of(layout: QuantLayout, depth: int) -> _Groups | None:
        """None if some stage has parts of several groups."""
        if not layout.of.group_size:
            return _Groups(-(-layout.padded_k // depth), layout.padded_k)
        group = layout.group
        if group % depth == 0:
            return _Groups(group // depth, group)
        return _Groups(0, group) if group >= UNIT and depth % group == 0 else None


class _QuantBlock(Block):
    """A weight whose codes are unpacked into the stages."""

    def __init__(
        self,
        ops: Operands,
        caps: Capabilities,
        thread: Any,
        tiles: Callable[[], Tiles],
        x: Rows,
    ) -> None:
        super().__init__(ops, caps, TILE, thread, tiles, x, WARP_ROWS)
        self.layout = ops.cfg.layout
        self.codes = ThreadCodes(caps, self.layout, ops.packed, ops.size, as_stored=x.dtype == "e4m3")
        groups = _Groups.of(self.layout, self.depth)
        assert groups is not None
        self.groups = groups
        self._stored = e.flat(self.elements, TILE.shared_bytes // 4, "uint32")
        self.units = self.depth // UNIT  # of a stage
        self.per_chunk = x.chunk // _COLUMNS  # times that columns are unpacked for 16 bytes
        # words that the thread holds of a stage, by plane
        per_plane = [max(1, _COLUMNS * bits // 32) for bits in self.layout.planes]
        self._planes, self._words = per_plane, sum(per_plane)

    def numbers(self, words: list[list[Any]], zero: Any) -> list[Any]:
        """Columns as the matrix units want them, in uint32."""
        raise NotImplementedError

    # -- fetching ----------------------------------------------------------------------------------------------------

    def _first_byte(self, place: PlaceOfTile, block: Any) -> Any:
        """Of a block of the weight of a tile."""
        first = e.i64(block) * self.layout.block_bytes
        if place.expert is not None:
            first = first + place.expert * math.prod(self.layout.packed_shape)
        return first

    def begin_tile(self, place: PlaceOfTile) -> None:
        """The codes of the first stage."""
        layout = self.layout
        warp = self.thread // g.WARP
        self._row = e.let(self.thread % g.WARP)
        # rows past the last block are those of the last one, and dropped at the end
        block = e.let(T.min(place.column // WARP_ROWS + warp, layout.blocks - 1))
        self._base = e.let(self._first_byte(place, block))
        count = self.units * (UNIT // _COLUMNS) * self._words
        self._held = g.local(count, "uint32")
        self._zeros = None if layout.of.symmetric else g.local(self.units)
        self._load(g.i32(0))

    def _load(self, step: Any) -> None:
        """Codes of a stage into registers; units behind the last one are the last one again."""
        for u in range(self.units):
            column = e.let(T.min(step * self.depth + u * UNIT, self.layout.padded_k - UNIT))
            place = self.codes.chunk_at(self._base, e.let(e.i64(column // self.codes.chunk)))
            at = self.codes.unit_at(place, e.let(e.i64(column % self.codes.chunk // UNIT)))
            if self._zeros is not None:
                e.store(self._zeros, u, self.codes.zero(place, self._row), 1)
            for i in range(UNIT // _COLUMNS):
                found = self.codes.words(at, g.i32(i * _COLUMNS), _COLUMNS, self._row)
                flat = [word for plane in found for word in plane]
                for j, word in enumerate(flat):
                    e.store(self._held, (u * (UNIT // _COLUMNS) + i) * self._words + j, word, 1)

    def fetch_weight(self, stage: Any, step: Any, place: PlaceOfTile) -> None:
        per_unit = UNIT // _COLUMNS
        for chunk in range(CHUNKS):
            out: list[Any] = []
            for part in range(self.per_chunk):
                number = chunk * self.per_chunk + part
                unit = number // per_unit
                zero = self._zeros[unit] if self._zeros is not None else self.codes.zero(_ANYWHERE, 0)
                out += self.numbers(self._taken(number), zero)
            vector = g.local(len(out), "uint32")
            for i, word in enumerate(out):
                e.store(vector, i, word, 1)
            to = (
                self.w_at
                + stage * self.w_bytes
                + self.thread // PIECE_ROWS * BLOCK_BYTES
                + chunk * wg.PIECE_BYTES
                + self.thread % PIECE_ROWS * CHUNK_BYTES
            )
            e.store(self._stored, e.let(to // 4), e.load(vector, e.i64(0), len(out)), len(out))
        self._load(e.let(T.min(step + 1, self.steps - 1)))

    def _taken(self, number: int) -> list[list[Any]]:
        """The words of columns that were loaded before, by plane."""
        found, at = [], number * self._words
        for count in self._planes:
            found.append([self._held[at + i] for i in range(count)])
            at += count
        return found

    # -- multiplying -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        count = wg.registers_of(TILE.columns)
        self._part = g.local(count, wg.KINDS[self.x.dtype].sums)
        self._total = g.local(count)

    def multiply_tile(self, number: Any, place: PlaceOfTile) -> Any:
        groups, layout = self.groups, self.layout
        for i in range(wg.registers_of(TILE.columns)):
            e.store(self._total, i, e.f32(0.0), 1)
        per_step = wg.KINDS[self.x.dtype].columns
        if groups.stages:
            tail = groups.columns % self.depth // per_step
            with e.loop_or_once(self.steps // groups.stages) as group:
                self.sum_stages(self._part, e.let(number + g.i32(group) * groups.stages), groups.stages, tail)
                self._add(place, group)
            return self._total
        several = self.depth // groups.columns
        left = layout.padded_k % self.depth // groups.columns
        with g.loop(self.steps - (left > 0)) as step:
            self._stage(place, e.let(number + step), e.let(step * several), several)
        if left:
            last = self.steps - 1
            self._stage(place, e.let(number + last), g.i32(last * several), left)
        return self._total

    def _stage(self, place: PlaceOfTile, number: Any, group: Any, count: int) -> None:
        """A stage of `count` groups, from `group` on."""
        stage = self.wait_filled(number)
        each = self.groups.columns // wg.KINDS[self.x.dtype].columns
        for i in range(count):
            self.products(self._part, stage, i * each, each, g.i32(0))
            wg.wait_for(self._part, TILE.columns, self.x.dtype)
            if i == count - 1:
                self.release(number)
            self._add(place, e.let(group + i))

    def _add(self, tile: PlaceOfTile, group: Any) -> None:
        """The sums of a group, scaled, onto the totals."""

        def added(at: int, scale: Any) -> Any:
            part = self._part[at]
            if wg.KINDS[self.x.dtype].sums == "int32":
                part = tirx.Cast("float32", part)
            return self._total[at] + part * scale

        self._weigh(tile, group, added)

    def _weigh(self, tile: PlaceOfTile, group: Any, new: Callable[[int, Any], Any]) -> None:
        """Set each total to new(number of the register, scale of a group of the output)."""
        layout, codes = self.layout, self.codes
        block = e.let(tile.column // WARP_ROWS)
        chunk = e.let(e.i64(group) * (self.groups.columns // codes.chunk))
        for b in range(TILE.columns // WARP_ROWS):
            there = e.let(T.min(block + b, layout.blocks - 1))
            place = codes.chunk_at(e.let(self._first_byte(tile, there)), chunk)
            for piece in range(WARP_ROWS // 8):
                for c in range(2):
                    row = e.let(8 * piece + 2 * (self.lane % 4) + c)
                    scale, _ = codes.scale_of(place, row)
                    for r in (c, c + 2):
                        at = 4 * (b * (WARP_ROWS // 8) + piece) + r
                        e.store(self._total, at, new(at, scale), 1)


class _Pairs(_QuantBlock):
    """16-bit floats."""

    def __init__(self, ops: Operands, caps: Capabilities, thread: Any, tiles: Callable[[], Tiles]) -> None:
        layout = ops.cfg.layout
        super().__init__(ops, caps, thread, tiles, Rows(ops.x, ops.cfg.in_dtype, layout.k, layout.padded_k))

    def numbers(self, words: list[list[Any]], zero: Any) -> list[Any]:
        return self.codes.pairs(words, _COLUMNS, zero, self.x.dtype)


class _Bytes(_QuantBlock):
    """Signed bytes; rows of x have a scale."""

    def __init__(self, ops: Operands, caps: Capabilities, thread: Any, tiles: Callable[[], Tiles]) -> None:
        layout = ops.cfg.layout
        super().__init__(
            ops, caps, thread, tiles, Rows(ops.rounded, "int8", layout.padded_k, layout.padded_k)
        )

    def numbers(self, words: list[list[Any]], zero: Any) -> list[Any]:
        return qint.signed_bytes(words[0], self.layout)

    def finish_row(self, row: Any) -> Any:
        return e.let(self.ops.row_scales[row])


class _Floats(_QuantBlock):
    """e4m3 numbers; rows of x have a scale, or one for each group."""

    def __init__(self, ops: Operands, caps: Capabilities, thread: Any, tiles: Callable[[], Tiles]) -> None:
        layout = ops.cfg.layout
        super().__init__(
            ops, caps, thread, tiles, Rows(ops.rounded, "e4m3", layout.padded_k, layout.padded_k)
        )

    def numbers(self, words: list[list[Any]], zero: Any) -> list[Any]:
        return words[0]

    def finish_row(self, row: Any) -> Any:
        return e.let(self.ops.row_scales[row]) if self.ops.groups == 1 else None

    def multiply_tile(self, number: Any, place: PlaceOfTile) -> Any:
        """As of Block; a stage at a time."""
        count = wg.registers_of(TILE.columns)
        for i in range(count):
            e.store(self._total, i, e.f32(0.0), 1)
        tail = self.layout.padded_k % self.depth // wg.KINDS[self.x.dtype].columns
        with g.loop(self.steps - (tail > 0)) as step:
            self._promote(place, e.let(number + step), step, self.instructions)
        if tail:
            last = self.steps - 1
            self._promote(place, e.let(number + last), g.i32(last), tail)
        if self.ops.groups == 1:  # one scale for all columns
            self._weigh(place, g.i32(0), lambda at, scale: self._total[at] * scale)
        return self._total

    def _promote(self, place: PlaceOfTile, number: Any, step: Any, count: int) -> None:
        """The sums of a stage of `count` instructions onto the totals."""
        self.products(self._part, self.wait_filled(number), 0, count, g.i32(0))
        wg.wait_for(self._part, TILE.columns, self.x.dtype)
        self.release(number)
        if self.ops.groups == 1:
            for i in range(wg.registers_of(TILE.columns)):
                e.store(self._total, i, self._total[i] + self._part[i], 1)
            return
        rows = [place.rows.at(self.first_row + self.lane // 4 + 8 * h) for h in range(2)]
        factors = [self.ops.group_scale(row, step * self.depth) for row in rows]
        self._weigh(
            place,
            step,
            lambda at, scale: self._total[at] + self._part[at] * scale * factors[at % 4 // 2],
        )


_MADE = {None: _Pairs, Code.INT: _Bytes, Code.E4M3: _Floats}
