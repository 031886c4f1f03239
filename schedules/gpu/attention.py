"""Attention over a paged KV cache for machines with threads: prefill, and decode with the context split over blocks."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.attention import partial_shape
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_tile import Operands, first_visible
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import flash
from llmc.schedules.gpu.attention_tile import (
    THREADS,
    Tile,
    final_factor,
    heads_per_tile,
    tokens_per_tile,
)
from llmc.schedules.gpu.rope import THREADS as ROPE_THREADS
from llmc.schedules.gpu.rope import Pages, append
from llmc.schedules.rope import RopeConfig, RopeOperands

_EMPTY = -1e30
_MIN_SPLIT_KEYS = 128  # a smaller piece of context is not worth a block


def _units(cfg: AttentionConfig) -> int:
    """(cached head, share of its query heads) pairs."""
    return cfg.heads // heads_per_tile(cfg)


def attention_prefill(cfg: AttentionConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.attention.attention_prefill, for a machine with threads.

    The host does not know how the tokens are distributed over sequences: it launches as many tiles as there can be, and a
    block finds its sequence by counting.
    """
    cut = flash.shape(cfg, caps)
    tokens = tokens_per_tile(cfg, caps) if cut is None else cut.rows // heads_per_tile(cfg)
    units = _units(cfg)
    built: list[Any] = []
    with e.kernel(built):
        t, b, w, p = (e.dim(name) for name in ("T", "B", "W", "P"))
        args = Operands(cfg, t, b, w, p)
        with e.root():
            args.view()
            tiles = e.let(t // tokens + b)
            with g.launch(tiles * units, THREADS if cut is None else cut.threads) as (number, thread):
                # later tiles of a sequence see more keys; they go first, so that the short ones fill the gaps at the end
                unit, tile_number = e.let(number % units), e.let(tiles - 1 - number // units)
                sequence, first = _find_tile(args, tile_number, tokens)
                tile: Tile | flash.FlashTile
                if cut is None:
                    tile = Tile(cfg, caps, args, tokens, thread, unit)
                else:
                    tile = flash.FlashTile(cfg, caps, args, cut, thread, unit)
                with g.when(sequence < b):
                    start = e.let(e.i64(args.query_start[sequence]))
                    length = e.let(e.i64(args.query_start[sequence + 1]) - start)
                    used = e.let(T.min(e.i64(tokens), length - first))
                    position = e.let(e.i64(args.context_len[sequence]) - length + first)
                    low = e.let(first_visible(cfg, position) // cfg.page_size * cfg.page_size)
                    tile.run(
                        e.let(start + first), used, e.let(sequence * w), low, e.let(position + used), position
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
    return e.let(found[0]), e.let(left[0] * tokens)


def attention_decode(cfg: AttentionConfig, caps: Capabilities, rope: RopeConfig | None = None) -> Any:
    """The PrimFunc of llmc.schedules.attention.attention_decode, for a machine with threads.

    Three launches: keys and values of the new tokens to their pages (with `rope`), pieces of the context, their merge.
    """
    units, splits, group = _units(cfg), cfg.splits, cfg.heads // cfg.kv_heads
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
            if ops is not None and args.slots is not None:
                with g.launch(b, ROPE_THREADS) as (token, thread):
                    append(ops, Pages(cfg, args.slots, args.k, args.v, args.layer, caps), token, thread)

            def row_base(sequence: Any, head: Any, split: Any) -> Any:
                pair = sequence * cfg.kv_heads + head // group
                return ((pair * splits + split) * group + head % group) * width

            with g.launch(b * units * splits, THREADS) as (number, thread):
                split, unit = e.let(number % splits), e.let(number // splits % units)
                sequence = e.let(number // (splits * units))
                low, per_split, high = _pieces(cfg, args, sequence)
                begin = e.let(low + split * per_split)
                end = e.let(T.min(high, begin + per_split))
                tile = Tile(cfg, caps, args, 1, thread, unit)
                with g.when(begin < end):
                    tile.start(sequence, e.i64(1))
                    tile.visit(e.let(sequence * w), begin, end, e.let(high - 1))
                    with T.If(per_split >= high - low):
                        with T.Then():
                            tile.finish()
                        with T.Else():
                            tile.store_partial(part, lambda head: row_base(sequence, head, split), width)
            with g.launch(b * cfg.heads, THREADS) as (number, thread):
                sequence, head = e.let(number // cfg.heads), e.let(number % cfg.heads)
                low, per_split, high = _pieces(cfg, args, sequence)
                with g.when(per_split < high - low):
                    pieces = e.let((high - low + per_split - 1) // per_split)
                    _merge(
                        cfg,
                        caps,
                        args,
                        part,
                        (lambda s: row_base(sequence, head, s)),
                        sequence,
                        head,
                        pieces,
                        thread,
                        width,
                    )
    return built[0]


def _pieces(cfg: AttentionConfig, args: Operands, sequence: Any) -> tuple[Any, Any, Any]:
    """(first key, keys per piece, end of keys): whole pages, at most `splits` pieces, none very small."""
    high = e.let(e.i64(args.context_len[sequence]))
    low = e.let(first_visible(cfg, high - 1) // cfg.page_size * cfg.page_size)
    least = -(-_MIN_SPLIT_KEYS // cfg.page_size) * cfg.page_size
    per = e.ceildiv(e.ceildiv(high - low, cfg.splits), cfg.page_size) * cfg.page_size
    return low, e.let(T.max(e.i64(least), per)), high


def _merge(
    cfg: AttentionConfig,
    caps: Capabilities,
    args: Operands,
    part: Any,
    row: Any,
    sequence: Any,
    head: Any,
    pieces: Any,
    thread: Any,
    width: int,
) -> None:
    """Combine the pieces of one head: sum_i e^(m_i - m) o_i / sum_i e^(m_i - m) l_i; every thread adds up for itself."""
    top, total = g.local(1), g.local(1)
    e.store(top, 0, e.f32(_EMPTY), 1)
    e.store(total, 0, e.f32(0.0), 1)
    with e.loop(pieces) as s:
        e.store(top, 0, T.max(top[0], part[row(s) + width - 16]), 1)
    with e.loop(pieces) as s:
        base = e.let(row(s))
        e.store(total, 0, total[0] + T.exp(part[base + width - 16] - top[0]) * part[base + width - 15], 1)
    factor = final_factor(cfg, args, e.let(top[0]), e.let(total[0]), head)

    def dim(d: Any) -> None:
        value = g.local(1)
        e.store(value, 0, e.f32(0.0), 1)
        with e.loop(pieces) as s:
            base = e.let(row(s))
            e.store(value, 0, value[0] + T.exp(part[base + width - 16] - top[0]) * part[base + d], 1)
        at = (sequence * cfg.heads + head) * cfg.value_dim + d
        e.store(args.out, at, g.narrow(e.let(value[0] * factor), cfg.dtype, caps), 1)

    g.strided(thread, cfg.value_dim, THREADS, dim)
