"""RMSNorm and LayerNorm: a block per row, or a warp per row of several; sums by warp shuffles.

A thread loads its elements once, 16 bytes at a time, and keeps them in registers: after the load nothing waits for memory but
the first use of the weights, which are asked for beforehand. Rows too long for that, or of odd lengths, are read again for
each sum.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.ops import NormAttrs
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.configs import GpuNormSchedule, emit_by_rows
from llmc.schedules.norm import NormConfig

_MOST_THREADS = 512
_SHORT = 256  # elements of a row that a warp does by itself
_ROWS = 4  # of a block, then
_HELD = 32  # elements that a thread keeps, at most
_VECTOR = 16  # bytes


class NormKernel(NamedTuple):
    """A kernel with schedules by rows."""

    config: NormConfig
    schedule: ByRows[GpuNormSchedule]


def norm(kernel: NormKernel | NormConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.norm.norm, for a machine with threads."""
    cfg, schedules = kernel if isinstance(kernel, NormKernel) else (kernel, ByRows((GpuNormSchedule(),)))
    attrs, k = cfg.attrs, cfg.shape[-1]
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

            def launch(schedule: GpuNormSchedule, most: int) -> None:
                cut = schedule if schedule.threads else usual(k)
                with g.launch(e.ceildiv(rows, cut.rows), cut.rows * cut.threads) as (number, thread):
                    row, inside = number, thread
                    if cut.rows > 1:
                        row = e.let(number * cut.rows + thread // cut.threads)
                        inside = e.let(thread % cut.threads)
                    make = _HeldRow if held(cfg, cut.threads) else _Row
                    with g.when(row < rows) if cut.rows > 1 else nullcontext():
                        make(cfg, caps, e.let(row * k), inside, cut.threads).run(views, flat)

            emit_by_rows(schedules, t, launch)
    return built[0]


def usual(k: int) -> GpuNormSchedule:
    """Untuned: 8 elements of a thread, as long as a block is not too large; short rows several to a block."""
    if k <= _SHORT:
        return GpuNormSchedule(g.WARP, _ROWS)
    return GpuNormSchedule(min(_MOST_THREADS, -(-k // (8 * g.WARP)) * g.WARP), 1)


def lanes_of(cfg: NormConfig) -> int:
    """Elements that a thread loads at a time: as many as 16 bytes hold and divide a row."""
    k, lanes = cfg.shape[-1], _VECTOR // (4 if "float32" in (cfg.dtype, cfg.weight_dtype) else 2)
    while k % lanes:
        lanes //= 2
    return lanes


def held(cfg: NormConfig, threads: int) -> bool:
    """Whether threads keep a row in registers."""
    lanes = lanes_of(cfg)
    return lanes > 1 and -(-cfg.shape[-1] // (threads * lanes)) * lanes <= _HELD


class Sums:
    """Sums over a row by a block of threads, one after another.

    Args:
        k: elements of a row.
        each: calls a function for every element that the thread has; None = all threads take turns.
    """

    def __init__(
        self, k: int, thread: Any, threads: int, each: Callable[[Callable[[Any], None]], None] | None = None
    ) -> None:
        self.k, self.thread, self.threads = k, thread, threads
        self.each = each or (lambda body: g.strided(thread, k, threads, body))
        self._scratch = g.shared(threads // g.WARP, name="scratch") if threads > g.WARP else None
        self._register = g.local(1)
        self._used = False

    def mean(self, term: Callable[[Any], Any]) -> Any:
        """Sum of term(j) over the row, divided by its length; all threads get it."""
        register = self._register
        e.store(register, 0, e.f32(0.0), 1)
        self.each(lambda j: e.store(register, 0, register[0] + term(j), 1))
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
        self.sums = Sums(self.k, thread, threads, self._each)

    def run(self, views: list[Any], vectors: list[Any]) -> None:
        """x, addend, sum and y as flat views; weights and biases of the addend's norm, then of the row's own."""
        attrs = self.cfg.attrs
        x, addend, total, y = views
        count = attrs.before.vectors if attrs.before is not None else 0
        given = [self._vector(v) for v in vectors]
        row = first = self._row(x)
        if addend is not None:
            added = self._row(addend)
            if attrs.before is not None:
                before = normalised(attrs.before, self.sums, added, self._rounded)
                added = lambda j: before(j, [v(j) for v in given[:count]])  # noqa: E731
            row = self._store(total, lambda j: first(j) + added(j))
        if y is not None:
            element = normalised(attrs, self.sums, row, self._rounded)
            self._store(y, lambda j: element(j, [v(j) for v in given[count:]]))

    # -- how elements are kept ---------------------------------------------------------------------------------------

    def _row(self, buffer: Any) -> Callable[[Any], Any]:
        """The row's elements, float32."""
        return lambda j: e.widen(buffer[self.base + j], self.cfg.dtype, 1)

    def _vector(self, buffer: Any) -> Callable[[Any], Any]:
        """Elements of a weight or bias, float32."""
        return lambda j: e.widen(buffer[j], self.cfg.weight_dtype, 1)

    def _each(self, body: Callable[[Any], None]) -> None:
        g.strided(self.thread, self.k, self.threads, body)

    def _store(self, buffer: Any, value: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Store the row, rounded; returns its elements as they are then."""
        self._each(lambda j: e.store(buffer, self.base + j, self._narrow(value(j)), 1))
        return self._row(buffer)

    def _narrow(self, value: Any) -> Any:
        return g.narrow(e.let(value), self.cfg.dtype, self.caps)

    def _rounded(self, value: Any) -> Any:
        return (
            value if self.cfg.dtype == "float32" else e.widen(e.let(self._narrow(value)), self.cfg.dtype, 1)
        )


class _HeldRow(_Row):
    """A row in registers: element numbers are Python's, of a thread's own elements."""

    def __init__(self, cfg: NormConfig, caps: Capabilities, base: Any, thread: Any, threads: int) -> None:
        super().__init__(cfg, caps, base, thread, threads)
        self.lanes = lanes_of(cfg)
        self.chunks = -(-self.k // (threads * self.lanes))

    def _chunk(self, c: int) -> tuple[Any, Any]:
        """(first element of the thread's chunk c in the row, `with` scope of those that have it)."""
        at = e.let((self.thread + c * self.threads) * self.lanes)
        whole = (c + 1) * self.threads * self.lanes <= self.k
        return at, nullcontext() if whole else g.when(at < self.k)

    def _load(self, buffer: Any, base: Any, dtype: str) -> Callable[[Any], Any]:
        registers = g.local(self.chunks * self.lanes)
        for c in range(self.chunks):
            at, scope = self._chunk(c)
            with scope:
                vector = e.let(e.load(buffer, e.let(base + at), self.lanes))
                for i, value in enumerate(g.elements(vector, self.lanes)):
                    e.store(registers, c * self.lanes + i, e.widen(value, dtype, 1), 1)
        return lambda j: registers[j]

    def _row(self, buffer: Any) -> Callable[[Any], Any]:
        return self._load(buffer, self.base, self.cfg.dtype)

    def _vector(self, buffer: Any) -> Callable[[Any], Any]:
        return self._load(buffer, e.i64(0), self.cfg.weight_dtype)

    def _each(self, body: Callable[[Any], None]) -> None:
        for c in range(self.chunks):
            _, scope = self._chunk(c)
            with scope:
                for i in range(self.lanes):
                    body(c * self.lanes + i)

    def _store(self, buffer: Any, value: Callable[[Any], Any]) -> Callable[[Any], Any]:
        kept = g.local(self.chunks * self.lanes)
        for c in range(self.chunks):
            at, scope = self._chunk(c)
            with scope:
                vector = g.local(self.lanes, e.storage(self.cfg.dtype))
                for i in range(self.lanes):
                    stored = e.let(self._narrow(value(c * self.lanes + i)))
                    e.store(vector, i, stored, 1)
                    e.store(kept, c * self.lanes + i, e.widen(stored, self.cfg.dtype, 1), 1)
                e.store(buffer, e.let(self.base + at), e.load(vector, e.i64(0), self.lanes), self.lanes)
        return lambda j: kept[j]
