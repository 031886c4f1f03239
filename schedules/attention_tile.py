"""The attention template: a tile of query rows against a block of cache pages, with a running softmax.

Rows of a tile are the G query heads of one kv head for `tokens` neighbouring tokens: row = token * G + g. For each block
of pages (Milakov and Gimelshein 2018; Dao et al. 2022, "FlashAttention"):

    S = Q K          scores, lanes over tokens of the dim-major key page
    m' = max(m, S);  P = exp(S - m');  l = l e^(m-m') + sum P;  O = O e^(m-m')
    O += P V         lanes over the dims of the token-major value page

Prefill and decode use the same four steps. They differ in where the pages' vectors come from: prefill has many rows and
first lays a block out in scratch memory as the multiply wants it; decode has few rows and converts in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.kv_plan import padded
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig, DecodeSchedule, PrefillSchedule
from llmc.schedules.attention_pages import PageReader, in_groups
from llmc.schedules.attention_pools import Pools
from llmc.schedules.attention_softmax import LOWEST, RunningSoftmax, first_visible
from llmc.schedules.matrix_tile import multiply_bf16
from llmc.schedules.rope import RopeOperands, rotate_query
from llmc.schedules.vmath import exp_nonpositive

__all__ = ["Operands", "Tile", "can_be_direct", "first_visible", "uses_dot"]


class Operands:
    """Flat views of an attention kernel's arguments, and the layer index."""

    def __init__(
        self, cfg: AttentionConfig, t: Any, b: Any, w: Any, pages: Any, rope: RopeOperands | None = None
    ) -> None:
        hk, layers = cfg.kv_heads, cfg.layers
        self.t, self.b, self.width, self.cfg = t, b, w, cfg
        self._pages = pages
        q_shape = [1, t, cfg.heads, cfg.key_dim] if cfg.token_major else [1, cfg.heads, t, cfg.key_dim]
        self._operands = rope
        self.rope = None if rope is None or rope.cfg.q is None else rope  # takes the place of q
        self._q = e.tensor("q", q_shape, cfg.dtype) if self.rope is None else None
        appends = rope is not None and rope.cfg.k is not None
        self._slot = e.tensor("slot", [t], "int32") if appends else None
        self._k = e.tensor("k_pool", [pages, layers, hk, *cfg.k_page], cfg.pool_dtype)
        v_shape = [pages, layers, hk, *cfg.v_page]
        self._v = None if cfg.latent else e.tensor("v_pool", v_shape, cfg.pool_dtype)
        self._start = e.tensor("query_start", [b + 1], "int32")
        self._context = e.tensor("context_len", [b], "int32")
        self._table = e.tensor("block_table", [b, w], "int32")
        self._sinks = e.tensor("sinks", [cfg.heads], cfg.sinks_dtype) if cfg.has_sinks else None
        self._alibi = e.tensor("alibi", [cfg.heads], "float32") if cfg.has_alibi else None
        self.layer = e.scalar_arg("layer")
        self._out = e.tensor("out", [1, t, cfg.heads, cfg.value_dim], cfg.dtype)

    def view(self) -> None:
        """Make the flat views; inside the root block."""
        cfg, t = self.cfg, self.t
        self.q = e.flat(self._q, t * cfg.heads * cfg.key_dim) if self._q is not None else None
        if self._operands is not None:
            self._operands.view()
        self.slots = e.flat(self._slot, t) if self._slot is not None else None
        self.pools = Pools(cfg, self._pages, self._k, self._v)
        self.k, self.v = self.pools.k, self.pools.v
        if cfg.latent and cfg.kv_dtype == "bfloat16":
            size = self._pages * cfg.layers * cfg.kv_heads * cfg.k_part
            self.k_pairs = e.flat(self._k, size // 2, "int32")  # of neighbouring tokens
        self.query_start = e.flat(self._start, self.b + 1)
        self.context_len = e.flat(self._context, self.b)
        self.block_table = e.flat(self._table, self.b * self.width)
        self.sinks = e.flat(self._sinks, cfg.heads) if cfg.has_sinks else None
        self.alibi = e.flat(self._alibi, cfg.heads) if cfg.has_alibi else None
        self.out = e.flat(self._out, t * cfg.heads * cfg.value_dim)


class Tile(PageReader, RunningSoftmax):
    """Geometry, scratch memory and the steps for one tile; `start` and what follows inside the task's loop.

    Args:
        tokens: most query tokens of the tile.
        pages: cache pages per block.
        schedule: row_tile and vectors of the register tiles.
        direct: read pages in place instead of laying them out in scratch; needs `can_be_direct`.
        heads: neighbouring cached heads of the tile; several only with `direct`. Rows of one follow those of another.
    """

    def __init__(
        self,
        cfg: AttentionConfig,
        caps: Capabilities,
        args: Operands,
        tokens: int,
        pages: int,
        schedule: PrefillSchedule | DecodeSchedule,
        direct: bool,
        heads: int = 1,
    ) -> None:
        self.cfg, self.caps, self.args = cfg, caps, args
        self.lanes = caps.lanes_f32
        self.dot = uses_dot(cfg, caps)
        self.pages, self.direct = pages, direct and can_be_direct(cfg, caps)
        self.heads, self.row = heads, e.i64(0)
        self.group = cfg.heads // cfg.kv_heads
        self.block = pages * cfg.page_size
        self.vectors = schedule.vectors or (4 if caps.vector_registers >= 32 else 2)
        self.rows = tokens * self.group
        # operands of matrix instructions take registers too
        most = 4 if self.dot and caps.has_bf16_mma else schedule.row_tile
        groups = -(-self.rows // min(schedule.row_tile, most))
        self.row_tile = -(-self.rows // groups)
        self.rows_padded = -(-self.rows // self.row_tile) * self.row_tile
        self.pack = 2 if self.dot else 1
        self.k_steps = -(-(padded(cfg.key_dim) if cfg.coded else cfg.key_dim) // self.pack)
        self.value_width = -(-cfg.value_dim // self.lanes) * self.lanes

    @staticmethod
    def import_text(caps: Capabilities) -> dict[str, Any]:
        """Annotations for the loop over tasks."""
        return e.import_text(caps)

    def _allocate(self) -> None:
        """Take scratch memory from the task's thread."""
        operand = "int32" if self.dot else "float32"
        state = self.heads * self.rows_padded
        self.query = e.workspace(state * self.k_steps, operand)
        self.scores = e.workspace(self.rows_padded * self.block)
        self.weights = e.workspace(self.rows_padded * self.block // self.pack, operand)
        self.out = e.workspace(state * self.value_width)
        self.largest = e.workspace(state)
        self.total = e.workspace(state * self.lanes)
        if not self.direct:
            self.keys = e.workspace(self.k_steps * self.block, operand)
            self.values = e.workspace(self.block // self.pack * self.value_width, operand)

    # -- set-up and result -------------------------------------------------------------------------------------------

    @contextmanager
    def each_head(self) -> Iterator[None]:
        """A loop over the cached heads: `kv_head` is the one, `row` its first row."""
        with e.loop_or_once(self.heads) as h:
            self.kv_head = e.let(self.first_head + h) if self.heads > 1 else self.first_head
            self.row = e.let(h * self.rows_padded) if self.heads > 1 else e.i64(0)
            yield

    def start(self, first_token: Any, kv_head: Any, rows: Any) -> None:
        """Load the query rows of `kv_head` and what further heads the tile has, and clear the running softmax."""
        self.first_head, self.used = kv_head, rows
        self._allocate()
        with self.each_head():
            self._start_head(first_token, self.kv_head, rows)

    def _start_head(self, first_token: Any, kv_head: Any, rows: Any) -> None:
        cfg, args, lanes = self.cfg, self.args, self.lanes
        source = args.q
        if args.rope is not None:  # one token: its heads are rotated here
            source = e.workspace(self.group * cfg.key_dim, e.storage(cfg.dtype))
            with e.loop(self.group) as g:
                head = e.let(kv_head * self.group + g)
                rotate_query(args.rope, first_token, head, source, e.let(g * cfg.key_dim))
        with e.loop(self.rows_padded) as r:
            # rows behind the last are computed too (from a copy of the last one) and never stored
            row = e.let(T.min(r, rows - 1))
            token = e.let(first_token + row // self.group)
            head = e.let(kv_head * self.group + row % self.group)
            if args.rope is not None:
                base = e.let(row % self.group * cfg.key_dim)
            elif cfg.token_major:
                base = e.let((token * cfg.heads + head) * cfg.key_dim)
            else:
                base = e.let((head * args.t + token) * cfg.key_dim)
            at = e.let(self.row + r)
            self._load_query(source, base, at)
            e.store(self.largest, at, e.f32(LOWEST), 1)
            e.store(self.total, at * lanes, e.splat(0.0, lanes), lanes)
            self._clear(at)

    def _clear(self, row: Any) -> None:
        """The sums of a row."""
        lanes = self.lanes
        with e.loop(self.value_width // lanes) as v:
            e.store(self.out, row * self.value_width + v * lanes, e.splat(0.0, lanes), lanes)

    def _load_query(self, source: Any, base: Any, r: Any) -> None:
        """Row r of the tile from the head at source[base:]."""
        lanes, at = self.lanes, e.let(r * self.k_steps)
        # pairs lie in memory as they are wanted; else vectors of one element per lane
        wide = 2 * lanes if self.dot else lanes
        vectors = 0 if self.dot and self.cfg.key_dim % 2 else self.cfg.key_dim // wide
        with e.loop(vectors) as i:
            value = e.load(source, base + i * wide, wide)
            value = T.reinterpret(e.vec("int32", lanes), value) if self.dot else self._wide(value, lanes)
            e.store(self.query, at + i * lanes, value, lanes)
        with e.loop(vectors * lanes, self.k_steps) as j:
            e.store(self.query, at + j, self._query_operand(source, base, j), 1)

    def _wide(self, value: Any, lanes: int) -> Any:
        return e.widen(value, self.cfg.dtype, lanes)

    def _query_operand(self, source: Any, base: Any, j: Any) -> Any:
        if not self.dot:
            return self._wide(source[base + j], 1)
        low = tirx.Cast("int32", source[base + 2 * j])
        if self.cfg.key_dim % 2 == 0:
            high = tirx.Cast("int32", source[base + 2 * j + 1])
        else:
            at = T.min(2 * j + 1, e.i64(self.cfg.key_dim - 1))
            high = tirx.Cast("int32", source[base + at])
            high = tirx.Select(2 * j + 1 < self.cfg.key_dim, high, tirx.IntImm("int32", 0))
        return T.bitwise_or(low, T.shift_left(high, tirx.IntImm("int32", 16)))

    def finish(self, first_token: Any) -> None:
        """Divide by the softmax's denominator and store the tile's rows."""
        cfg, lanes = self.cfg, self.lanes
        with self.each_head(), e.loop(self.used) as r:
            at = e.let(self.row + r)
            head = e.let(self.kv_head * self.group + r % self.group)
            total = e.let(e.fold(e.load(self.total, at * lanes, lanes), lanes, lambda a, b: a + b))
            factor = self.final_factor(self.largest[at], total, head)
            base = e.let(((first_token + r // self.group) * cfg.heads + head) * cfg.value_dim)
            buffer, first = self.row_sums(at)
            self.store_row(base, first, buffer, factor)

    def row_sums(self, row: Any) -> tuple[Any, Any]:
        """(buffer, element) where the unnormalised sums of a row begin."""
        return self.out, row * self.value_width

    def final_factor(self, largest: Any, total: Any, head: Any) -> Any:
        """What the unnormalised output is multiplied with: 1 / (l + e^(sink - m)), stable for a large sink."""
        if self.args.sinks is None:
            return e.let(e.f32(1.0) / total)
        sink = e.let(e.widen(self.args.sinks[head], self.cfg.sinks_dtype, 1))
        top = e.let(T.max(largest, sink))
        scale = e.let(exp_nonpositive(largest - top, 1))
        return e.let(scale / (total * scale + exp_nonpositive(sink - top, 1)))

    def store_row(self, base: Any, source: Any, buffer: Any, factor: Any) -> None:
        """out[base : base + value_dim] = buffer[source : ...] * factor."""
        cfg, lanes, caps = self.cfg, self.lanes, self.caps
        whole = cfg.value_dim // lanes
        for v in range(whole):
            value = e.load(buffer, source + v * lanes, lanes) * e.splat(factor, lanes)
            e.store(self.args.out, base + v * lanes, e.narrow(value, cfg.dtype, lanes, caps), lanes)
        for d in range(whole * lanes, cfg.value_dim):
            value = buffer[source + d] * factor
            e.store(self.args.out, base + d, e.narrow(value, cfg.dtype, 1, caps), 1)

    # -- one block ---------------------------------------------------------------------------------------------------

    def visit(self, table: Any, first_key: Any, end_key: Any, first_position: Any) -> None:
        """Attend to keys [first_key, min(first_key + block, end_key)); first_key lies on a page boundary.

        Args:
            table: where the sequence's row of the block table begins.
            first_position: position of the tile's first token in its sequence.
        """
        keys = e.let(T.min(e.i64(self.block), end_key - first_key))
        page = e.let(table + first_key // self.cfg.page_size)
        if self.direct:
            last_page = e.let(table + (end_key - 1) // self.cfg.page_size)
            with self.each_head():
                self._score_pages(page, keys, last_page)
                self._softmax(first_key, first_position, keys)
                self._weigh_pages(page, keys, last_page)
        else:
            self._lay_out_keys(page, keys)
            self._each_tile(
                self.block // self.lanes,
                self.k_steps,
                self.query,
                self.k_steps,
                self._laid_out_keys,
                self.scores,
                self.block,
                clear=True,
            )
            self._softmax(first_key, first_position, keys)
            self._lay_out_values(page, keys)
            self._each_tile(
                self.value_width // self.lanes,
                e.ceildiv(keys, self.pack),
                self.weights,
                self.block // self.pack,
                self._laid_out_values,
                self.out,
                self.value_width,
                clear=False,
            )

    def _page_base(self, page: Any, size: int, kv_head: Any = None) -> Any:
        """Element at which this layer's and a head's part of a page begins; None = the head that is gone through."""
        cfg = self.cfg
        index = e.i64(self.args.block_table[page])
        head = self.kv_head if kv_head is None else kv_head
        return e.let(((index * cfg.layers + self.args.layer) * cfg.kv_heads + head) * size)

    def _each_tile(
        self,
        vectors: int,
        steps: Any,
        left: Any,
        left_stride: int,
        right: Callable[[Any, Any, int], list[Any]],
        target: Any,
        target_stride: int,
        clear: bool,
    ) -> None:
        """target[rows, vectors] (+)= left[rows, steps] x right[steps, vectors], in register tiles."""
        with e.loop(e.ceildiv(self.used, self.row_tile)) as group:
            row = e.let(group * self.row_tile)

            def body(first: Any, count: int, row: Any = row) -> None:
                at = lambda r, v: (row + r) * target_stride + (first + v) * self.lanes  # noqa: E731
                self._tile(
                    count,
                    steps,
                    lambda r, j, n=1: e.some(left, (row + r) * left_stride + j, n),
                    lambda j, v, n: right(j, first + v, n),
                    target,
                    at,
                    clear,
                )

            in_groups(vectors, self.vectors, body)

    def _tile(
        self,
        vectors: int,
        steps: Any,
        left: Callable[..., Any],
        right: Callable[[Any, int, int], list[Any]],
        target: Any,
        at: Callable[[int, int], Any],
        clear: bool,
        last: Callable[[int], Any] | None = None,
    ) -> None:
        """One register tile.

        left(row, step) is an element, left(row, step, 2) also the one of the next step; right(step, v, n) are vectors v to
        v + n - 1. `last` gives the vectors of one more step after `steps` (an unpaired token).
        """
        lanes = self.lanes
        acc = [[e.scratch(lanes) for _ in range(vectors)] for _ in range(self.row_tile)]
        for r in range(self.row_tile):
            for v in range(vectors):
                value = e.splat(0.0, lanes) if clear else e.load(target, at(r, v), lanes)
                e.store(acc[r][v], 0, value, lanes)

        def step(j: Any, operands: list[Any]) -> None:
            right_vectors = [e.let(vector) for vector in operands]
            for r in range(self.row_tile):
                a = e.let(e.splat(left(r, j), lanes))
                for v in range(vectors):
                    c = e.load(acc[r][v], 0, lanes)
                    b = right_vectors[v]
                    e.store(acc[r][v], 0, e.dot_bf16(c, a, b) if self.dot else c + a * b, lanes)

        if self.dot and self.caps.has_bf16_mma and self.row_tile > 1 and last is None:
            multiply_bf16(acc, steps, lambda r, j: left(r, j, 2), lambda j, v: right(j, v, 1)[0])
            if not isinstance(steps, int) or steps % 2:
                with T.If(e.i64(steps) % 2 == 1), T.Then():
                    step(steps - 1, right(steps - 1, 0, vectors))
        else:
            with e.loop(steps) as j:
                step(j, right(j, 0, vectors))
        if last is not None:
            step(steps, [last(v) for v in range(vectors)])
        for r in range(self.row_tile):
            for v in range(vectors):
                e.store(target, at(r, v), e.load(acc[r][v], 0, lanes), lanes)


def uses_dot(cfg: AttentionConfig, caps: Capabilities) -> bool:
    """True if both products run on bf16 pairs; queries of a wider type are not rounded for that."""
    return caps.has_bf16_dot and cfg.dtype == "bfloat16" and (cfg.coded or cfg.kv_dtype == "bfloat16")


def can_be_direct(cfg: AttentionConfig, caps: Capabilities) -> bool:
    """True if whole vectors cover a page: no tail to pad."""
    return cfg.value_dim % caps.lanes_f32 == 0 and (cfg.key_dim % 2 == 0 or not uses_dot(cfg, caps))
