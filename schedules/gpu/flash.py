"""Prefill attention on the matrix units (Dao 2023, "FlashAttention-2"): tiles of query rows against tiles of keys.

The warps of a block take neighbouring rows and share each tile of keys; the next tile is copied to shared memory while they
work on this one, with one barrier per tile. Tiles that no row of a warp sees are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.attention_pages import stage_elements
from llmc.schedules.gpu.attention_tile import final_factor
from llmc.schedules.gpu.coded_warp import query_place, tiles_of, warp_of
from llmc.schedules.gpu.configs import GpuPrefillSchedule
from llmc.schedules.gpu.flash_warp import LN2, HeadTile, WarpTile, query_line
from llmc.schedules.gpu.flash_warp import takes as takes_heads
from llmc.schedules.gpu.qcodes import pack

_CHUNK = 8  # elements in 16 bytes


@dataclass(frozen=True)
class FlashShape:
    """How a block is cut.

    Attributes:
        warps: of a block.
        tiles: of 16 query rows, per warp. An operand of keys that ldmatrix reads is used once per tile.
        keys: per step.
        stages: tiles of keys in shared memory.
    """

    warps: int
    tiles: int
    keys: int
    stages: int = 2

    @property
    def rows(self) -> int:
        return self.warps * self.tiles * 16

    @property
    def threads(self) -> int:
        return self.warps * g.WARP

    def shared_bytes(self, cfg: AttentionConfig) -> int:
        return 2 * (self.rows * query_line(cfg) + self.stages * stage_elements(cfg, self.keys))


# the largest that fits is taken; up to 128 elements per head, two tiles of rows fit a warp's registers
_NARROW: tuple[FlashShape, ...] = (
    FlashShape(4, 2, 64),
    FlashShape(4, 2, 32),
    FlashShape(4, 1, 32),
    FlashShape(4, 1, 16),
)
_WIDE: tuple[FlashShape, ...] = (
    FlashShape(8, 1, 64),
    FlashShape(8, 1, 32),
    FlashShape(4, 1, 32),
    FlashShape(4, 1, 16),
)
_WIDEST = 256


def shape(cfg: AttentionConfig, caps: Capabilities) -> FlashShape | None:
    """The cut for these heads; None = this kernel is not made for them."""
    widest = max(cfg.key_dim, cfg.value_dim)
    if not takes_heads(cfg, caps) or widest > _WIDEST:
        return None
    tuned = cfg.prefill.choices[0]
    if isinstance(tuned, GpuPrefillSchedule) and tuned.warps:
        return FlashShape(tuned.warps, tuned.tiles, tuned.keys, tuned.stages)
    shapes: tuple[FlashShape, ...] = _NARROW if widest <= 128 else _WIDE
    if cfg.coded and 96 < widest <= 128:  # operands of codes take the registers of the other keys' scores
        shapes = shapes[1:]
    return next((s for s in shapes if s.shared_bytes(cfg) <= caps.shared_bytes), None)


class FlashTile(HeadTile):
    """A block's steps."""

    def run(self, first_token: Any, used: Any, table: Any, begin: Any, end: Any, position: Any) -> None:
        """Attention of tokens [first_token, first_token + used), of which the first is at `position` of its sequence.

        Args:
            table: where the sequence's row of the block table begins.
            begin, end: keys that are visited; begin lies on a page's boundary.
        """
        cfg, cut = self.cfg, self.cut
        begin, end, position = (g.held(g.i32(value)) for value in (begin, end, position))
        pages = tiles_of(cfg)(
            *(cfg, self.args, self.memory, cut.keys, self.kv_head),
            *(g.held(table), end, self.thread, cut.threads),
        )
        stages, ring = cut.stages, cut.rows * query_line(cfg)
        count = g.held(T.truncdiv(end - begin + (cut.keys - 1), g.i32(cut.keys)))
        self._load_queries(first_token, used)
        unit.commit()
        pages.find(begin)
        for s in range(stages - 1):
            with g.when(count > s):
                pages.copy(g.i32(ring + s * pages.size), begin + s * cut.keys)
            unit.commit()
            pages.find(begin + (s + 1) * cut.keys)
        warp = e.let(self.thread // g.WARP)
        first_row = e.let(warp * (16 * cut.tiles))
        lane = e.let(self.thread % g.WARP)
        tile = warp_of(cfg)(
            *(cfg, self.caps, self.args, pages, 0, lane, first_row, position),
            *(self.first_head, self.share, cut.tiles),
        )
        if tile.kept_steps:
            unit.wait(stages - 1)
            g.barrier()
        tile.start()
        with g.loop(count) as i:
            first = g.held(begin + i * cut.keys)
            unit.wait(stages - 2)
            g.barrier()  # tile (and queries) are there, and the one before it has been read
            with g.when(i + (stages - 1) < count):
                slot = (i + (stages - 1)) % stages * pages.size
                pages.copy(slot + ring, first + (stages - 1) * cut.keys)
            unit.commit()
            pages.find(first + stages * cut.keys)
            with g.when(first <= tile.last_place):
                tile.visit(i % stages * pages.size + ring, first, end)
        tile.add_up()
        self._store(tile, first_token, used)

    def _query_place(self, row: Any, piece: Any) -> Any:
        """Element of the memory where 8 elements of a query lie."""
        return row * query_line(self.cfg) + piece * _CHUNK

    def _load_queries(self, first_token: Any, used: Any) -> None:
        cfg, args = self.cfg, self.args
        if cfg.coded:
            self._load_words(first_token, used)
            return
        pieces = cfg.key_dim // _CHUNK

        def load(i: Any) -> None:
            row, piece = e.let(i // pieces), e.let(i % pieces)
            # rows behind the last token are computed too (from a copy of it) and never stored
            token = e.let(first_token + T.min(row // self.share, used - 1))
            head = e.let(self.first_head + row % self.share)
            at = token * cfg.heads + head if cfg.token_major else head * args.t + token
            source = e.let(at * cfg.key_dim + piece * _CHUNK)
            unit.copy16(self.memory, e.let(g.i32(self._query_place(row, piece))), args.q, source, True)

        g.strided(self.thread, self.cut.rows * pieces, self.cut.threads, load)

    def _load_words(self, first_token: Any, used: Any) -> None:
        """Queries in the order that words of codes ask for; two elements are neighbours in both."""
        cfg, args = self.cfg, self.args
        pairs = cfg.key_dim // 2
        source = e.flat(args.q, args.t * cfg.heads * pairs, "uint32")
        target = T.decl_buffer(
            (self.cut.shared_bytes(cfg) // 4,), "uint32", data=self.memory.data, scope="shared.dyn"
        )

        def load(i: Any) -> None:
            row, pair = e.let(i // pairs), e.let(i % pairs)
            token = e.let(first_token + T.min(row // self.share, used - 1))
            head = e.let(self.first_head + row % self.share)
            at = token * cfg.heads + head if cfg.token_major else head * args.t + token
            place = row * (query_line(cfg) // 2) + query_place(2 * pair) // 2
            e.store(target, e.let(place), source[e.let(at * pairs + pair)], 1)

        g.strided(self.thread, self.cut.rows * pairs, self.cut.threads, load)

    def _store(self, tile: WarpTile, first_token: Any, used: Any) -> None:
        """Normalise and store the rows of real tokens."""
        cfg, args = self.cfg, self.args
        out = e.flat(args.out, args.t * cfg.heads * cfg.value_dim // 2, "uint32")
        for m, rows in enumerate(tile.rows):
            for i, row in enumerate(rows):
                head = e.let(self.first_head + row % self.share)
                with g.when(row // self.share < used):
                    largest = e.let(tile.largest[m][i][0] * e.f32(tile.unit * LN2))
                    factor = final_factor(cfg, args, largest, e.let(tile.total[m][i][0]), head)
                    token = e.let(first_token + row // self.share)
                    base = e.let((token * cfg.heads + head) * (cfg.value_dim // 2) + tile.lane % 4)
                    for n, registers in enumerate(tile.out[m]):
                        pair = pack(registers[2 * i] * factor, registers[2 * i + 1] * factor, cfg.dtype)
                        e.store(out, base + n * 4, pair, 1)
