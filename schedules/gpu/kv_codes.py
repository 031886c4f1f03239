"""Codes and scales of new keys and values, for machines with threads: a warp per cached head; see schedules/kv_codes.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.kv_plan import QUAD, padded
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.kv_codes import code_of_zero, codes_of, magnitude_bits, scale_of

if TYPE_CHECKING:
    from llmc.schedules.gpu.rope import Pages

_STAGED = 4096  # elements of heads that are held at a time, float32

# what gives a share of the heads: give((first head, how many), keep) calls keep(number, element, float32) for all elements
Source = Callable[[tuple[Any, int], Callable[[Any, Any, Any], None]], None]


class CodeWriter:
    """Writes neighbouring cached heads of a token, whose page was found.

    Args:
        heads: (first head, how many).
        threads: of the block, all of which take part.
    """

    def __init__(self, pages: Pages, heads: tuple[Any, int], thread: Any, threads: int) -> None:
        self.pages, self.heads, self.thread, self.threads = pages, heads, thread, threads
        cfg = pages.cfg
        widest = max(cfg.key_dim, cfg.value_dim)
        self._share = min(heads[1], max(1, _STAGED // widest))
        self._stage = g.shared(self._share * widest, name="stage")
        self._lane, self._warp = e.let(thread % g.WARP), e.let(thread // g.WARP)

    def keys(self, give: Source) -> None:
        """The heads' keys."""
        cfg, pools = self.pages.cfg, self.pages.pools

        def put(part: Any, word: Any, codes: list[Any]) -> None:
            at = part * (cfg.k_part // QUAD) + word * cfg.page_size + self.pages.offset
            value = codes[0]
            for b, code in enumerate(codes[1:], 1):
                value = T.bitwise_or(value, T.shift_left(code, g.i32(8 * b)))
            e.store(pools.k_words, at, value, 1)

        self._write(give, cfg.key_dim, put, pools.key_scales)

    def values(self, give: Source) -> None:
        """The heads' values."""
        cfg, pools, offset = self.pages.cfg, self.pages.pools, self.pages.offset

        def put(part: Any, word: Any, codes: list[Any]) -> None:
            row = offset // QUAD * padded(cfg.value_dim) + word * QUAD
            at = e.let(part * cfg.v_part + row * QUAD + offset % QUAD)
            for b, code in enumerate(codes):
                e.store(pools.v, at + b * QUAD, tirx.Cast("uint8", code), 1)

        self._write(give, cfg.value_dim, put, pools.value_scales)

    def _write(
        self,
        give: Source,
        dim: int,
        put: Callable[[Any, Any, list[Any]], None],
        scales_of: Callable[[Any], tuple[Any, Any]],
    ) -> None:
        first, count = self.heads
        for begin in range(0, count, self._share):
            many = min(self._share, count - begin)
            g.barrier()  # what was staged before has been read
            give((first + begin, many), lambda number, d, value: self._keep(number * dim + d, value))
            g.barrier()

            def head(number: Any, begin: int = begin) -> None:
                part = e.let(self.pages.part + first + (begin + number))
                self._encode(e.let(number * dim), dim, part, put, scales_of(part))

            g.strided(self._warp, many, self.threads // g.WARP, head)

    def _keep(self, at: Any, value: Any) -> None:
        """As if it had been stored in the model's type."""
        cfg = self.pages.cfg
        if cfg.dtype != "float32":
            value = e.widen(e.let(g.narrow(e.let(value), cfg.dtype, self.pages.caps)), cfg.dtype, 1)
        e.store(self._stage, at, value, 1)

    def _encode(
        self,
        line: Any,
        dim: int,
        part: Any,
        put: Callable[[Any, Any, list[Any]], None],
        scales: tuple[Any, Any],
    ) -> None:
        """One head, by a warp: its elements begin at `line` of the stage."""
        dtype, caps = self.pages.cfg.kv_dtype, self.pages.caps
        top = g.local(1, "int32")
        e.store(top, 0, g.i32(0), 1)

        def larger(d: Any) -> None:
            e.store(top, 0, T.max(top[0], magnitude_bits(self._stage[line + d], 1)), 1)

        g.strided(self._lane, dim, g.WARP, larger)
        g.warp_reduce(top, T.max)
        scale, divisor, usable = scale_of(e.let(T.reinterpret("float32", top[0])), dtype, caps)

        def word(i: Any) -> None:
            codes = []
            for b in range(QUAD):
                d = e.let(i * QUAD + b)
                # held: a clamp that stands in a Select under the same condition would be simplified away
                last = d if dim % QUAD == 0 else g.held(T.min(d, e.i64(dim - 1)))
                value = e.let(tirx.Select(usable, self._stage[line + last], e.f32(0.0)) / divisor)
                code = codes_of(value, dtype, 1, lambda x, _: T.nearbyint(x))
                codes.append(e.let(tirx.Select(d < dim, code, g.i32(code_of_zero(dtype)))))
            put(part, i, codes)

        g.strided(self._lane, padded(dim) // QUAD, g.WARP, word)
        with g.when(self._lane == 0):
            into, base = scales
            e.store(into, base + self.pages.offset, scale, 1)
