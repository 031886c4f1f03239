"""Attention over a paged KV cache for machines with threads: prefill, and decode with the context split over blocks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.attention import partial_shape
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_tile import Operands, first_visible
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import flash, flash_decode, flash_group, flash_latent
from llmc.schedules.gpu.attention_tile import (
    THREADS,
    Tile,
    final_factor,
    heads_per_tile,
    tokens_per_tile,
)
from llmc.schedules.gpu.coded_tile import CodedTile
from llmc.schedules.gpu.configs import GpuPrefillSchedule
from llmc.schedules.gpu.rope import THREADS as ROPE_THREADS
from llmc.schedules.gpu.rope import Pages, append
from llmc.schedules.rope import RopeConfig, RopeOperands

_EMPTY = -1e30
_WAVES = 4
_MANY_TOKENS = 64  # as many as a block can take
_PLAIN_RESIDENT = 4  # blocks of the plain kernel that a multiprocessor is taken to hold


_PREFILL_TILES: dict[type, Any] = {
    flash.FlashShape: flash.FlashTile,
    flash_group.GroupShape: flash_group.GroupTile,
    flash_latent.LatentShape: flash_latent.LatentTile,
}


def _untuned_group(cfg: AttentionConfig, caps: Capabilities) -> flash_group.GroupShape | None:
    """The cut for warpgroups, unless the tuner has chosen one for warps."""
    tuned = cfg.prefill.choices[0]
    chosen = isinstance(tuned, GpuPrefillSchedule) and tuned.warps
    return None if chosen else flash_group.shape(cfg, caps)


class _Prefill:
    """Which kernel does prefill, and its geometry.

    Attributes:
        tokens: of a block.
        units: (cached head, share of its query heads) pairs.
        threads: of a block.
    """

    def __init__(self, cfg: AttentionConfig, caps: Capabilities) -> None:
        self.cfg, self.caps = cfg, caps
        self.units = cfg.heads // heads_per_tile(cfg)
        self.cut: Any = None
        if cfg.latent:
            self.cut = flash_latent.shape(cfg, caps, _MANY_TOKENS)
        if self.cut is not None:
            share = self.cut.share(cfg)
            self.units, self.tokens = cfg.heads // share, self.cut.rows // share
        elif not cfg.latent and (cut := _untuned_group(cfg, caps) or flash.shape(cfg, caps)) is not None:
            self.cut, self.tokens = cut, cut.rows // heads_per_tile(cfg)
        else:
            self.tokens = tokens_per_tile(cfg, caps)
        self.threads = THREADS if self.cut is None else self.cut.threads

    def bounds(self) -> Any:
        """What the launch is said to take: parts of a block exchange registers only if it has a multiprocessor to itself.

        Tiles of codes would be given too few registers for the same reason as in decode.
        """
        alone = isinstance(self.cut, flash_group.GroupShape) or (self.cfg.coded and self.cut is not None)
        return g.at_most_one_block() if alone else nullcontext()

    def make(self, args: Operands, thread: Any, unit: Any) -> Any:
        """The block's tile, which has a method `run`."""
        if self.cut is None:
            plain = CodedTile if self.cfg.coded else Tile
            return plain(self.cfg, self.caps, args, self.tokens, thread, unit)
        kind = _PREFILL_TILES[type(self.cut)]
        return kind(self.cfg, self.caps, args, self.cut, thread, unit)


class _Decode:
    """Which kernel does decode, and its geometry: see _Prefill.

    Attributes:
        resident: blocks that a multiprocessor holds.
        appends: blocks write the keys and values of new tokens themselves.
    """

    def __init__(self, cfg: AttentionConfig, caps: Capabilities) -> None:
        self.cfg, self.caps = cfg, caps
        self.units = cfg.heads // heads_per_tile(cfg)
        self.cut: Any = None
        if cfg.latent:
            self.cut = flash_latent.shape(cfg, caps, 1)
            if self.cut is not None:
                self.units = cfg.heads // self.cut.share(cfg)
        else:
            self.cut = flash_decode.shape(cfg, caps)
        self.threads = THREADS if self.cut is None else self.cut.threads
        self.appends = isinstance(self.cut, flash_decode.DecodeShape) and flash_decode.appends(cfg)
        self.resident = _PLAIN_RESIDENT if self.cut is None else self.cut.resident(cfg, caps)

    def make(self, args: Operands, thread: Any, unit: Any) -> Any:
        """The block's tile, which has methods `decode`, `finish` and `store_partial`."""
        if self.cut is None:
            plain = CodedTile if self.cfg.coded else Tile
            return plain(self.cfg, self.caps, args, 1, thread, unit)
        kind = flash_latent.LatentTile if self.cfg.latent else flash_decode.DecodeTile
        return kind(self.cfg, self.caps, args, self.cut, thread, unit)


def attention_prefill(cfg: AttentionConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.attention.attention_prefill, for a machine with threads.

    The host does not know how the tokens are distributed over sequences: it launches as many tiles as there can be, and a
    block finds its sequence by counting.
    """
    kind = _Prefill(cfg, caps)
    tokens, units = kind.tokens, kind.units
    built: list[Any] = []
    with e.kernel(built):
        t, b, w, p = (e.dim(name) for name in ("T", "B", "W", "P"))
        args = Operands(cfg, t, b, w, p)
        with e.root():
            args.view()
            tiles = e.let(t // tokens + b)
            with g.launch(tiles * units, kind.threads) as (number, thread), kind.bounds():
                # later tiles of a sequence see more keys; they go first, so that the short ones fill the gaps at the end
                unit, tile_number = g.held(number % units), g.held(tiles - 1 - number // units)
                sequence, first = _find_tile(args, tile_number, tokens)
                tile = kind.make(args, thread, unit)
                with g.when(sequence < b):
                    start = g.held(e.i64(args.query_start[sequence]))
                    length = e.let(e.i64(args.query_start[sequence + 1]) - start)
                    used = g.held(T.min(e.i64(tokens), length - first))
                    position = g.held(e.i64(args.context_len[sequence]) - length + first)
                    low = g.held(first_visible(cfg, position) // cfg.page_size * cfg.page_size)
                    tile.run(
                        g.held(start + first),
                        used,
                        e.let(sequence * w),
                        low,
                        e.let(position + used),
                        position,
                    )
    return built[0]


def _find_tile(args: Operands, number: Any, tokens: int) -> tuple[Any, Any]:
    """(sequence, its token at which tile `number` begins); the number of sequences if there is no such tile."""
    found, left = g.local(1, "int64"), g.local(1, "int64")
    e.store(found, 0, e.i64(0), 1)
    e.store(left, 0, number, 1)

    def tiles() -> Any:
        count = e.i64(args.query_start[found[0] + 1]) - e.i64(args.query_start[found[0]])
        return e.ceildiv(count, tokens)

    with T.While(T.And(found[0] < args.b, left[0] >= tiles())):
        e.store(left, 0, left[0] - tiles(), 1)
        e.store(found, 0, found[0] + 1, 1)
    return found[0], g.held(left[0] * tokens)


def attention_decode(cfg: AttentionConfig, caps: Capabilities, rope: RopeConfig | None = None) -> Any:
    """The PrimFunc of llmc.schedules.attention.attention_decode, for a machine with threads.

    Up to three launches: keys and values of the new tokens to their pages (with `rope`, unless the blocks of the second launch
    do that), pieces of the context, their merge.
    """
    kind = _Decode(cfg, caps)
    units, splits, group = kind.units, cfg.splits, cfg.heads // cfg.kv_heads
    width = partial_shape(cfg)[-1]
    built: list[Any] = []
    with e.kernel(built):
        b, w, p = (e.dim(name) for name in ("B", "W", "P"))
        ops = RopeOperands(rope, caps, b) if rope is not None else None
        args = Operands(cfg, b, b, w, p, ops)
        partial = g.tensor("partial", [b, *partial_shape(cfg)], "float32")
        with e.root():
            args.view()
            part = e.flat(partial, b * cfg.kv_heads * splits * group * width)
            if ops is not None and args.slots is not None and not kind.appends:
                with g.launch(b * cfg.kv_heads, ROPE_THREADS) as (number, thread):
                    token, head = e.let(number // cfg.kv_heads), e.let(number % cfg.kv_heads)
                    pages = Pages(cfg, args.slots, args.pools, args.layer, caps)
                    append(ops, pages, token, (head, 1), thread)
            most = e.let(_most_pieces(b * units, splits, caps.multiprocessors * kind.resident))

            def row_base(sequence: Any, head: Any, split: Any) -> Any:
                pair = sequence * cfg.kv_heads + head // group
                return ((pair * splits + split) * group + head % group) * width

            # without this the assembler counts on more blocks per multiprocessor than shared memory allows, and spills
            with g.launch(b * units * most, kind.threads) as (number, thread), g.at_most_one_block():
                split, rest = g.held(T.truncmod(number, most)), g.held(T.truncdiv(number, most))
                unit, sequence = (
                    g.held(T.truncmod(rest, e.i64(units))),
                    g.held(T.truncdiv(rest, e.i64(units))),
                )
                low, per_split, high = _pieces(cfg, args, sequence, most)
                begin = g.held(low + split * per_split)
                end = g.held(T.min(high, begin + per_split))
                tile = kind.make(args, thread, unit)
                with g.when(begin < end):
                    tile.decode(sequence, begin, end, e.let(high - 1))
                    with T.If(per_split >= high - low):
                        with T.Then():
                            tile.finish()
                        with T.Else():
                            tile.store_partial(part, lambda head: row_base(sequence, head, split), width)
            with g.launch(b * cfg.heads, THREADS) as (number, thread):
                sequence, head = g.held(number // cfg.heads), g.held(number % cfg.heads)
                low, per_split, high = _pieces(cfg, args, sequence, most)
                merge = _Merge(cfg, caps, args, part, thread, width)
                with g.when(per_split < high - low):
                    pieces = g.held(T.truncdiv(high - low + per_split - 1, per_split))
                    merge.run(lambda s: row_base(sequence, head, s), sequence, head, pieces)
    return built[0]


def _most_pieces(tiles: Any, splits: int, resident: int) -> Any:
    """Into how many pieces each of `tiles` contexts is cut, so that they fill a machine that holds `resident` blocks.

    One wave of long pieces is best; where it would leave much of the machine empty, four waves of shorter ones are cut.
    """
    wave = T.truncdiv(e.i64(resident), tiles)
    waves = T.truncdiv(e.i64(_WAVES * resident), tiles)
    return T.max(e.i64(1), T.min(e.i64(splits), T.Select(wave >= _WAVES, wave, waves)))


def _pieces(cfg: AttentionConfig, args: Operands, sequence: Any, most: Any) -> tuple[Any, Any, Any]:
    """(first key, keys per piece, end of keys): whole pages, at most `most` pieces, none very small."""
    high = g.held(e.i64(args.context_len[sequence]))
    low = g.held(first_visible(cfg, high - 1) // cfg.page_size * cfg.page_size)
    least = -(-cfg.decode.choices[0].least_keys // cfg.page_size) * cfg.page_size
    per = e.ceildiv(g.held(T.truncdiv(high - low + (most - 1), most)), cfg.page_size) * cfg.page_size
    return low, g.held(T.max(e.i64(least), per)), high


class _Merge:
    """Combines the pieces of one head: sum_i e^(m_i - m) o_i / sum_i e^(m_i - m) l_i."""

    def __init__(
        self, cfg: AttentionConfig, caps: Capabilities, args: Operands, part: Any, thread: Any, width: int
    ) -> None:
        self.cfg, self.caps, self.args, self.part = cfg, caps, args, part
        self.thread, self.width = thread, width
        self.weights = g.shared(cfg.splits, name="weights")
        self.scratch = g.shared(THREADS // g.WARP, name="scratch")

    def run(self, row: Any, sequence: Any, head: Any, pieces: Any) -> None:
        """row(piece) gives the element at which the head's row of a piece begins."""
        cfg, part, thread, width = self.cfg, self.part, self.thread, self.width
        top, total = g.local(1), g.local(1)
        e.store(top, 0, e.f32(_EMPTY), 1)
        e.store(total, 0, e.f32(0.0), 1)

        def largest(s: Any) -> None:
            e.store(top, 0, T.max(top[0], part[row(s) + width - 16]), 1)

        def weight(s: Any) -> None:
            base = e.let(row(s))
            factor = e.let(T.exp(part[base + width - 16] - top[0]))
            e.store(self.weights, s, factor, 1)
            e.store(total, 0, total[0] + factor * part[base + width - 15], 1)

        g.strided(thread, pieces, THREADS, largest)
        g.block_reduce(top, self.scratch, thread, THREADS, T.max)
        g.strided(thread, pieces, THREADS, weight)
        g.block_reduce(total, self.scratch, thread, THREADS, g.add, again=True)
        factor = final_factor(cfg, self.args, e.let(top[0]), e.let(total[0]), head)

        def dim(d: Any) -> None:
            value = g.local(1)
            e.store(value, 0, e.f32(0.0), 1)
            with e.loop(pieces) as s:
                e.store(value, 0, value[0] + self.weights[s] * part[row(s) + d], 1)
            at = (sequence * cfg.heads + head) * cfg.value_dim + d
            e.store(self.args.out, at, g.narrow(e.let(value[0] * factor), cfg.dtype, self.caps), 1)

        g.strided(thread, cfg.value_dim, THREADS, dim)
