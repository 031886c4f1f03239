"""Attention over a paged KV cache: append, prefill, decode."""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.kv_plan import ITEM_BYTES
from llmc.schedules import emit as e
from llmc.schedules.attention_bytes import BytesTile, takes_bytes
from llmc.schedules.attention_codes import CodedTile, CodedUnitTile
from llmc.schedules.attention_config import AttentionConfig, DecodeSchedule, PrefillSchedule
from llmc.schedules.attention_latent import LatentTile
from llmc.schedules.attention_pools import Pools
from llmc.schedules.attention_tile import Operands, Tile, can_be_direct, first_visible
from llmc.schedules.kv_codes import HeadWriter
from llmc.schedules.norm import along
from llmc.schedules.rope import RopeConfig, RopeOperands, append_all
from llmc.schedules.tile_attention import UnitTile, attention_unit
from llmc.schedules.vmath import exp_nonpositive

__all__ = ["AttentionConfig", "attention_decode", "attention_prefill", "kv_append", "partial_shape"]

_LATENT_KEYS = 64
_EMPTY = -1e30  # running maximum of a piece of context without keys
# of decode of several sequences, whose lengths differ: a context is cut into no more pieces than that takes
_TASKS_PER_THREAD = 4
_PIECE_BYTES = 16 << 10  # of a page that is read as one; longer ones are hardly faster
_SERIAL_TOKENS = 4  # appending this few tokens costs less than a parallel launch


def kv_append(cfg: AttentionConfig, caps: Capabilities) -> Any:
    """The PrimFunc (k[1,hk,T,dk], v[1,hk,T,dv], slot i32[T], k_pool, v_pool, layer: int64); pools in place.

    Of latents there is no v and no v_pool. Token t goes to page slot[t] // page_size at offset slot[t] % page_size.
    """
    hk, dk, dv = cfg.kv_heads, cfg.key_dim, cfg.value_dim
    built: list[Any] = []
    with e.kernel(built):
        t, pages = e.dim("T"), e.dim("P")
        k = e.tensor("k", [1, hk, t, dk], cfg.dtype)
        v = None if cfg.latent else e.tensor("v", [1, hk, t, dv], cfg.dtype)
        slot = e.tensor("slot", [t], "int32")
        k_pool = e.tensor("k_pool", [pages, cfg.layers, hk, *cfg.k_page], cfg.pool_dtype)
        v_pool = (
            None if cfg.latent else e.tensor("v_pool", [pages, cfg.layers, hk, *cfg.v_page], cfg.pool_dtype)
        )
        layer = e.scalar_arg("layer")
        with e.root():
            kf, vf = e.flat(k, hk * t * dk), None if v is None else e.flat(v, hk * t * dv)
            slots = e.flat(slot, t)
            pools = Pools(cfg, pages, k_pool, v_pool)

            def convert(value: Any, n: int) -> Any:
                if cfg.dtype == cfg.kv_dtype:
                    return value
                return e.narrow(e.let(e.widen(value, cfg.dtype, n)), cfg.kv_dtype, n, caps)

            def keep(line: Any, source: Any, base: Any, at: Any, n: int) -> None:
                e.store(line, at, e.widen(e.some(source, base + at, n), cfg.dtype, n), n)

            def head_of_token(head: Any, token: Any) -> None:
                to = HeadWriter(cfg, caps, pools, e.let(e.i64(slots[token])), layer, head)
                row = e.let(head * t + token)
                if cfg.coded:
                    for source, dim, write in ((kf, dk, to.coded_key), (vf, dv, to.coded_value)):
                        line = e.workspace(dim)
                        along(dim, caps, partial(keep, line, source, row * dim))
                        write(line)
                    return
                to.key(lambda d: convert(kf[row * dk + d], 1))
                if cfg.latent:
                    return
                value = lambda at, n: convert(e.some(vf, row * dv + at, n), n)  # noqa: E731
                to.value(lambda store: along(dv, caps, lambda at, n: store(at, value(at, n), n)))

            with T.If(t <= _SERIAL_TOKENS):
                # the annotation of a parallel loop brings in the conversion functions; a serial loop needs it too
                with T.Then(), e.loop(hk * t, annotations=e.import_text(caps)) as i:
                    head_of_token(e.let(i // t), e.let(i % t))
                with T.Else(), e.parallel(hk * t, caps) as i:
                    head_of_token(e.let(i // t), e.let(i % t))
    return built[0]


def attention_prefill(cfg: AttentionConfig, caps: Capabilities) -> Any:
    """The PrimFunc (q[1,h,T,dk], k_pool, v_pool, query_start i32[B+1], context_len i32[B], block_table i32[B,W],
    [sinks[h]], [alibi f32[h]], layer: int64, out[1,T,h,dv]).

    A task is a tile of one sequence's tokens and one cached head; tiles are numbered through all sequences.
    """
    built: list[Any] = []
    with e.kernel(built):
        t, b, w, p = (e.dim(name) for name in ("T", "B", "W", "P"))
        args = Operands(cfg, t, b, w, p)
        with e.root():
            args.view()
            cfg.prefill.emit(t, lambda schedule, _: _prefill(cfg, caps, args, schedule))
    return built[0]


def _prefill(cfg: AttentionConfig, caps: Capabilities, args: Operands, schedule: PrefillSchedule) -> None:
    group = cfg.heads // cfg.kv_heads
    tokens = max(1, schedule.tile_rows // group)
    pages = _pages(cfg, schedule.keys)
    count = e.scratch(1, "int64")
    e.store(count, 0, e.i64(0), 1)
    with e.loop(args.b) as i:
        e.store(count, 0, count[0] + _tiles(args, i, tokens), 1)
    tiles = e.let(count[0])
    unit = attention_unit(cfg, caps)
    extent = tiles * cfg.kv_heads
    text = str(e.import_text(caps).get("pragma_import_llvm", ""))
    with e.parallel(extent, caps) if unit is None else unit.launch(extent, text) as task:
        kv_head = e.let(task // tiles)
        order = e.let(task % tiles)
        # late tiles see more keys: alternate, so that neighbouring tasks cost the same on average
        number = e.let(T.Select(order % 2 == 0, order // 2, tiles - 1 - order // 2))
        sequence, first = _find_tile(args, number, tokens)
        start = e.let(e.i64(args.query_start[sequence]))
        length = e.let(e.i64(args.query_start[sequence + 1]) - start)
        used = e.let(T.min(e.i64(tokens), length - first))
        position = e.let(e.i64(args.context_len[sequence]) - length + first)
        if unit is None:
            kind = LatentTile if cfg.latent else CodedTile if cfg.coded else Tile
            tile = kind(cfg, caps, args, tokens, pages, schedule, direct=False)
        else:
            tile = (CodedUnitTile if cfg.coded else UnitTile)(unit, cfg, caps, args, tokens, pages, schedule)
        tile.start(e.let(start + first), kv_head, e.let(used * group))
        low = e.let(first_visible(cfg, position) // cfg.page_size * cfg.page_size)
        high = e.let(position + used)
        table = e.let(sequence * args.width)
        with e.loop(e.ceildiv(high - low, tile.block)) as i:
            tile.visit(table, e.let(low + i * tile.block), high, position)
        tile.finish(e.let(start + first))


def _pages(cfg: AttentionConfig, keys: int) -> int:
    """Cache pages per block of about `keys` keys, whose number is a multiple of 32."""
    if cfg.latent:  # laid out for all heads, a block should stay in a near cache
        keys = min(keys, _LATENT_KEYS)
    pages = max(1, keys // cfg.page_size)
    return pages * 2 if pages * cfg.page_size % 32 else pages


def _tiles(args: Operands, sequence: Any, tokens: int) -> Any:
    """Number of tiles of a sequence."""
    return e.ceildiv(e.i64(args.query_start[sequence + 1]) - e.i64(args.query_start[sequence]), tokens)


def _find_tile(args: Operands, number: Any, tokens: int) -> tuple[Any, Any]:
    """(sequence, its token at which tile `number` begins)."""
    found, left = e.scratch(1, "int64"), e.scratch(1, "int64")
    e.store(found, 0, e.i64(0), 1)
    e.store(left, 0, number, 1)
    with T.While(left[0] >= _tiles(args, found[0], tokens)):
        e.store(left, 0, left[0] - _tiles(args, found[0], tokens), 1)
        e.store(found, 0, found[0] + 1, 1)
    return e.let(found[0]), e.let(left[0] * tokens)


def _partial_width(cfg: AttentionConfig) -> int:
    """float32 values per row of a partial result: the output, padded to any vector width, its maximum and its sum."""
    return -(-cfg.value_dim // 16) * 16 + 16


def partial_shape(cfg: AttentionConfig) -> tuple[int, ...]:
    """Shape behind B of attention_decode's scratch output (float32)."""
    return (cfg.kv_heads, cfg.splits, cfg.heads // cfg.kv_heads, _partial_width(cfg))


def attention_decode(cfg: AttentionConfig, caps: Capabilities, rope: RopeConfig | None = None) -> Any:
    """The PrimFunc with attention_prefill's arguments and one more output, partial f32[B, *partial_shape(cfg)].

    T == B: one new token per sequence. A task is one sequence, one cached head and one piece of the context; the pieces'
    results are merged by their maxima and sums afterwards.

    With `rope`, the arguments of rope_append up to the slots take the place of q: the kernel rotates, and appends first.
    """
    group = cfg.heads // cfg.kv_heads
    built: list[Any] = []
    with e.kernel(built):
        b, w, p = (e.dim(name) for name in ("B", "W", "P"))
        ops = RopeOperands(rope, caps, b) if rope is not None else None
        args = Operands(cfg, b, b, w, p, ops)
        partial = e.tensor("partial", [b, *partial_shape(cfg)], "float32")
        with e.root():
            args.view()
            width = _partial_width(cfg)
            part = e.flat(partial, b * cfg.kv_heads * cfg.splits * group * width)
            if ops is not None and args.slots is not None:
                append_all(ops, args.slots, args.pools, args.layer)
            cfg.decode.emit(b, lambda schedule, _: _decode(cfg, caps, args, schedule, part, width))
    return built[0]


def _decode(
    cfg: AttentionConfig, caps: Capabilities, args: Operands, schedule: DecodeSchedule, part: Any, width: int
) -> None:
    group = cfg.heads // cfg.kv_heads
    pages = _pages(cfg, schedule.keys)
    heads = _heads_together(cfg, caps)
    groups = cfg.kv_heads // heads
    pairs = e.let(args.b * groups)
    several = _TASKS_PER_THREAD * caps.threads
    even = groups % caps.threads == 0 or caps.threads % groups == 0
    wanted = e.let(T.Select(args.b == 1, e.i64(caps.threads if even else several), e.i64(several)))
    most = e.let(T.max(e.i64(1), T.min(e.i64(cfg.splits), T.truncdiv(pairs + (wanted - 1), pairs))))
    # neighbouring tasks, which one thread takes, are of different sequences: long ones are shared out
    kind = _decode_tile(cfg, caps)
    with T.parallel(pairs * most, annotations=kind.import_text(caps)) as task:
        sequence = e.let(T.truncmod(task, args.b))
        rest = e.let(T.truncdiv(task, args.b))
        split, kv_head = e.let(T.truncmod(rest, most)), e.let(T.truncdiv(rest, most) * heads)
        low, per_split, high = _pieces(cfg, args, schedule, sequence, most)
        begin = e.let(low + split * per_split)
        end = e.let(T.min(high, begin + per_split))
        with T.If(begin < end), T.Then():
            tile = kind(cfg, caps, args, 1, pages, schedule, direct=True, heads=heads)
            table = e.let(sequence * args.width)
            tile.first_head = kv_head
            tile.fetch_first(table, begin, end)
            tile.start(sequence, kv_head, e.i64(group))
            with e.loop(e.ceildiv(end - begin, tile.block)) as i:
                tile.visit(table, e.let(begin + i * tile.block), end, e.let(high - 1))
            with T.If(per_split >= high - low):
                with T.Then():
                    tile.finish(sequence)
                with T.Else(), tile.each_head():
                    row = ((sequence * cfg.kv_heads + tile.kv_head) * cfg.splits + split) * group
                    _store_partial(tile, part, e.let(row), width)
    with e.loop(args.b * cfg.kv_heads) as i:
        low, per_split, high = _pieces(cfg, args, schedule, e.let(i // cfg.kv_heads), most)
        with T.If(per_split < high - low), T.Then():
            tile = kind(cfg, caps, args, 1, pages, schedule, direct=True)
            _merge(tile, part, i, e.let(e.ceildiv(high - low, per_split)), width)


def _decode_tile(cfg: AttentionConfig, caps: Capabilities) -> type[Tile]:
    if cfg.latent:
        return LatentTile
    if not cfg.coded:
        return Tile
    return BytesTile if takes_bytes(cfg, caps) else CodedTile


def _heads_together(cfg: AttentionConfig, caps: Capabilities) -> int:
    """How many neighbouring cached heads a task of decode takes.

    Their parts of a page are one piece of memory, and several pieces of a few KB are slower than a long one. There are no fewer
    groups of heads than threads, lest a context has to be cut.
    """
    if not can_be_direct(cfg, caps):
        return 1
    part = cfg.k_part * ITEM_BYTES[cfg.kv_dtype]
    fitting = [
        n
        for n in range(1, cfg.kv_heads + 1)
        if cfg.kv_heads % n == 0 and cfg.kv_heads // n >= caps.threads and n * part <= _PIECE_BYTES
    ]
    return max(fitting, default=1)


def _pieces(
    cfg: AttentionConfig, args: Operands, schedule: DecodeSchedule, sequence: Any, most: Any
) -> tuple[Any, Any, Any]:
    """(first key, keys per piece, end of keys): whole pages, at most `most` pieces, none very small."""
    high = e.let(e.i64(args.context_len[sequence]))
    low = e.let(first_visible(cfg, high - 1) // cfg.page_size * cfg.page_size)
    least = -(-schedule.least_keys // cfg.page_size) * cfg.page_size
    per = e.ceildiv(e.let(T.truncdiv(high - low + (most - 1), most)), cfg.page_size) * cfg.page_size
    return low, e.let(T.max(e.i64(least), per)), high


def _store_partial(tile: Tile, part: Any, first_row: Any, width: int) -> None:
    lanes = tile.lanes
    with e.loop(tile.group) as g:
        base, row = e.let((first_row + g) * width), e.let(tile.row + g)
        buffer, first = tile.row_sums(row)
        for v in range(tile.value_width // lanes):
            value = e.load(buffer, first + v * lanes, lanes)
            e.store(part, base + v * lanes, value, lanes)
        total = e.fold(e.load(tile.total, row * lanes, lanes), lanes, lambda x, y: x + y)
        e.store(part, base + width - 16, tile.largest[row], 1)
        e.store(part, base + width - 15, total, 1)


def _merge(tile: Tile, part: Any, pair: Any, pieces: Any, width: int) -> None:
    """Combine the pieces of one sequence and cached head: sum_i e^(m_i - m) o_i / sum_i e^(m_i - m) l_i."""
    cfg, lanes, group = tile.cfg, tile.lanes, tile.group
    vectors = tile.value_width // lanes
    sequence, kv_head = e.let(pair // cfg.kv_heads), e.let(pair % cfg.kv_heads)
    with e.loop(group) as g:
        top, total = e.scratch(1), e.scratch(1)
        acc = e.workspace(tile.value_width)
        row = lambda s: ((pair * cfg.splits + s) * group + g) * width  # noqa: E731
        e.store(top, 0, e.f32(_EMPTY), 1)
        e.store(total, 0, e.f32(0.0), 1)
        for v in range(vectors):
            e.store(acc, v * lanes, e.splat(0.0, lanes), lanes)
        with e.loop(pieces) as s:
            e.store(top, 0, T.max(top[0], part[row(s) + width - 16]), 1)
        with e.loop(pieces) as s:
            base = e.let(row(s))
            factor = e.let(exp_nonpositive(part[base + width - 16] - top[0], 1))
            e.store(total, 0, total[0] + factor * part[base + width - 15], 1)
            for v in range(vectors):
                value = e.load(part, base + v * lanes, lanes) * e.splat(factor, lanes)
                e.store(acc, v * lanes, e.load(acc, v * lanes, lanes) + value, lanes)
        head = e.let(kv_head * group + g)
        factor = tile.final_factor(e.let(top[0]), e.let(total[0]), head)
        base = e.let((sequence * cfg.heads + head) * cfg.value_dim)
        tile.store_row(base, e.i64(0), acc, factor)
