"""Tiles of 8-bit codes and scales that asynchronous copies bring from cache pages to shared memory.

Words of four codes lie as on the pages: lines of keys [key_dim / 4][keys], of values [keys / 4][value_dim]. Behind each line
are 32 bytes, so that the four threads of a row of the matrix units read words of different banks (keys: two at a time of one).
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.kv_plan import QUAD
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.attention_pages import CODED_PAD, PageTiles

_CHUNK_BYTES = 16
_SCALES = 8  # in 16 bytes
_WORDS = 4  # in 16 bytes


class CodedPageTiles(PageTiles):
    """As PageTiles; elements of the memory are of 16 bits, lines are counted in words of 32."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        cfg = self.cfg
        self.k_line, self.v_line = self.keys + CODED_PAD, cfg.value_dim + CODED_PAD
        self.v_words = cfg.key_dim // QUAD * self.k_line
        self.scale_words = self.v_words + self.keys // QUAD * self.v_line  # of keys, then of values
        self.v_offset = 2 * self.v_words

    def copy(self, to: Any, first: Any) -> None:
        """As of PageTiles."""
        cfg, ps = self.cfg, self.cfg.page_size
        left = g.held(self.end - first)
        inside = e.let(first % ps)
        for n, page in enumerate(self._pages):
            part = g.held((e.i64(page[0]) * cfg.layers + self.args.layer) * cfg.kv_heads + self.kv_head)
            at = g.i32(0) if self.run == ps else e.let((inside + n * self.run) % ps)
            k_base, v_base = g.held(part * cfg.k_part), g.held(part * cfg.v_part)
            self._copy_key_words(to, k_base + at * QUAD, n * self.run, left)
            self._copy_value_words(to, v_base + at * cfg.value_dim, n * self.run, left)
            self._copy_scales(to, k_base + at * 2, v_base + at * 2, n * self.run, left)

    def _copy_key_words(self, to: Any, base: Any, number: int, left: Any) -> None:
        """`base`, as of the others, is the byte at which the first token lies."""
        pieces, lines = self.run // _WORDS, self.cfg.key_dim // QUAD
        side = self.threads // pieces  # lines that go side by side
        part, line = e.let(self.thread % pieces * _WORDS), e.let(self.thread // pieces)
        valid = part + number < left
        source = g.held(base + (line * self.cfg.page_size + part) * QUAD)
        target = g.held(to + (line * self.k_line + part + number) * 2)
        for first in range(0, lines, side):

            def piece(first: int = first) -> None:
                unit.copy16(
                    self.memory,
                    target + first * self.k_line * 2,
                    self.args.k,
                    source + first * (self.cfg.page_size * QUAD),
                    valid,
                )

            self._whole(piece, line, lines - first, side)

    def _copy_value_words(self, to: Any, base: Any, number: int, left: Any) -> None:
        pieces = self.cfg.value_dim // _WORDS
        chunks = self.run // QUAD * pieces
        source = g.held(base + self.thread * _CHUNK_BYTES)
        for first in range(0, chunks, self.threads):

            def piece(first: int = first) -> None:
                chunk = e.let(self.thread + first)
                row = e.let(chunk // pieces + number // QUAD)
                target = to + (self.v_words + row * self.v_line + chunk % pieces * _WORDS) * 2
                unit.copy16(
                    self.memory, e.let(target), self.args.v, source + first * _CHUNK_BYTES, row * QUAD < left
                )

            self._whole(piece, self.thread, chunks - first, self.threads)

    def _copy_scales(self, to: Any, k_base: Any, v_base: Any, number: int, left: Any) -> None:
        cfg, each = self.cfg, self.run // _SCALES
        places = (
            (self.args.k, k_base + cfg.key_dim * cfg.page_size, 0),
            (self.args.v, v_base + cfg.value_dim * cfg.page_size, self.keys),
        )
        for turn, (pool, base, behind) in enumerate(places):
            own = e.let(self.thread - turn * each)
            with g.when(T.And(own >= 0, own < each)):
                target = to + (2 * self.scale_words + behind + number) + own * _SCALES
                source = base + own * _CHUNK_BYTES
                unit.copy16(self.memory, e.let(target), pool, source, own * _SCALES + number < left)

    @staticmethod
    def _whole(piece: Any, index: Any, count: int, side: int) -> None:
        """piece() for those of `side` whose index is below count."""
        if side <= count:
            piece()
        else:
            with g.when(index < count):
                piece()
