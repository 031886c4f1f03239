"""Decode over pages of int8 codes by integer dot products: nothing that comes from memory is converted.

Queries and weights become integers of 15 bits by a scale of their row (of a block's weights), finer than the bfloat16 that
they would be otherwise where it counts, and are multiplied as two bytes each: x = high * 128 + low. Sums are exact.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import ByteDot, Capabilities
from llmc.kv_plan import QUAD, padded
from llmc.schedules import emit as e
from llmc.schedules.attention_codes import CodedTile
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_pages import Ahead, in_groups
from llmc.schedules.attention_tile import can_be_direct
from llmc.schedules.idot import IntDot
from llmc.schedules.norm import along
from llmc.schedules.vmath import round_even

_FINE = 127 * 128  # largest integer of a query or a weight
_MOST = 512  # elements of a key, or keys of a block, whose sums of products fit 32 bits
_LEAST, _LARGEST = 1e-30, 3.4e38  # rows with smaller numbers only are zero, those with larger ones not finite


def takes_bytes(cfg: AttentionConfig, caps: Capabilities) -> bool:
    """Whether this is the way for these pages on this machine; float32 stays as exact as it is."""
    if (
        cfg.dtype == "float32"
        or cfg.kv_dtype != "int8"
        or caps.byte_dot is ByteDot.NONE
        or not can_be_direct(cfg, caps)
    ):
        return False
    block = max(cfg.page_size * 2, *(schedule.keys for schedule in cfg.decode.choices))
    return padded(cfg.key_dim) <= _MOST and block <= _MOST


class _Rows:
    """Rows of integers in two bytes each.

    Attributes:
        words: of high bytes and of low bytes.
        sums: of high bytes, then of low ones, per row.
        scales: per row.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.width = width
        self.bytes = [e.workspace(rows * width, "int8") for _ in range(2)]
        self.words = [e.flat(b, rows * width // QUAD, "int32") for b in self.bytes]
        self.sums = [e.workspace(rows, "int32") for _ in range(2)]
        self.scales = e.workspace(rows)

    def fill(self, row: Any, line: Any, first: Any, vectors: Any, lanes: int) -> None:
        """Row `row` from float32 line[first:], in whole vectors."""
        i32 = e.vec("int32", lanes)
        top = e.scratch(lanes, "int32")
        e.store(top, 0, e.const("int32", 0, lanes), lanes)
        with e.loop(vectors) as v:
            bits = T.reinterpret(i32, e.load(line, first + v * lanes, lanes))
            size = T.bitwise_and(bits, e.const("int32", 0x7FFFFFFF, lanes))
            e.store(top, 0, T.max(e.load(top, 0, lanes), size), lanes)
        # as bits, infinity and NaN are the largest
        largest = e.let(T.reinterpret("float32", e.let(e.fold(e.load(top, 0, lanes), lanes, T.max, "int32"))))
        usable = e.let(T.And(largest >= e.f32(_LEAST), largest <= e.f32(_LARGEST)))
        factor = e.let(tirx.Select(usable, e.f32(_FINE) / largest, e.f32(0.0)))
        e.store(self.scales, row, largest * e.f32(1.0 / _FINE), 1)
        sums = [e.scratch(lanes, "int32") for _ in range(2)]
        for s in sums:
            e.store(s, 0, e.const("int32", 0, lanes), lanes)
        with e.loop(vectors) as v:
            x = e.load(line, first + v * lanes, lanes)
            x = tirx.Select(e.splat(usable, lanes), x, e.splat(0.0, lanes)) * e.splat(factor, lanes)
            whole = e.let(tirx.Cast(i32, round_even(x, lanes)))
            high = e.let(T.shift_right(whole + e.const("int32", 64, lanes), e.const("int32", 7, lanes)))
            low = e.let(whole - T.shift_left(high, e.const("int32", 7, lanes)))
            for into, total, part in zip(self.bytes, sums, (high, low), strict=True):
                e.store(into, row * self.width + v * lanes, tirx.Cast(e.vec("int8", lanes), part), lanes)
                e.store(total, 0, e.load(total, 0, lanes) + part, lanes)
        for into, total in zip(self.sums, sums, strict=True):
            e.store(into, row, e.fold(e.load(total, 0, lanes), lanes, lambda a, b: a + b, "int32"), 1)


class BytesTile(CodedTile):
    """A tile of one token's heads; see the module."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._dot = IntDot(self.caps, 8)
        self.dot, self.pack = False, 1  # weights stay float32 until they are split
        sums = 2 * self.row_tile  # registers per vector
        self.vectors = max(1, min(self.vectors, (self.caps.vector_registers - 4) // sums))
        self._key_words = padded(self.cfg.key_dim) // QUAD

    @staticmethod
    def import_text(caps: Capabilities) -> dict[str, Any]:
        return IntDot(caps, 8).import_text()

    def _allocate(self) -> None:
        rows, block = self.rows_padded, self.block
        state = self.heads * rows
        self.scores, self.weights = e.workspace(rows * block), e.workspace(rows * block)
        self.out = e.workspace(state * self.value_width)
        self.largest, self.total = e.workspace(state), e.workspace(state * self.lanes)
        self.key_scales, self.value_scales = e.workspace(block), e.workspace(block)
        width = -(-padded(self.cfg.key_dim) // self.lanes) * self.lanes
        self._line = e.workspace(width)
        self._queries, self._fine = _Rows(state, width), _Rows(rows, block)

    def _load_query(self, source: Any, base: Any, r: Any) -> None:
        lanes, width = self.lanes, self._queries.width
        with e.loop(width // lanes) as v:
            e.store(self._line, v * lanes, e.splat(0.0, lanes), lanes)
        along(
            self.cfg.key_dim,
            self.caps,
            lambda at, n: e.store(self._line, at, self._wide(e.some(source, base + at, n), n), n),
        )
        self._queries.fill(r, self._line, 0, width // lanes, lanes)

    def _score(self, base: Any, p: Any, ahead: Ahead) -> None:
        lanes, ps = self.lanes, self.cfg.page_size
        for row in range(0, self.rows_padded, self.row_tile):

            def body(first: Any, vectors: int, row: int = row) -> None:
                own = self.row + row
                acc = self._sums_of(self._queries, own, vectors)
                with e.loop(self._key_words) as i:
                    if row == 0:
                        ahead.fetch(i, first)
                    at = e.let(base + i * ps + first * lanes)
                    words = [e.load(self.args.pools.k_words, at + v * lanes, lanes) for v in range(vectors)]
                    self._add(acc, words, self._queries, own, i)
                for r in range(self.row_tile):
                    scale = e.let(e.splat(self._queries.scales[own + r], lanes))
                    for v in range(vectors):
                        to = p * ps + (first + v) * lanes
                        value = self._float(acc, r, v) * scale * e.load(self.key_scales, to, lanes)
                        e.store(self.scores, (row + r) * self.block + to, value, lanes)

            in_groups(ps // lanes, self.vectors, body)

    def _weigh_pages(self, page: Any, keys: Any, last_page: Any) -> None:
        cfg, lanes, ps = self.cfg, self.lanes, self.cfg.page_size
        # the softmax has written weights of 0 up to a multiple of two vectors
        vectors_of_keys = e.let(e.ceildiv(keys, 2 * lanes) * 2)
        with e.loop(self.used) as r:
            self._fine.fill(r, self.weights, e.let(r * self.block), vectors_of_keys, lanes)
        count = e.let(e.ceildiv(keys, ps))
        for row in range(0, self.rows_padded, self.row_tile):

            def body(first: Any, vectors: int, row: int = row) -> None:
                acc = self._sums_of(self._fine, row, vectors)
                with e.loop(count) as p:
                    base = e.let(self._part_of(page + p) * (cfg.v_part // QUAD) + first * lanes)
                    tokens = e.let(T.min(e.i64(ps), keys - p * ps))
                    ahead = self._values_ahead(page, p, last_page)
                    with e.loop(e.ceildiv(tokens, QUAD)) as i:
                        if row == 0:
                            ahead.fetch(i, first)
                        at = e.let(base + i * self._row)
                        words = [
                            e.load(self.args.pools.v_words, at + v * lanes, lanes) for v in range(vectors)
                        ]
                        self._add(acc, words, self._fine, row, e.let(p * (ps // QUAD) + i))
                for r in range(self.row_tile):
                    scale = e.let(e.splat(self._fine.scales[row + r], lanes))
                    for v in range(vectors):
                        to = e.let((self.row + row + r) * self.value_width + (first + v) * lanes)
                        value = e.load(self.out, to, lanes) + self._float(acc, r, v) * scale
                        e.store(self.out, to, value, lanes)

            in_groups(cfg.value_dim // lanes, self.vectors, body)

    def _sums_of(self, rows: _Rows, row: Any, vectors: int) -> list[list[list[Any]]]:
        """Registers [row][vector][high, low], with what the codes' offset adds taken off beforehand."""
        lanes = self.lanes
        acc = []
        for r in range(self.row_tile):
            starts = [
                e.let(e.splat(total[row + r] * e.const("int32", -self._dot.offset, 1), lanes))
                for total in rows.sums
            ]
            acc.append([[e.scratch(lanes, "int32") for _ in range(2)] for _ in range(vectors)])
            for pair in acc[r]:
                for register, start in zip(pair, starts, strict=True):
                    e.store(register, 0, start, lanes)
        return acc

    def _add(self, acc: list[list[list[Any]]], words: list[Any], rows: _Rows, row: Any, i: Any) -> None:
        """acc += word i of the rows times words of codes."""
        lanes = self.lanes
        codes = [self._dot.weights(e.let(w)) for w in words]
        for r, vectors in enumerate(acc):
            at = e.let((row + r) * (rows.width // QUAD) + i)
            for h in range(2):
                quad = self._dot.activations(rows.words[h][at])
                for pair, code in zip(vectors, codes, strict=True):
                    e.store(pair[h], 0, self._dot.add(e.load(pair[h], 0, lanes), code, quad), lanes)

    def _float(self, acc: list[list[list[Any]]], r: int, v: int) -> Any:
        lanes = self.lanes
        high, low = (e.load(register, 0, lanes) for register in acc[r][v])
        whole = T.shift_left(high, e.const("int32", 7, lanes)) + low
        return tirx.Cast(e.vec("float32", lanes), whole)
