"""Rotating heads and appending keys and values to their pages: a block per token, a thread per element."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_pools import Pools
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.kv_codes import CodeWriter
from llmc.schedules.rope import HeadOperands, RopeConfig, RopeOperands

THREADS = 128


def rotate(
    ops: HeadOperands,
    which: int,
    token: Any,
    heads: tuple[Any, int],
    thread: Any,
    store: Callable[[Any, Any, Any], None],
    threads: int = THREADS,
) -> None:
    """Rotated elements of neighbouring heads of a token, shared among the threads: store(number, element, float32).

    Args:
        which: number of the source.
        heads: (first head, how many); `number` counts from 0.
    """
    source = ops.heads.sources[which]
    attrs = source.attrs
    first, count = heads
    stride = attrs.head_stride * ops.t if attrs.head_major else e.i64(attrs.head_stride)

    def base_of(number: Any) -> Any:
        return e.let(token * attrs.token_stride + (first + number) * stride + attrs.offset)

    def raw(base: Any, at: Any) -> Any:
        return ops._read(ops.sources[which], base + at, 1, source.dtype)

    norm = _HeadNorms(ops, which, count, lambda number: partial(raw, base_of(number)), thread, threads)
    for run in attrs.runs:

        def element(i: Any, run: Any = run) -> None:
            number, at = e.let(i // run.count), e.let(i % run.count)
            base = base_of(number)

            def read(first: Any, lanes: int) -> Any:
                value = raw(base, first)
                return norm.apply(number, first, value) if run.a < attrs.norm_width else value

            store(number, run.to + at * run.to_step, ops._value(run, read, token, at, 1))

        g.strided(thread, count * run.count, threads, element)


class _HeadNorms:
    """Norms of single heads: a warp finds the mean and the scale of a head, and keeps them for the block."""

    def __init__(
        self,
        ops: HeadOperands,
        which: int,
        count: int,
        head: Callable[[Any], Callable[[Any], Any]],
        thread: Any,
        threads: int,
    ) -> None:
        """head(number) gives a function of the element's number in the head, float32."""
        source = ops.heads.sources[which]
        self.attrs, self.dtype = source.attrs.norm, source.vector_dtype
        self.vectors = ops.vectors[which]
        if self.attrs is None:
            return
        attrs, width = self.attrs, source.attrs.norm_width
        self.means = g.shared(count, name="means") if attrs.center else None
        self.scales = g.shared(count, name="scales")
        register = g.local(1)
        lane, warp = e.let(thread % g.WARP), e.let(thread // g.WARP)

        def mean_of(term: Callable[[Any], Any]) -> Any:
            e.store(register, 0, e.f32(0.0), 1)
            g.strided(lane, width, g.WARP, lambda j: e.store(register, 0, register[0] + term(j), 1))
            g.warp_reduce(register, g.add)
            return e.let(register[0] * e.f32(1.0 / width))

        def one(number: Any) -> None:
            value_of = head(number)
            mean = mean_of(value_of) if attrs.center else None

            def square(j: Any) -> Any:
                value = e.let(value_of(j) if mean is None else value_of(j) - mean)
                return value * value

            scale = e.let(e.f32(1.0) / T.sqrt(mean_of(square) + e.f32(attrs.eps)))
            with g.when(lane == 0):
                e.store(self.scales, number, scale, 1)
                if self.means is not None:
                    e.store(self.means, number, mean, 1)

        g.strided(warp, count, threads // g.WARP, one)
        g.barrier()

    def apply(self, number: Any, at: Any, value: Any) -> Any:
        """Element `at` of a head after its norm, float32, not rounded in between."""
        attrs = self.attrs
        if attrs is None:
            return value
        if self.means is not None:
            value = value - self.means[number]
        value, rest = value * self.scales[number], [e.widen(v[at], self.dtype, 1) for v in self.vectors]
        if attrs.has_weight:
            weight = rest.pop(0)
            value = value * (weight + e.f32(1.0) if attrs.plus_one else weight)
        if attrs.has_bias:
            value = value + rest.pop(0)
        return e.let(value)


class Pages:
    """Where a token's keys and values go."""

    def __init__(
        self, cfg: AttentionConfig, slots: Any, pools: Pools, layer: Any, caps: Capabilities
    ) -> None:
        self.cfg, self.slots, self.pools, self.layer, self.caps = cfg, slots, pools, layer, caps

    def at(self, token: Any) -> None:
        """Find the token's page; before the stores."""
        where = e.let(e.i64(self.slots[token]))
        self.part = e.let((where // self.cfg.page_size * self.cfg.layers + self.layer) * self.cfg.kv_heads)
        self.offset = e.let(where % self.cfg.page_size)

    def store_key(self, head: Any, d: Any, value: Any) -> None:
        """Element d of a head's key, from float32; rounded to the model's type first, as if it had been stored so."""
        cfg = self.cfg
        at = ((self.part + head) * cfg.key_dim + d) * cfg.page_size + self.offset
        e.store(self.pools.k, at, self._rounded(value), 1)

    def store_value(self, head: Any, d: Any, value: Any) -> None:
        """Element d of a head's value, from float32."""
        cfg = self.cfg
        at = ((self.part + head) * cfg.page_size + self.offset) * cfg.value_dim + d
        e.store(self.pools.v, at, self._rounded(value), 1)

    def _rounded(self, value: Any) -> Any:
        cfg = self.cfg
        if cfg.dtype != "float32" and cfg.dtype != cfg.kv_dtype:
            value = e.widen(e.let(g.narrow(e.let(value), cfg.dtype, self.caps)), cfg.dtype, 1)
        return g.narrow(e.let(value), cfg.kv_dtype, self.caps)


def append(
    ops: RopeOperands,
    pages: Pages,
    token: Any,
    heads: tuple[Any, int],
    thread: Any,
    threads: int = THREADS,
) -> None:
    """Keys (rotated) and values of a token, for cached heads (first, how many)."""
    pages.at(token)
    first = heads[0]
    rotated = lambda name, share, keep: rotate(  # noqa: E731
        ops, ops.cfg.place(name), token, share, thread, keep, threads
    )
    if pages.cfg.coded:
        writer = CodeWriter(pages, heads, thread, threads)
        writer.keys(lambda share, keep: rotated("k", share, keep))
        writer.values(lambda share, keep: rotated("v", share, keep))
        return
    rotated("k", heads, lambda n, d, value: pages.store_key(first + n, d, value))
    if ops.cfg.v is not None:
        rotated("v", heads, lambda n, d, value: pages.store_value(first + n, d, value))


def rope_append(cfg: RopeConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.rope.rope_append, for a machine with threads."""
    a = cfg.attention
    hk, dk = a.kv_heads, a.key_dim
    built: list[Any] = []
    with e.kernel(built):
        t, pages = e.dim("T"), e.dim("P")
        ops = RopeOperands(cfg, caps, t)
        if cfg.k is not None:
            slot = g.tensor("slot", [t], "int32")
            k_pool = g.tensor("k_pool", [pages, a.layers, hk, *a.k_page], a.pool_dtype)
            v_shape = [pages, a.layers, hk, *a.v_page]
            v_pool = None if a.latent else g.tensor("v_pool", v_shape, a.pool_dtype)
            layer = e.scalar_arg("layer")
        q = None if cfg.q is None else g.tensor("q", [1, t, a.heads, dk], a.dtype)
        with e.root():
            ops.view()
            out = None if q is None else e.flat(q, t * a.heads * dk)
            if cfg.k is not None:
                slots = e.flat(slot, t)
                pools = Pools(a, pages, k_pool, v_pool)
            with g.launch(t, THREADS) as (token, thread):
                if cfg.k is not None:
                    append(ops, Pages(a, slots, pools, layer, caps), token, (e.i64(0), hk), thread)

                def store(head: Any, d: Any, value: Any) -> None:
                    at = (token * a.heads + head) * dk + d
                    e.store(out, at, g.narrow(e.let(value), a.dtype, caps), 1)

                if out is not None:
                    rotate(ops, 0, token, (e.i64(0), a.heads), thread, store)
    return built[0]


def kv_append(cfg: AttentionConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.attention.kv_append, for a machine with threads; of latents without v and v_pool."""
    hk, dk, dv, layers = cfg.kv_heads, cfg.key_dim, cfg.value_dim, cfg.layers
    built: list[Any] = []
    with e.kernel(built):
        t, pages = e.dim("T"), e.dim("P")
        k = g.tensor("k", [1, hk, t, dk], cfg.dtype)
        v = None if cfg.latent else g.tensor("v", [1, hk, t, dv], cfg.dtype)
        slot = g.tensor("slot", [t], "int32")
        k_pool = g.tensor("k_pool", [pages, layers, hk, *cfg.k_page], cfg.pool_dtype)
        v_pool = None if cfg.latent else g.tensor("v_pool", [pages, layers, hk, *cfg.v_page], cfg.pool_dtype)
        layer = e.scalar_arg("layer")
        with e.root():
            slots = e.flat(slot, t)
            pools = Pools(cfg, pages, k_pool, v_pool)
            sources = [(e.flat(k, hk * t * dk), dk)]
            if v is not None:
                sources.append((e.flat(v, hk * t * dv), dv))
            with g.launch(t, THREADS) as (token, thread):
                to = Pages(cfg, slots, pools, layer, caps)
                to.at(token)
                if cfg.coded:
                    writer = CodeWriter(to, (e.i64(0), hk), thread, THREADS)
                    for (source, dim), write in zip(sources, (writer.keys, writer.values), strict=True):
                        write(partial(_stored, cfg, source, dim, t, token, thread))
                    sources = []
                for (source, dim), put in zip(sources, (to.store_key, to.store_value), strict=False):

                    def element(i: Any, source: Any = source, dim: int = dim, put: Any = put) -> None:
                        head, d = e.let(i // dim), e.let(i % dim)
                        value = e.let(e.widen(source[(head * t + token) * dim + d], cfg.dtype, 1))
                        put(head, d, value)

                    g.strided(thread, hk * dim, THREADS, element)
    return built[0]


def _stored(
    cfg: AttentionConfig,
    source: Any,
    dim: int,
    t: Any,
    token: Any,
    thread: Any,
    heads: tuple[Any, int],
    keep: Callable[[Any, Any, Any], None],
) -> None:
    """Elements of neighbouring heads of a token, shared among the threads: keep(number, element, float32)."""

    def element(i: Any) -> None:
        number, d = e.let(i // dim), e.let(i % dim)
        keep(number, d, e.widen(source[((heads[0] + number) * t + token) * dim + d], cfg.dtype, 1))

    g.strided(thread, heads[1] * dim, THREADS, element)


__all__ = ["Pages", "append", "kv_append", "rope_append", "rotate"]
