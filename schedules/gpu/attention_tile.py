"""Attention of some query rows over a range of keys, by one block of threads, with a running softmax.

As in schedules/attention_tile.py, rows are the query heads of one cached head for neighbouring tokens. Keys go in blocks of
as many as there are threads:

    1. a thread computes the scores of its key with all rows; neighbouring threads read neighbouring tokens of a key page
    2. a warp takes a row: new maximum, weights, sum (Milakov and Gimelshein 2018)
    3. a thread takes a dim of the value, for its share of the rows; neighbouring threads read neighbouring dims
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_tile import Operands
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.rope import rotate

THREADS = 128
KEYS = THREADS
_LOWEST = -1e30  # finite, so that the difference of two of them is 0 and not NaN
_MASKED = -1e29  # scores below were masked
_MOST_ROWS = 16


def heads_per_tile(cfg: AttentionConfig) -> int:
    """Query heads of one cached head that a tile takes: all of them if they are few, else a divisor of their number."""
    group = cfg.heads // cfg.kv_heads
    return next(n for n in range(min(group, _MOST_ROWS), 0, -1) if group % n == 0)


def tokens_per_tile(cfg: AttentionConfig, caps: Capabilities) -> int:
    """Query tokens of a prefill tile."""
    tokens = max(1, _MOST_ROWS // heads_per_tile(cfg))
    while tokens > 1 and shared_bytes(cfg, tokens * heads_per_tile(cfg)) > min(48 << 10, caps.shared_bytes):
        tokens //= 2
    return tokens


def shared_bytes(cfg: AttentionConfig, rows: int) -> int:
    """Shared memory of a tile."""
    return 4 * rows * (cfg.key_dim + KEYS + 3)


class Tile:
    """A tile's memory and steps; made inside the launch.

    Args:
        tokens: query tokens, neighbouring ones of a sequence.
        thread: number of the thread.
        unit: number of the (cached head, share of its query heads).
    """

    def __init__(
        self, cfg: AttentionConfig, caps: Capabilities, args: Operands, tokens: int, thread: Any, unit: Any
    ) -> None:
        self.cfg, self.caps, self.args, self.thread = cfg, caps, args, thread
        self.group, self.share = cfg.heads // cfg.kv_heads, heads_per_tile(cfg)
        self.rows, self.tokens = tokens * self.share, tokens
        shares = self.group // self.share
        self.kv_head = g.held(unit // shares)
        self.first_head = g.held(self.kv_head * self.group + unit % shares * self.share)
        # threads of a value's dims, and how many rows go side by side
        self.dims = 1
        while self.dims < min(cfg.value_dim, THREADS):
            self.dims *= 2
        self.side = THREADS // self.dims
        self.columns = -(-cfg.value_dim // self.dims)
        self.own_rows = -(-self.rows // self.side)
        self.query = g.shared(self.rows * cfg.key_dim, name="query")
        self.scores = g.shared(self.rows * KEYS, name="scores")
        self.largest = g.shared(self.rows, name="largest")
        self.total = g.shared(self.rows, name="total")
        self.factor = g.shared(self.rows, name="factor")
        self.acc = [[g.local(1) for _ in range(self.columns)] for _ in range(self.own_rows)]

    # -- set-up ------------------------------------------------------------------------------------------------------

    def start(self, first_token: Any, used: Any) -> None:
        """Load the queries of tokens [first_token, first_token + used) and clear the running softmax."""
        cfg, args = self.cfg, self.args
        self.first_token, self.used = first_token, used
        if args.rope is not None:

            def keep(number: Any, d: Any, value: Any) -> None:
                if cfg.dtype != "float32":  # as if the query had been stored in between
                    value = e.widen(e.let(g.narrow(e.let(value), cfg.dtype, self.caps)), cfg.dtype, 1)
                e.store(self.query, number * cfg.key_dim + d, value, 1)

            rotate(args.rope, 0, first_token, (self.first_head, self.share), self.thread, keep, THREADS)
        else:

            def load(i: Any) -> None:
                row, d = e.let(i // cfg.key_dim), e.let(i % cfg.key_dim)
                # rows behind the last token are computed too (from a copy of it) and never stored
                token = e.let(first_token + T.min(row // self.share, used - 1))
                head = e.let(self.first_head + row % self.share)
                at = token * cfg.heads + head if cfg.token_major else head * args.t + token
                e.store(self.query, i, e.widen(args.q[at * cfg.key_dim + d], cfg.dtype, 1), 1)

            g.strided(self.thread, self.rows * cfg.key_dim, THREADS, load)

        def clear(r: Any) -> None:
            e.store(self.largest, r, e.f32(_LOWEST), 1)
            e.store(self.total, r, e.f32(0.0), 1)

        g.strided(self.thread, self.rows, THREADS, clear)
        for row in self.acc:
            for register in row:
                e.store(register, 0, e.f32(0.0), 1)
        g.barrier()

    def run(self, first_token: Any, used: Any, table: Any, begin: Any, end: Any, position: Any) -> None:
        """Attention of tokens [first_token, first_token + used) to keys [begin, end); see `visit`."""
        self.start(first_token, used)
        self.visit(table, begin, end, position)
        self.finish()

    def decode(self, sequence: Any, begin: Any, end: Any, position: Any) -> None:
        """Attend with the one token of a sequence to keys [begin, end)."""
        self.start(sequence, e.i64(1))
        self.visit(e.let(sequence * self.args.width), begin, end, position)

    # -- keys --------------------------------------------------------------------------------------------------------

    def visit(self, table: Any, begin: Any, end: Any, position: Any) -> None:
        """Attend to keys [begin, end); the caller's loop is this one's.

        Args:
            table: where the sequence's row of the block table begins.
            position: of the first token in its sequence.
        """
        with e.loop(e.ceildiv(end - begin, KEYS)) as i:
            first = e.let(begin + i * KEYS)
            self._score(table, first, end, position)
            g.barrier()
            self._softmax()
            g.barrier()
            self._weigh(table, first, end)
            g.barrier()  # the next block overwrites the weights

    def _page(self, table: Any, key: Any, size: int) -> Any:
        """Element at which this layer's and head's part of a key's page begins."""
        cfg = self.cfg
        page = e.i64(self.args.block_table[table + key // cfg.page_size])
        return e.let(((page * cfg.layers + self.args.layer) * cfg.kv_heads + self.kv_head) * size)

    def _score(self, table: Any, first: Any, end: Any, position: Any) -> None:
        cfg = self.cfg
        key = e.let(first + self.thread)
        sums = [g.local(1) for _ in range(self.rows)]
        for s in sums:
            e.store(s, 0, e.f32(0.0), 1)
        with g.when(key < end):
            self._multiply(table, key, sums)
        for r, s in enumerate(sums):
            where = e.let(position + r // self.share)
            score = e.let(s[0] * e.f32(cfg.scale))
            if cfg.softcap:
                score = e.let(T.tanh(score * e.f32(1.0 / cfg.softcap)) * e.f32(cfg.softcap))
            if self.args.alibi is not None:
                slope = self.args.alibi[self.first_head + r % self.share]
                score = e.let(score + slope * T.Cast("float32", key - where))
            seen = T.And(key < end, key <= where)
            if cfg.window:
                seen = T.And(seen, where - key < cfg.window)
            if cfg.chunk:
                seen = T.And(seen, where // cfg.chunk == key // cfg.chunk)
            e.store(self.scores, r * KEYS + self.thread, T.Select(seen, score, e.f32(_LOWEST)), 1)

    def _multiply(self, table: Any, key: Any, sums: list[Any]) -> None:
        """Add a key's products with the rows to their sums."""
        cfg, ps = self.cfg, self.cfg.page_size
        base = e.let(self._page(table, key, cfg.key_dim * ps) + key % ps)
        with e.loop(cfg.key_dim) as d:
            value = e.let(e.widen(self.args.k[base + d * ps], cfg.kv_dtype, 1))
            for r, s in enumerate(sums):
                e.store(s, 0, s[0] + self.query[r * cfg.key_dim + d] * value, 1)

    def _value(self, table: Any, key: Any) -> Callable[[Any], Any]:
        """dim -> element of a key's value, float32."""
        cfg, ps = self.cfg, self.cfg.page_size
        if cfg.latent:  # a value is the beginning of the key, whose elements lie a page's tokens apart
            first = e.let(self._page(table, key, cfg.key_dim * ps) + key % ps)
            return lambda d: e.widen(self.args.k[first + d * ps], cfg.kv_dtype, 1)
        base = e.let(self._page(table, key, ps * cfg.value_dim) + key % ps * cfg.value_dim)
        return lambda d: e.widen(self.args.v[base + d], cfg.kv_dtype, 1)

    def _softmax(self) -> None:
        warps, per_lane = THREADS // g.WARP, KEYS // g.WARP
        lane, warp = e.let(self.thread % g.WARP), e.let(self.thread // g.WARP)
        for turn in range(-(-self.rows // warps)):
            row = e.let(warp + turn * warps)
            with g.when(row < self.rows):
                at = [e.let(row * KEYS + lane + j * g.WARP) for j in range(per_lane)]
                top, total = g.local(1), g.local(1)
                old = e.let(self.largest[row])
                e.store(top, 0, old, 1)
                for index in at:
                    e.store(top, 0, T.max(top[0], self.scores[index]), 1)
                g.warp_reduce(top, T.max)
                e.store(total, 0, e.f32(0.0), 1)
                for index in at:
                    score = e.let(self.scores[index])
                    masked = score <= e.f32(_MASKED)
                    weight = e.let(T.Select(masked, e.f32(0.0), T.exp(score - top[0])))
                    e.store(self.scores, index, weight, 1)
                    e.store(total, 0, total[0] + weight, 1)
                g.warp_reduce(total, g.add)
                g.warp_barrier()  # the old maximum is read by all lanes before
                with g.when(lane == 0):
                    factor = e.let(T.exp(old - top[0]))
                    e.store(self.factor, row, factor, 1)
                    e.store(self.total, row, self.total[row] * factor + total[0], 1)
                    e.store(self.largest, row, top[0], 1)

    def _own(self) -> tuple[Any, list[Any]]:
        """(the thread's first dim, its rows)."""
        first = e.let(self.thread // self.dims)
        rows = [e.let(T.min(first + i * self.side, self.rows - 1)) for i in range(self.own_rows)]
        return e.let(e.i64(self.thread % self.dims)), rows

    def _weigh(self, table: Any, first: Any, end: Any) -> None:
        cfg = self.cfg
        dim, rows = self._own()
        for row, registers in zip(rows, self.acc, strict=True):
            factor = e.let(self.factor[row])
            for register in registers:
                e.store(register, 0, register[0] * factor, 1)
        count = e.let(T.min(e.i64(KEYS), end - first))
        with e.loop(count) as i:
            key = e.let(first + i)
            element = self._value(table, key)
            for c in range(self.columns):
                d = e.let(dim + c * self.dims)
                with g.when(d < cfg.value_dim):
                    value = e.let(element(d))
                    for row, registers in zip(rows, self.acc, strict=True):
                        weight = self.scores[e.i64(row * KEYS) + i]
                        e.store(registers[c], 0, registers[c][0] + weight * value, 1)

    # -- results -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Normalise and store the rows of real tokens."""
        cfg = self.cfg
        dim, rows = self._own()
        for i, (row, registers) in enumerate(zip(rows, self.acc, strict=True)):
            head = e.let(self.first_head + row % self.share)
            with g.when(T.And(self._mine(i), row // self.share < self.used)):
                factor = final_factor(cfg, self.args, e.let(self.largest[row]), e.let(self.total[row]), head)
                token = e.let(self.first_token + row // self.share)
                base = e.let((token * cfg.heads + head) * cfg.value_dim)
                for c, register in enumerate(registers):
                    d = e.let(dim + c * self.dims)
                    with g.when(d < cfg.value_dim):
                        value = g.narrow(e.let(register[0] * factor), cfg.dtype, self.caps)
                        e.store(self.args.out, base + d, value, 1)

    def store_partial(self, part: Any, row_base: Any, width: int) -> None:
        """Rows of the tile, unnormalised, with their maxima and sums; one token.

        Args:
            row_base: head -> element of `part` at which its row begins.
        """
        dim, rows = self._own()
        for i, (row, registers) in enumerate(zip(rows, self.acc, strict=True)):
            with g.when(self._mine(i)):
                base = e.let(row_base(self.first_head + row))
                for c, register in enumerate(registers):
                    d = e.let(dim + c * self.dims)
                    with g.when(d < self.cfg.value_dim):
                        e.store(part, base + d, register[0], 1)
                with g.when(dim == 0):
                    e.store(part, base + width - 16, self.largest[row], 1)
                    e.store(part, base + width - 15, self.total[row], 1)

    def _mine(self, i: int) -> Any:
        """Whether the thread's row i exists (it is a copy of the last one if not)."""
        return self.thread // self.dims + i * self.side < self.rows


def final_factor(cfg: AttentionConfig, args: Operands, largest: Any, total: Any, head: Any) -> Any:
    """What the unnormalised output is multiplied with: 1 / (l + e^(sink - m)), stable for a large sink."""
    if args.sinks is None:
        return e.let(e.f32(1.0) / total)
    sink = e.let(e.widen(args.sinks[head], cfg.sinks_dtype, 1))
    top = e.let(T.max(largest, sink))
    scale = e.let(T.exp(largest - top))
    return e.let(scale / (total * scale + T.exp(sink - top)))
