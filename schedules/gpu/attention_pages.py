"""Tiles of keys and values that asynchronous copies bring from cache pages to shared memory.

What one head of one layer has on a page is contiguous, keys dim-major and values token-major. A tile covers `keys` tokens, one
or several pages or a part of one, in the same two orders with a pad of 16 bytes behind each line: eight lines then begin at
different banks, and ldmatrix reads both without conflicts. Neighbouring threads copy neighbouring 16 bytes, and all
addresses of a thread are one address plus constants.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.tirx.script import builder as T

from llmc.kv_plan import QUAD
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_tile import Operands
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit

PAD = 8  # elements
CODED_PAD = 8  # words, behind a line of words of codes
_CHUNK = 8  # elements in 16 bytes


def stage_elements(cfg: AttentionConfig, keys: int) -> int:
    """16-bit elements of a tile of keys and of their values (which latent ones are a part of)."""
    if cfg.coded:
        words = cfg.key_dim // QUAD * (keys + CODED_PAD) + keys // QUAD * (cfg.value_dim + CODED_PAD)
        return 2 * words + 2 * keys  # scales of both
    return cfg.key_dim * (keys + PAD) + (0 if cfg.latent else keys * (cfg.value_dim + PAD))


class PageTiles:
    """Where tiles lie, and copying them; made inside the launch.

    Args:
        memory: shared memory, uint16.
        keys: per tile; a power of two, 16 or more.
        table: where the sequence's row of the block table begins.
        end: keys of the sequence, int32.
        thread, threads: of those who copy a tile together.
    """

    def __init__(
        self,
        cfg: AttentionConfig,
        args: Operands,
        memory: Any,
        keys: int,
        kv_head: Any,
        table: Any,
        end: Any,
        thread: Any,
        threads: int,
    ) -> None:
        self.cfg, self.args, self.memory, self.keys = cfg, args, memory, keys
        self.kv_head, self.table, self.end = kv_head, table, end
        self.thread, self.threads = thread, threads
        self.k_line, self.v_line = keys + PAD, cfg.value_dim + PAD
        self.v_offset = cfg.key_dim * self.k_line
        self.size = stage_elements(cfg, keys)
        self.dim_step = self.k_line  # elements from one of a key to the next
        # tokens of a tile that are sure to lie on one page, if tiles begin at multiples of so many
        self.run = math.gcd(cfg.page_size, keys)
        self._pages = [g.local(1, "int32") for _ in range(keys // self.run)]

    def find(self, first: Any) -> None:
        """Look the pages of the tile at key `first` (int32) up, for the next `copy`; behind the last key its page again."""
        for n, page in enumerate(self._pages):
            key = T.min(first + n * self.run, self.end - 1)
            e.store(page, 0, self.args.block_table[self.table + e.i64(key // self.cfg.page_size)], 1)

    def copy(self, to: Any, first: Any) -> None:
        """Begin to copy the tile at key `first`, whose pages were found, to element `to` of the memory."""
        cfg, ps = self.cfg, self.cfg.page_size
        left = g.held(self.end - first)  # keys of the tile that exist
        inside = e.let(first % ps)
        for n, page in enumerate(self._pages):
            base = g.held((e.i64(page[0]) * cfg.layers + self.args.layer) * cfg.kv_heads + self.kv_head)
            at = g.i32(0) if self.run == ps else e.let((inside + n * self.run) % ps)
            self._copy_keys(to, base * (cfg.key_dim * ps) + at, n * self.run, left)
            if not cfg.latent:
                self._copy_values(to, (base * ps + at) * cfg.value_dim, n * self.run, left)

    def _key_place(self, dim: Any, key: Any) -> Any:
        """Element of a tile where element `dim` of 8 keys lies."""
        return dim * self.k_line + key

    def _value_place(self, key: Any, dim: Any) -> Any:
        """Element of a tile where 8 elements of a value lie."""
        return self.v_offset + key * self.v_line + dim

    def _copy_keys(self, to: Any, base: Any, number: int, left: Any) -> None:
        pieces, ps, dims = self.run // _CHUNK, self.cfg.page_size, self.cfg.key_dim
        lines = self.threads // pieces
        part, line = e.let(self.thread % pieces * _CHUNK), e.let(self.thread // pieces)
        valid = part + number < left
        source = g.held(base + (line * ps + part))
        target = g.held(to + self._key_place(line, part + number))
        for turn in range(-(-dims // lines)):
            first = turn * lines

            def piece(first: int = first) -> None:
                unit.copy16(
                    self.memory, target + first * self.dim_step, self.args.k, source + first * ps, valid
                )

            if first + lines <= dims:
                piece()
            else:
                with g.when(line < dims - first):
                    piece()

    def _copy_values(self, to: Any, base: Any, number: int, left: Any) -> None:
        pieces = self.cfg.value_dim // _CHUNK
        chunks = self.run * pieces
        source = g.held(base + self.thread * _CHUNK)
        for first in range(0, chunks, self.threads):

            def piece(first: int = first) -> None:
                chunk = e.let(self.thread + first)
                key = e.let(chunk // pieces + number)
                target = to + self._value_place(key, chunk % pieces * _CHUNK)
                # zeros behind the last key: a weight of 0 times what happens to lie there could be NaN
                unit.copy16(self.memory, e.let(target), self.args.v, source + first * _CHUNK, key < left)

            if first + self.threads <= chunks:
                piece()
            else:
                with g.when(self.thread < chunks - first):
                    piece()
