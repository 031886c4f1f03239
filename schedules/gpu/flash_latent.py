"""Attention over latent vectors on the matrix units (multi-head latent attention, 576 elements of which 512 are the value).

A page of latents is read once: dim-major, it is the second operand of the scores through a transposing ldmatrix, and of the
weighted sum through a plain one. Two warps share 16 rows, because one cannot hold 512 sums per row in registers: each
multiplies one half of the elements of keys, they exchange their parts of the scores through shared memory, and each
weighs one half of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_tile import Operands
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.attention_pages import PageTiles, stage_elements
from llmc.schedules.gpu.attention_tile import final_factor
from llmc.schedules.gpu.flash_warp import LN2, Fragment, WarpTile, query_line, takes
from llmc.schedules.gpu.qcodes import pack

_CHUNK = 8  # elements in 16 bytes
_STAGES = 2
_KEPT = 12
_BLOCK_OVERHEAD = 1024  # bytes of shared memory that a block takes beside its own


@dataclass(frozen=True)
class LatentShape:
    """How a block is cut.

    Attributes:
        tiles: of 16 query rows; two warps each.
        keys: of a tile of latents.
    """

    tiles: int
    keys: int

    @property
    def rows(self) -> int:
        return 16 * self.tiles

    @property
    def threads(self) -> int:
        return 2 * self.tiles * g.WARP

    @property
    def parts(self) -> int:
        """float32 that a thread exchanges."""
        return self.keys // 2

    def front(self, cfg: AttentionConfig) -> int:
        """Elements before the tiles of latents: the parts of scores that are exchanged, and the queries."""
        return 2 * self.threads * self.parts + self.rows * query_line(cfg)

    def shared_bytes(self, cfg: AttentionConfig) -> int:
        return 2 * (self.front(cfg) + _STAGES * stage_elements(cfg, self.keys))

    def resident(self, cfg: AttentionConfig, caps: Capabilities) -> int:
        """Blocks that fit a multiprocessor's shared memory at a time."""
        return (caps.shared_bytes + _BLOCK_OVERHEAD) // (self.shared_bytes(cfg) + _BLOCK_OVERHEAD)

    def share(self, cfg: AttentionConfig) -> int:
        """Query heads of a block."""
        return next(n for n in range(min(cfg.heads, self.rows), 0, -1) if cfg.heads % n == 0)


_SHAPES = (LatentShape(4, 32), LatentShape(4, 16), LatentShape(2, 32), LatentShape(2, 16), LatentShape(1, 16))


def shape(cfg: AttentionConfig, caps: Capabilities, tokens: int) -> LatentShape | None:
    """The cut for blocks that need take no more than so many tokens; None if the kernel is not made for machine or sizes."""
    if not takes(cfg, caps) or cfg.key_dim % 32 or cfg.value_dim % 32:
        return None
    for cut in _SHAPES:
        if cut.shared_bytes(cfg) <= caps.shared_bytes:
            needed = -(-cut.share(cfg) * tokens // 16)
            return LatentShape(min(cut.tiles, needed), cut.keys)
    return None


class _LatentWarp(WarpTile):
    """One of the two warps of 16 rows.

    Args:
        half: which half of keys and values is its own, int32.
        parts: shared memory for parts of scores; `own` and `other` are where the two warps' begin.
    """

    def __init__(self, *args: Any, half: Any, parts: Any, own: Any, other: Any) -> None:
        super().__init__(*args)
        self.half, self.parts, self._own, self._other = half, parts, own, other
        self._query_at = g.held(self._query_at + half * (self.cfg.key_dim // 2))

    @property
    def columns(self) -> int:
        return self.cfg.value_dim // 2

    @property
    def steps(self) -> int:
        return self.cfg.key_dim // 32

    @property
    def kept_steps(self) -> int:
        return min(self.steps, _KEPT)  # the sums of the values take half of the registers

    def _score(self, base: Any) -> list[list[Fragment]]:
        line = self.pages.k_line
        scores = super()._score(base + self.half * (self.cfg.key_dim // 2 * line))
        registers = [(r, i) for r in scores[0] for i in range(4)]
        for number, (register, i) in enumerate(registers):
            e.store(self.parts, self._own + number * g.WARP, register[i], 1)
        g.barrier()
        for number, (register, i) in enumerate(registers):
            register.put(i, register[i] + self.parts[self._other + number * g.WARP])
        return scores

    def _value_corner(self, base: Any) -> Any:
        first = self.half * (self.cfg.value_dim // 2) + self.lane // 16 * 8 + self.lane % 8
        return g.held(base + first * self.pages.k_line + self.lane // 8 % 2 * 8)

    def _value_operand(self, corner: Any, key: int, column: int) -> Any:
        registers = g.local(4, "uint32")
        unit.load_x4(registers, self.pages.memory, corner + (column * self.pages.k_line + key))
        return registers


class LatentTile:
    """A block's memory and steps; made inside the launch.

    Args:
        unit_number: number of the share of query heads.
    """

    def __init__(
        self,
        cfg: AttentionConfig,
        caps: Capabilities,
        args: Operands,
        cut: LatentShape,
        thread: Any,
        unit_number: Any,
    ) -> None:
        self.cfg, self.caps, self.args, self.cut, self.thread = cfg, caps, args, cut, thread
        self.share = cut.share(cfg)
        self.first_head = g.held(unit_number * self.share)
        self.memory = g.arena(cut.shared_bytes(cfg))
        size, self.query = cut.threads * cut.parts, 2 * cut.threads * cut.parts
        self.parts = T.decl_buffer((size,), "float32", data=self.memory.data, scope="shared.dyn")

    def run(self, first_token: Any, used: Any, table: Any, begin: Any, end: Any, position: Any) -> None:
        """Attention of tokens [first_token, first_token + used), of which the first is at `position` of its sequence.

        Args:
            table: where the sequence's row of the block table begins.
            begin, end: keys that are visited; begin lies on a page's boundary.
        """
        self._attend(first_token, used, table, begin, end, position)
        self.finish()

    def decode(self, sequence: Any, begin: Any, end: Any, position: Any) -> None:
        """Attend with the one token of a sequence to keys [begin, end)."""
        self._attend(sequence, e.i64(1), sequence * self.args.width, begin, end, position)

    def _attend(self, first_token: Any, used: Any, table: Any, begin: Any, end: Any, position: Any) -> None:
        cfg, cut = self.cfg, self.cut
        self.first_token, self.used = first_token, used
        begin, end, position = (g.held(g.i32(value)) for value in (begin, end, position))
        pages = PageTiles(
            *(cfg, self.args, self.memory, cut.keys, e.i64(0)),
            *(g.held(table), end, self.thread, cut.threads),
        )
        ring, keys = cut.front(cfg), cut.keys
        count = g.held(T.truncdiv(end - begin + (keys - 1), g.i32(keys)))
        self._load_queries(first_token, used)
        unit.commit()
        pages.find(begin)
        pages.copy(g.i32(ring), begin)
        unit.commit()
        pages.find(begin + keys)
        warp, lane = e.let(self.thread // g.WARP), e.let(self.thread % g.WARP)
        own, step = e.let(warp * (g.WARP * cut.parts) + lane), cut.threads * cut.parts // 2
        self.tile = _LatentWarp(
            *(cfg, self.caps, self.args, pages, self.query, lane, e.let(warp % cut.tiles * 16), position),
            *(self.first_head, self.share),
            half=e.let(warp // cut.tiles),
            parts=self.parts,
            own=g.held(own),
            other=g.held((own + step) % (2 * step)),
        )
        unit.wait(1)
        g.barrier()
        self.tile.start()
        with g.loop(count) as i:
            first = g.held(begin + i * keys)
            base = g.held(i % _STAGES * pages.size + ring)
            unit.wait(0)
            g.barrier()  # the tile is there, the one before it has been read, and the queries too
            with g.when(i + 1 < count):
                pages.copy((i + 1) % _STAGES * pages.size + ring, first + keys)
            unit.commit()
            pages.find(first + 2 * keys)
            with g.when(first + keys > end):
                self._clear(base, e.let(end - first))
            self.tile.visit(base, first, end)
        self.tile.add_up()

    def _clear(self, base: Any, left: Any) -> None:
        """Zeros for keys behind the last one: a weight of 0 times what happens to lie there could be NaN."""
        line = self.cut.keys + 8
        part, inside = e.let(left // _CHUNK * _CHUNK), e.let(left % _CHUNK)

        def dim(d: Any) -> None:
            for j in range(_CHUNK):
                with g.when(j >= inside):
                    e.store(self.memory, base + g.i32(d) * line + part + j, T.Cast("uint16", g.i32(0)), 1)

        g.strided(self.thread, self.cfg.key_dim, self.cut.threads, dim)
        g.barrier()

    def _load_queries(self, first_token: Any, used: Any) -> None:
        cfg, args, line = self.cfg, self.args, query_line(self.cfg)
        pieces = cfg.key_dim // _CHUNK

        def load(i: Any) -> None:
            row, piece = e.let(i // pieces), e.let(i % pieces)
            # rows behind the last token are computed too (from a copy of it) and never stored
            token = e.let(first_token + T.min(row // self.share, used - 1))
            head = e.let(self.first_head + row % self.share)
            number = token * cfg.heads + head if cfg.token_major else head * args.t + token
            source = e.let(number * cfg.key_dim + piece * _CHUNK)
            at = e.let(g.i32(row * line + piece * _CHUNK) + self.query)
            unit.copy16(self.memory, at, args.q, source, True)

        g.strided(self.thread, self.cut.rows * pieces, self.cut.threads, load)

    # -- results -----------------------------------------------------------------------------------------------------

    def _each(self, store: Callable[[Any, Any, Any, Any, list[Any]], None]) -> None:
        """store(token, head, maximum, sum, [(registers, column)]) for the thread's rows of real tokens."""
        tile = self.tile
        first = e.let(tile.half * tile.columns + tile.lane % 4 * 2)
        for i, row in enumerate(tile.rows[0]):
            with g.when(row // self.share < self.used):
                token = g.held(self.first_token + row // self.share)
                head = g.held(self.first_head + row % self.share)
                largest = e.let(tile.largest[0][i][0] * e.f32(tile.unit * LN2))
                pairs = [(r[2 * i], r[2 * i + 1], first + n * 8) for n, r in enumerate(tile.out[0])]
                store(token, head, largest, e.let(tile.total[0][i][0]), pairs)

    def finish(self) -> None:
        """Normalise and store the rows of real tokens."""
        cfg, args = self.cfg, self.args
        out = e.flat(args.out, args.t * cfg.heads * cfg.value_dim // 2, "uint32")

        def store(token: Any, head: Any, largest: Any, total: Any, pairs: list[Any]) -> None:
            factor = final_factor(cfg, args, largest, total, head)
            base = g.held((token * cfg.heads + head) * (cfg.value_dim // 2))
            for low, high, column in pairs:
                e.store(
                    out, base + T.truncdiv(column, g.i32(2)), pack(low * factor, high * factor, cfg.dtype), 1
                )

        self._each(store)

    def store_partial(self, part: Any, row_base: Callable[[Any], Any], width: int) -> None:
        """Rows, unnormalised, with their maxima and sums; one token.

        Args:
            row_base: head -> element of `part` at which its row begins.
        """

        def store(token: Any, head: Any, largest: Any, total: Any, pairs: list[Any]) -> None:
            base = g.held(row_base(head))
            for low, high, column in pairs:
                e.store(part, base + column, low, 1)
                e.store(part, base + column + 1, high, 1)
            with g.when(T.And(self.tile.half == 0, self.tile.lane % 4 == 0)):
                e.store(part, base + width - 16, largest, 1)
                e.store(part, base + width - 15, total, 1)

        self._each(store)
