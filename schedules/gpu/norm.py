"""RMSNorm and LayerNorm: a block per row, sums by warp shuffles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.ops import NormAttrs
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.norm import NormConfig

_MOST_THREADS = 256
_ELEMENTS = 4  # that a thread has at least, before a block gets more threads


def norm(cfg: NormConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.norm.norm, for a machine with threads."""
    attrs, k = cfg.attrs, cfg.shape[-1]
    threads = threads_for(k)
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        rows = e.i64(1)
        for d in cfg.shape[:-1]:
            rows = rows * (t if d < 0 else e.i64(d))
        dims = [t if d < 0 else d for d in cfg.shape]
        x = g.tensor("x", dims, cfg.dtype)
        addend = g.tensor("addend", dims, cfg.dtype) if attrs.adds else None
        vectors = [g.tensor(f"vector_{i}", [k], cfg.weight_dtype) for i in range(cfg.vectors)]
        total = g.tensor("sum", dims, cfg.dtype) if attrs.adds else None
        y = g.tensor("y", dims, cfg.dtype) if not attrs.only_sum else None
        with e.root():
            views = [e.flat(b, rows * k) if b is not None else None for b in (x, addend, total, y)]
            flat = [e.flat(b, k) for b in vectors]
            with g.launch(rows, threads) as (row, thread):
                _Row(cfg, caps, e.let(row * k), thread, threads).run(views, flat)
    return built[0]


def threads_for(k: int) -> int:
    """Threads of a block that works on rows of k elements."""
    return min(_MOST_THREADS, max(g.WARP, k // _ELEMENTS // g.WARP * g.WARP))


class Sums:
    """Sums over a row by a block of threads, one after another.

    Args:
        k: elements of a row.
    """

    def __init__(self, k: int, thread: Any, threads: int) -> None:
        self.k, self.thread, self.threads = k, thread, threads
        self._scratch = g.shared(max(1, threads // g.WARP), name="scratch")
        self._register = g.local(1)
        self._used = False

    def mean(self, term: Callable[[Any], Any]) -> Any:
        """Sum of term(j) over the row, divided by its length; all threads get it."""
        register = self._register
        e.store(register, 0, e.f32(0.0), 1)
        add = lambda j: e.store(register, 0, register[0] + term(j), 1)  # noqa: E731
        g.strided(self.thread, self.k, self.threads, add)
        g.block_reduce(register, self._scratch, self.thread, self.threads, g.add, self._used)
        self._used = True
        return e.let(register[0] * e.f32(1.0 / self.k))


def normalised(
    attrs: NormAttrs, sums: Sums, read: Callable[[Any], Any], rounded: Callable[[Any], Any]
) -> Callable[[Any, list[Any]], Any]:
    """(j, [weight[j]], [bias[j]]) -> element j of the norm of a row, float32; mean and variance are computed here.

    Args:
        read: element j of the row, float32.
        rounded: a value as it is after being stored in the row's type; for norms that round before their weight.
    """
    mean = sums.mean(read) if attrs.center else None

    def centered(j: Any) -> Any:
        value = read(j)
        return e.let(value - mean if mean is not None else value)

    def square(j: Any) -> Any:
        value = centered(j)
        return value * value

    scale = e.let(e.f32(1.0) / T.sqrt(sums.mean(square) + e.f32(attrs.eps)))

    def element(j: Any, vectors: list[Any]) -> Any:
        value, rest = centered(j) * scale, list(vectors)
        if attrs.rounds_first:
            value = rounded(value)
        if attrs.has_weight:
            factor = rest.pop(0)
            value = value * (factor + e.f32(1.0) if attrs.plus_one else factor)
        if attrs.has_bias:
            value = value + rest.pop(0)
        return value

    return element


class _Row:
    """A row, by a block of threads; every thread reads back only what it has written itself."""

    def __init__(self, cfg: NormConfig, caps: Capabilities, base: Any, thread: Any, threads: int) -> None:
        self.cfg, self.caps, self.base, self.thread, self.threads = cfg, caps, base, thread, threads
        self.k = cfg.shape[-1]
        self.sums = Sums(self.k, thread, threads)

    def run(self, views: list[Any], vectors: list[Any]) -> None:
        attrs, base = self.cfg.attrs, self.base
        x, addend, total, y = views
        if addend is not None:
            before = attrs.before
            count = before.vectors if before is not None else 0
            value = (
                self._norm(before, addend, vectors[:count]) if before is not None else self._reader(addend)
            )
            read = self._reader(x)
            self._each(lambda j: e.store(total, base + j, self._narrow(read(j) + value(j)), 1))
            x, vectors = total, vectors[count:]
        if y is not None:
            element = self._norm(attrs, x, vectors)
            self._each(lambda j: e.store(y, base + j, self._narrow(element(j)), 1))

    def _norm(self, attrs: NormAttrs, x: Any, vectors: list[Any]) -> Callable[[Any], Any]:
        dtype = self.cfg.weight_dtype
        element = normalised(attrs, self.sums, self._reader(x), self._rounded)
        return lambda j: element(j, [e.widen(v[j], dtype, 1) for v in vectors])

    def _reader(self, buffer: Any) -> Callable[[Any], Any]:
        return lambda j: e.widen(buffer[self.base + j], self.cfg.dtype, 1)

    def _each(self, body: Callable[[Any], None]) -> None:
        g.strided(self.thread, self.k, self.threads, body)

    def _narrow(self, value: Any) -> Any:
        return g.narrow(e.let(value), self.cfg.dtype, self.caps)

    def _rounded(self, value: Any) -> Any:
        return (
            value if self.cfg.dtype == "float32" else e.widen(e.let(self._narrow(value)), self.cfg.dtype, 1)
        )
