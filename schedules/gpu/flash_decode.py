"""Decode attention on the matrix units: one token against a piece of its context (Dao et al. 2023, "Flash-Decoding").

The query heads of one cached head are the rows of one tile of 16. Memory is what decode waits for, so every warp reads a
stream of its own: it takes every n-th tile of the piece, copies the next one to its part of shared memory while it works on
this one, and meets no other warp before the end, where the warps' results are added up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.kv_plan import entry_bytes
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_tile import Operands
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.attention_pages import stage_elements
from llmc.schedules.gpu.attention_tile import final_factor, heads_per_tile
from llmc.schedules.gpu.coded_warp import query_place, tiles_of, warp_of
from llmc.schedules.gpu.configs import GpuDecodeSchedule
from llmc.schedules.gpu.flash_warp import LN2, HeadTile, WarpTile, query_line, takes
from llmc.schedules.gpu.rope import Pages, append, rotate

_ROWS = 16
_PAD = 8  # float32 behind each row of a warp's result
_WIDEST = 256
_STATIC = 2048  # bytes that the kernel declares beside (sums of warps, norms of heads), at most
_BLOCK_OVERHEAD = 1024  # bytes of shared memory that a block takes beside its own


@dataclass(frozen=True)
class DecodeShape:
    """How a block is cut.

    Attributes:
        warps: of a block; each has its own tiles.
        keys: of a tile.
        stages: tiles of a warp; all but one are on their way while it computes.
    """

    warps: int
    keys: int
    stages: int = 2

    @property
    def threads(self) -> int:
        return self.warps * g.WARP

    def shared_bytes(self, cfg: AttentionConfig) -> int:
        return 2 * (_ROWS * query_line(cfg) + self.warps * self.stages * stage_elements(cfg, self.keys))

    def fits(self, cfg: AttentionConfig, caps: Capabilities) -> bool:
        """Whether a block's shared memory suffices, and a warp's part of it for the warp's result."""
        own = 2 * self.stages * stage_elements(cfg, self.keys)
        result = 4 * _ROWS * (cfg.value_dim + _PAD)
        return self.shared_bytes(cfg) + _STATIC <= caps.shared_bytes and result <= own

    def resident(self, cfg: AttentionConfig, caps: Capabilities) -> int:
        """Blocks that fit a multiprocessor's shared memory at a time."""
        whole = caps.shared_bytes + _BLOCK_OVERHEAD
        return whole // (self.shared_bytes(cfg) + _STATIC + _BLOCK_OVERHEAD)

    def bytes_in_flight(self, cfg: AttentionConfig, caps: Capabilities) -> int:
        """Bytes of pages that a multiprocessor waits for while all its warps compute."""
        tile = self.keys * sum(entry_bytes(cfg.kv_dtype, dim) for dim in (cfg.key_dim, cfg.value_dim))
        return self.resident(cfg, caps) * self.warps * (self.stages - 1) * tile


_SHAPES = (DecodeShape(4, 32), DecodeShape(4, 16), DecodeShape(2, 32), DecodeShape(2, 16), DecodeShape(1, 16))


def shape(cfg: AttentionConfig, caps: Capabilities) -> DecodeShape | None:
    """The cut for these heads; None = this kernel is not made for them."""
    if not takes(cfg, caps) or max(cfg.key_dim, cfg.value_dim) > _WIDEST:
        return None
    tuned = cfg.decode.choices[0]
    if isinstance(tuned, GpuDecodeSchedule) and tuned.warps:
        return DecodeShape(tuned.warps, tuned.keys, tuned.stages)
    return next((s for s in _SHAPES if s.fits(cfg, caps)), None)


def appends(cfg: AttentionConfig) -> bool:
    """Whether a block has all query heads of its cached head, and can write the new token's key and value itself."""
    return heads_per_tile(cfg) == cfg.heads // cfg.kv_heads


class DecodeTile(HeadTile):
    """A block's steps.

    Args:
        cut: of the block.
        rest: see HeadTile.
    """

    def __init__(
        self, cfg: AttentionConfig, caps: Capabilities, args: Operands, cut: DecodeShape, *rest: Any
    ) -> None:
        super().__init__(cfg, caps, args, cut, *rest)
        self.largest = g.shared(cut.warps * _ROWS, name="largest")
        self.total = g.shared(cut.warps * _ROWS, name="total")

    def decode(self, sequence: Any, begin: Any, end: Any, position: Any) -> None:
        """Attend to keys [begin, end) of a sequence whose token is at `position`; begin lies on a page's boundary."""
        cfg, cut = self.cfg, self.cut
        self.sequence = sequence
        lane, warp = e.let(self.thread % g.WARP), e.let(self.thread // g.WARP)
        end, position = g.held(g.i32(end)), g.held(g.i32(position))
        self._append(sequence, end > position)
        pages = tiles_of(cfg)(
            *(cfg, self.args, self.memory, cut.keys, self.kv_head),
            *(g.held(sequence * self.args.width), end, lane, g.WARP),
        )
        own = g.held(warp * (cut.stages * pages.size) + _ROWS * query_line(cfg))
        step = cut.warps * cut.keys
        start = g.held(g.i32(begin) + warp * cut.keys)
        count = g.held(T.max(g.i32(0), T.truncdiv(end - start + (step - 1), g.i32(step))))
        pages.find(start)
        for s in range(cut.stages - 1):
            with g.when(count > s):
                pages.copy(own + s * pages.size, start + s * step)
            unit.commit()
            pages.find(start + (s + 1) * step)
        self._load_queries(sequence)
        g.barrier()
        tile = warp_of(cfg)(
            *(cfg, self.caps, self.args, pages, 0, lane, g.i32(0), position),
            *(self.first_head, self.share),
        )
        tile.one_place(position)
        tile.start()
        with g.loop(count) as i:
            first = g.held(start + i * step)
            ahead = cut.stages - 1
            with g.when(i + ahead < count):
                slot = (i + ahead) % cut.stages * pages.size
                pages.copy(own + slot, first + ahead * step)
            unit.commit()
            pages.find(first + (ahead + 1) * step)
            unit.wait(ahead)
            g.warp_barrier()  # all lanes' copies are there
            tile.visit(own + i % cut.stages * pages.size, first, end)
            g.warp_barrier()  # the tile has been read by all lanes before the next but one is copied there
        tile.add_up()
        self._publish(tile, own, warp)

    def _append(self, sequence: Any, last: Any) -> None:
        """The block of the last piece writes the token's rotated key and its value to their page, before it reads them."""
        args = self.args
        if args.rope is None or args.slots is None or not appends(self.cfg):
            return
        with g.when(last):
            pages = Pages(self.cfg, args.slots, args.pools, args.layer, self.caps)
            append(args.rope, pages, sequence, (self.kv_head, 1), self.thread, self.cut.threads)
            g.device_fence()
            g.barrier()

    def _load_queries(self, sequence: Any) -> None:
        """Rows of heads to shared memory, zeros behind them."""
        cfg, args, line = self.cfg, self.args, query_line(self.cfg)

        def place(d: Any) -> Any:
            return query_place(d) if cfg.coded else d

        def keep(number: Any, d: Any, value: Any) -> None:
            value = g.narrow(e.let(value), cfg.dtype, self.caps)
            e.store(self.memory, number * line + place(d), self._bits(value), 1)

        def load(i: Any) -> None:
            row, d = e.let(i // cfg.key_dim), e.let(i % cfg.key_dim)
            head = e.let(self.first_head + row)
            at = sequence * cfg.heads + head if cfg.token_major else head * args.t + sequence
            e.store(self.memory, row * line + place(d), self._bits(args.q[at * cfg.key_dim + d]), 1)

        if args.rope is not None:
            rotate(args.rope, 0, sequence, (self.first_head, self.share), self.thread, keep, self.cut.threads)
        else:
            g.strided(self.thread, self.share * cfg.key_dim, self.cut.threads, load)
        zeros = (_ROWS - self.share) * line
        zero = g.i32(0)
        if zeros:
            g.strided(
                self.thread,
                zeros,
                self.cut.threads,
                lambda i: e.store(self.memory, i + self.share * line, T.Cast("uint16", zero), 1),
            )

    def _bits(self, value: Any) -> Any:
        return T.reinterpret("uint16", e.let(value)) if self.cfg.dtype == "float16" else value

    # -- results -----------------------------------------------------------------------------------------------------

    @property
    def _line(self) -> int:
        return self.cfg.value_dim + _PAD

    def _publish(self, tile: WarpTile, own: Any, warp: Any) -> None:
        """The warp's sums to its own part of shared memory, where its tiles were."""
        size = self.cut.shared_bytes(self.cfg) // 4
        self.sums = T.decl_buffer((size,), "float32", data=self.memory.data, scope="shared.dyn")
        for i, row in enumerate(tile.rows[0]):
            with g.when(row < self.share):
                base = g.held(T.truncdiv(own, g.i32(2)) + (row * self._line + tile.lane % 4 * 2))
                for n, registers in enumerate(tile.out[0]):
                    for j in range(2):
                        e.store(self.sums, base + (n * 8 + j), registers[2 * i + j], 1)
                with g.when(tile.lane % 4 == 0):
                    at = e.let(warp * _ROWS + row)
                    e.store(self.largest, at, tile.largest[0][i][0] * e.f32(tile.unit), 1)
                    e.store(self.total, at, tile.total[0][i][0], 1)
        g.barrier()

    def each(self, store: Callable[[Any, Any, Any, Any, Any], None]) -> None:
        """store(head, dim, unnormalised output, its maximum, its sum) for every element, shared among the threads."""
        cfg, cut = self.cfg, self.cut
        first, step = _ROWS * query_line(cfg) // 2, cut.stages * stage_elements(cfg, cut.keys) // 2

        def element(i: Any) -> None:
            row, d = e.let(i // cfg.value_dim), e.let(i % cfg.value_dim)
            tops = [e.let(self.largest[row + w * _ROWS]) for w in range(cut.warps)]
            top = tops[0]
            for other in tops[1:]:
                top = e.let(T.max(top, other))
            value, total = e.f32(0.0), e.f32(0.0)
            for w, own in enumerate(tops):
                factor = e.let(g.exp2(e.let(own - top)))
                value = e.let(value + factor * self.sums[row * self._line + d + (first + w * step)])
                total = e.let(total + factor * self.total[row + w * _ROWS])
            store(e.let(self.first_head + row), d, value, e.let(top * e.f32(LN2)), total)

        g.strided(self.thread, self.share * cfg.value_dim, cut.threads, element)

    def finish(self) -> None:
        """Normalise and store: the piece is the whole context."""
        cfg, args = self.cfg, self.args

        def store(head: Any, d: Any, value: Any, top: Any, total: Any) -> None:
            factor = final_factor(cfg, args, top, total, head)
            at = (self.sequence * cfg.heads + head) * cfg.value_dim + d
            e.store(args.out, at, g.narrow(e.let(value * factor), cfg.dtype, self.caps), 1)

        self.each(store)

    def store_partial(self, part: Any, row_base: Callable[[Any], Any], width: int) -> None:
        """Rows, unnormalised, with their maxima and sums.

        Args:
            row_base: head -> element of `part` at which its row begins.
        """

        def store(head: Any, d: Any, value: Any, top: Any, total: Any) -> None:
            base = e.let(row_base(head))
            e.store(part, base + d, value, 1)
            with g.when(d == 0):
                e.store(part, base + width - 16, top, 1)
                e.store(part, base + width - 15, total, 1)

        self.each(store)
