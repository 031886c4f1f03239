"""A warp's rows against a tile of 8-bit codes: words of four codes are two operands of the matrix units as they lie.

A thread reads the word of its column that holds dims, or tokens, 4 q to 4 q + 3 of sixteen (q: number in the row of four
threads). The matrix units take them for places 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. A product does not depend on the order
of what it sums over, so queries are put into shared memory in that order, and keys are columns in that order: then the
weights of the next product are in it, too. Scales multiply scores and weights; weights are rounded to bfloat16, whose range
takes any scale.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.attention_pages import PageTiles
from llmc.schedules.gpu.code_pairs import code_pair
from llmc.schedules.gpu.coded_pages import CodedPageTiles
from llmc.schedules.gpu.flash_warp import Fragment, WarpTile
from llmc.schedules.gpu.qcodes import pack

_VALUES = "bfloat16"  # type of weights and values on the matrix units


def tiles_of(cfg: AttentionConfig) -> type[PageTiles]:
    """The kind of tiles for a layer group's pages."""
    return CodedPageTiles if cfg.coded else PageTiles


def warp_of(cfg: AttentionConfig) -> type[WarpTile]:
    """The kind of warps for them."""
    return CodedWarpTile if cfg.coded else WarpTile


def query_place(d: Any) -> Any:
    """Where element d of a query lies among its elements in shared memory."""
    return d // 16 * 16 + d % 16 // 4 * 2 + d % 4 // 2 * 8 + d % 2


class CodedWarpTile(WarpTile):
    """As WarpTile."""

    pages: CodedPageTiles

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        memory = self.pages.memory
        size = int(memory.shape[0]) // 2
        self._words = T.decl_buffer((size,), "uint32", data=memory.data, scope="shared.dyn")
        self._quad, self._column_of_lane = e.let(self.lane % 4), e.let(self.lane // 4)

    @property
    def _first_column(self) -> Any:
        return self.lane % 4 * 4

    def _column(self, n: int, j: int) -> int:
        return n // 2 * 16 + n % 2 * 2 + j

    def _operand(self, at: Any, dtype: str) -> Any:
        """The word at `at` as a second operand of an mma."""
        word = g.held(self._words[at])
        right = g.local(2, "uint32")
        for pair in range(2):
            e.store(right, pair, code_pair(word, pair, self.cfg.kv_dtype, dtype), 1)
        return right

    def _scales(self, base: Any, behind: int, pair: int) -> list[list[Any]]:
        """Scales of the thread's four tokens of sixteen: [8 columns][2]."""
        at = base + (self.pages.scale_words + (behind + 16 * pair) // 2) + self._quad * 2
        found = []
        for n in range(2):
            word = g.held(self._words[at + n])
            bits = (T.shift_left(word, g.u32(16)), T.bitwise_and(word, g.u32(0xFFFF0000)))
            found.append([e.let(T.reinterpret("float32", b)) for b in bits])
        return found

    def _score(self, base: Any) -> list[list[Fragment]]:
        cfg, keys, line = self.cfg, self.pages.keys, self.pages.k_line
        first = g.held(T.truncdiv(base, g.i32(2)))
        lane = self._column_of_lane
        corner = g.held(first + self._quad * line + lane // 2 * 4 + lane % 2)
        scores = [[Fragment(g.local(4)) for _ in range(keys // 8)] for _ in range(self.tiles)]
        for registers in (r for row in scores for r in row):
            for i in range(4):
                registers.put(i, e.f32(0.0))
        for step in range(self.steps):
            if step < len(self._held):
                left = [self._held[step]]
            else:
                left = [self._query(m, step) for m in range(self.tiles)]
            for n in range(keys // 8):
                at = corner + (step * 4 * line + n // 2 * 16 + n % 2 * 2)
                right = self._operand(at, cfg.dtype)
                for m in range(self.tiles):
                    unit.mma(scores[m][n].registers, left[m], right, 0, cfg.dtype)
        for pair in range(keys // 16):
            for n, own in enumerate(self._scales(first, 0, pair)):
                for row in scores:
                    registers = row[2 * pair + n]
                    for i in range(4):
                        registers.put(i, registers[i] * own[i % 2])
        return scores

    def _weigh(self, base: Any, weights: list[list[Fragment]]) -> None:
        pages, line = self.pages, self.pages.v_line
        first = g.held(T.truncdiv(base, g.i32(2)))
        corner = g.held(first + self._quad * line + self._column_of_lane + pages.v_words)
        for step in range(pages.keys // 16):
            scales = self._scales(first, pages.keys, step)
            left = [self._scaled_operand(weights[m], step, scales) for m in range(self.tiles)]
            for n in range(self.columns // 8):
                right = self._operand(corner + (step * 4 * line + n * 8), _VALUES)
                for m in range(self.tiles):
                    unit.mma(self.out[m][n].registers, left[m], right, 0, _VALUES)

    def _scaled_operand(self, weights: list[Fragment], step: int, scales: list[list[Any]]) -> Any:
        """Weights of 16 keys times the scales of their values, as a first operand."""
        left = g.local(4, "uint32")
        for half, own in enumerate(scales):
            source = weights[2 * step + half]
            for i in range(2):
                # a weight of 0 may be of no token, and what lies in the place of its scale no number
                pair = [
                    e.let(
                        tirx.Select(source[2 * i + j] == e.f32(0.0), e.f32(0.0), source[2 * i + j] * own[j])
                    )
                    for j in range(2)
                ]
                e.store(left, 2 * half + i, pack(pair[0], pair[1], _VALUES), 1)
        return left
