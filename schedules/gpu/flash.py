"""Prefill attention on the matrix units (Dao 2023, "FlashAttention-2"): scores and weights never leave registers.

A block of threads takes 64 query rows, a warp 16 of them, and 32 keys at a time. Key pages are dim-major and value pages
token-major, so both are second operands that ldmatrix transposes on the way; the weights of one matmul are the first operand
of the next one as they lie in the registers.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_tile import Operands
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.attention_tile import final_factor, heads_per_tile

THREADS = 128
ROWS = 64
KEYS = 32
_PAD = 8  # elements behind each row in shared memory: eight rows then begin at different banks
_CHUNK = 8  # elements in 16 bytes
_LOWEST, _MASKED = -1e30, -1e29


def takes(cfg: AttentionConfig, caps: Capabilities) -> bool:
    """Whether heads are of a size and type that this kernel is made for."""
    has = {"bfloat16": caps.has_mma_bf16, "float16": caps.has_mma_f16}.get(cfg.dtype, False)
    sizes = cfg.key_dim % 16 == 0 and cfg.value_dim % 16 == 0 and max(cfg.key_dim, cfg.value_dim) <= 128
    return has and caps.has_async_copy and cfg.kv_dtype == cfg.dtype and sizes


def tokens_per_tile(cfg: AttentionConfig) -> int:
    """Query tokens of a tile."""
    return ROWS // heads_per_tile(cfg)


class FlashTile:
    """A tile's memory and steps; made inside the launch. See attention_tile.Tile for the arguments."""

    def __init__(
        self, cfg: AttentionConfig, caps: Capabilities, args: Operands, thread: Any, unit_number: Any
    ) -> None:
        self.cfg, self.caps, self.args, self.thread = cfg, caps, args, thread
        group, self.share = cfg.heads // cfg.kv_heads, heads_per_tile(cfg)
        shares = group // self.share
        self.kv_head = e.let(unit_number // shares)
        self.first_head = e.let(self.kv_head * group + unit_number % shares * self.share)
        bits = e.storage(cfg.dtype)
        self.q_line, self.k_line, self.v_line = cfg.key_dim + _PAD, KEYS + _PAD, cfg.value_dim + _PAD
        self.query = g.shared(ROWS * self.q_line, bits, "query")
        self.keys = g.shared(cfg.key_dim * self.k_line, bits, "keys")
        self.values = g.shared(KEYS * self.v_line, bits, "values")
        self.lane = e.let(thread % g.WARP)
        self.warp_row = e.let(thread // g.WARP * 16)
        # thread l holds rows l / 4 and l / 4 + 8 of its warp
        self.rows = [e.let(self.warp_row + self.lane // 4 + 8 * i) for i in range(2)]
        self.out = [g.local(4) for _ in range(cfg.value_dim // 8)]
        self.largest, self.total = [g.local(1) for _ in range(2)], [g.local(1) for _ in range(2)]

    def start(self, first_token: Any, used: Any) -> None:
        """Load the queries of tokens [first_token, first_token + used) and clear the running softmax."""
        cfg, args = self.cfg, self.args
        self.first_token, self.used = first_token, used
        pieces = cfg.key_dim // _CHUNK

        def load(i: Any) -> None:
            row, piece = e.let(i // pieces), e.let(i % pieces)
            # rows behind the last token are computed too (from a copy of it) and never stored
            token = e.let(first_token + T.min(row // self.share, used - 1))
            head = e.let(self.first_head + row % self.share)
            at = token * cfg.heads + head if cfg.token_major else head * args.t + token
            value = e.load(args.q, at * cfg.key_dim + piece * _CHUNK, _CHUNK)
            e.store(self.query, row * self.q_line + piece * _CHUNK, value, _CHUNK)

        g.strided(self.thread, ROWS * pieces, THREADS, load)
        for registers in self.out:
            for i in range(4):
                e.store(registers, i, e.f32(0.0), 1)
        for i in range(2):
            e.store(self.largest[i], 0, e.f32(_LOWEST), 1)
            e.store(self.total[i], 0, e.f32(0.0), 1)

    def visit(self, table: Any, begin: Any, end: Any, position: Any) -> None:
        """Attend to keys [begin, end); begin lies on a page's boundary."""
        with e.loop(e.ceildiv(end - begin, KEYS)) as i:
            first = e.let(begin + i * KEYS)
            g.barrier()  # the queries are there, and the block before has been read
            self._copy_keys(table, first, end)
            unit.commit()
            self._copy_values(table, first, end)
            unit.commit()
            unit.wait(1)
            g.barrier()
            scores = self._score(first, end, position)
            self._softmax(scores)
            unit.wait(0)
            g.barrier()
            self._weigh(scores)

    def _page(self, table: Any, key: Any, end: Any, size: int) -> Any:
        """Element at which this layer's and head's part of a key's page begins; of the last key for those behind it."""
        cfg = self.cfg
        page = e.i64(self.args.block_table[table + T.min(key, end - 1) // cfg.page_size])
        return e.let(((page * cfg.layers + self.args.layer) * cfg.kv_heads + self.kv_head) * size)

    def _copy_keys(self, table: Any, first: Any, end: Any) -> None:
        cfg, ps, pieces = self.cfg, self.cfg.page_size, KEYS // _CHUNK

        def piece(i: Any) -> None:
            d, key = e.let(i // pieces), e.let(first + i % pieces * _CHUNK)
            base = self._page(table, key, end, cfg.key_dim * ps)
            to = e.let(d * self.k_line + i % pieces * _CHUNK)
            unit.copy16(self.keys, to, self.args.k, e.let(base + d * ps + key % ps), key < end)

        g.strided(self.thread, cfg.key_dim * pieces, THREADS, piece)

    def _copy_values(self, table: Any, first: Any, end: Any) -> None:
        cfg, ps, pieces = self.cfg, self.cfg.page_size, self.cfg.value_dim // _CHUNK

        def piece(i: Any) -> None:
            j, part = e.let(i // pieces), e.let(i % pieces * _CHUNK)
            key = e.let(first + j)
            base = self._page(table, key, end, ps * cfg.value_dim)
            at = e.let(base + key % ps * cfg.value_dim + part)
            # zeros behind the last key: a weight of 0 times what happens to lie there could be NaN
            unit.copy16(self.values, e.let(j * self.v_line + part), self.args.v, at, key < end)

        g.strided(self.thread, KEYS * pieces, THREADS, piece)

    def _transposed(self, source: Any, line: int, row: int, column: int) -> Any:
        """16 rows x 16 columns from (row, column) of shared memory as second operands of two mma: columns 0..7, 8..15."""
        registers = g.local(4, "uint32")
        at = (row + self.lane % 16) * line + (column + self.lane // 16 * 8)
        unit.load_x4(registers, source, e.let(at), transposed=True)
        return registers

    def _score(self, first: Any, end: Any, position: Any) -> list[Any]:
        """Scores of the warp's 16 rows, 8 keys per entry; masked ones are very low."""
        cfg = self.cfg
        scores = [g.local(4) for _ in range(KEYS // 8)]
        for registers in scores:
            for i in range(4):
                e.store(registers, i, e.f32(0.0), 1)
        for step in range(cfg.key_dim // 16):
            left = g.local(4, "uint32")
            at = (self.warp_row + self.lane % 16) * self.q_line + (step * 16 + self.lane // 16 * 8)
            unit.load_x4(left, self.query, e.let(at))
            for pair in range(KEYS // 16):
                right = self._transposed(self.keys, self.k_line, step * 16, pair * 16)
                unit.mma(scores[2 * pair], left, right, 0, cfg.dtype)
                unit.mma(scores[2 * pair + 1], left, right, 2, cfg.dtype)
        places = [e.let(position + row // self.share) for row in self.rows]
        for n, registers in enumerate(scores):
            for i in range(4):
                key = e.let(first + (n * 8 + i % 2) + self.lane % 4 * 2)
                score = self._finished(registers[i], key, end, i // 2, places[i // 2])
                e.store(registers, i, score, 1)
        return scores

    def _finished(self, value: Any, key: Any, end: Any, which: int, where: Any) -> Any:
        cfg = self.cfg
        score = e.let(value * e.f32(cfg.scale))
        if cfg.softcap:
            score = e.let(T.tanh(score * e.f32(1.0 / cfg.softcap)) * e.f32(cfg.softcap))
        if self.args.alibi is not None:
            slope = self.args.alibi[self.first_head + self.rows[which] % self.share]
            score = e.let(score + slope * T.Cast("float32", key - where))
        seen = T.And(key < end, key <= where)
        if cfg.window:
            seen = T.And(seen, where - key < cfg.window)
        if cfg.chunk:
            seen = T.And(seen, where // cfg.chunk == key // cfg.chunk)
        return T.Select(seen, score, e.f32(_LOWEST))

    def _softmax(self, scores: list[Any]) -> None:
        """Scores to weights; the four threads of a row agree on its maximum and sum."""
        for i in range(2):
            top, added = g.local(1), g.local(1)
            old = e.let(self.largest[i][0])
            e.store(top, 0, old, 1)
            for registers in scores:
                for j in range(2):
                    e.store(top, 0, T.max(top[0], registers[2 * i + j]), 1)
            g.warp_reduce(top, T.max, first=2)
            e.store(added, 0, e.f32(0.0), 1)
            for registers in scores:
                for j in range(2):
                    score = e.let(registers[2 * i + j])
                    weight = e.let(T.Select(score <= e.f32(_MASKED), e.f32(0.0), T.exp(score - top[0])))
                    e.store(registers, 2 * i + j, weight, 1)
                    e.store(added, 0, added[0] + weight, 1)
            g.warp_reduce(added, g.add, first=2)
            factor = e.let(T.exp(old - top[0]))
            e.store(self.largest[i], 0, top[0], 1)
            e.store(self.total[i], 0, self.total[i][0] * factor + added[0], 1)
            for registers in self.out:
                for j in range(2):
                    e.store(registers, 2 * i + j, registers[2 * i + j] * factor, 1)

    def _weigh(self, weights: list[Any]) -> None:
        cfg = self.cfg
        for step in range(KEYS // 16):
            left = g.local(4, "uint32")
            for half in range(2):
                for i in range(2):
                    source = weights[2 * step + half]
                    e.store(left, 2 * half + i, self._pair(source[2 * i], source[2 * i + 1]), 1)
            for pair in range(cfg.value_dim // 16):
                right = self._transposed(self.values, self.v_line, step * 16, pair * 16)
                unit.mma(self.out[2 * pair], left, right, 0, cfg.dtype)
                unit.mma(self.out[2 * pair + 1], left, right, 2, cfg.dtype)

    def _pair(self, low: Any, high: Any) -> Any:
        """Two values of the cache's type in a word."""
        halves = []
        for value in (low, high):
            narrow = g.narrow(e.let(value), self.cfg.dtype, self.caps)
            bits = narrow if self.cfg.dtype == "bfloat16" else T.reinterpret("uint16", e.let(narrow))
            halves.append(tirx.Cast("uint32", bits))
        return T.bitwise_or(halves[0], T.shift_left(halves[1], tirx.IntImm("uint32", 16)))

    def finish(self) -> None:
        """Normalise and store the rows of real tokens."""
        cfg = self.cfg
        for i, row in enumerate(self.rows):
            head = e.let(self.first_head + row % self.share)
            with g.when(row // self.share < self.used):
                factor = final_factor(
                    cfg, self.args, e.let(self.largest[i][0]), e.let(self.total[i][0]), head
                )
                token = e.let(self.first_token + row // self.share)
                base = e.let((token * cfg.heads + head) * cfg.value_dim + self.lane % 4 * 2)
                for n, registers in enumerate(self.out):
                    for j in range(2):
                        value = g.narrow(e.let(registers[2 * i + j] * factor), cfg.dtype, self.caps)
                        e.store(self.args.out, base + (n * 8 + j), value, 1)
