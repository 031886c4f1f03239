"""RMSNorm and LayerNorm: a block per row, sums by warp shuffles."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.norm import NormConfig

_MOST_THREADS = 256
_ELEMENTS = 4  # that a thread has at least, before a block gets more threads


def norm(cfg: NormConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.norm.norm, for a machine with threads."""
    attrs, k = cfg.attrs, cfg.shape[-1]
    if attrs.before is not None or attrs.only_sum:
        raise LlmcError(
            "kernel-missing",
            f"There is no kernel for the norm of an addend on {caps.preset} yet.",
            hint="Compile with --disable-pass FuseAddNorm, or for the cpu target.",
        )
    threads = min(_MOST_THREADS, max(g.WARP, k // _ELEMENTS // g.WARP * g.WARP))
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        rows = e.i64(1)
        for d in cfg.shape[:-1]:
            rows = rows * (t if d < 0 else e.i64(d))
        dims = [t if d < 0 else d for d in cfg.shape]
        x = g.tensor("x", dims, cfg.dtype)
        addend = g.tensor("addend", dims, cfg.dtype) if attrs.adds else None
        weight = g.tensor("weight", [k], cfg.weight_dtype) if attrs.has_weight else None
        bias = g.tensor("bias", [k], cfg.weight_dtype) if attrs.has_bias else None
        total = g.tensor("sum", dims, cfg.dtype) if attrs.adds else None
        y = g.tensor("y", dims, cfg.dtype)
        with e.root():
            views = [e.flat(b, rows * k) if b is not None else None for b in (x, addend, total, y)]
            vectors = [e.flat(b, k) if b is not None else None for b in (weight, bias)]
            with g.launch(rows, threads) as (row, thread):
                _row(cfg, caps, e.let(row * k), thread, threads, views, vectors)
    return built[0]


def _row(
    cfg: NormConfig,
    caps: Capabilities,
    base: Any,
    thread: Any,
    threads: int,
    views: list[Any],
    vectors: list[Any],
) -> None:
    attrs, k = cfg.attrs, cfg.shape[-1]
    x, addend, total, y = views
    weight, bias = vectors
    scratch = g.shared(max(1, threads // g.WARP), name="scratch")
    register = g.local(1)

    def read(buffer: Any, at: Any, dtype: str) -> Any:
        return e.widen(buffer[at], dtype, 1)

    if addend is not None:

        def join(j: Any) -> None:
            value = read(x, base + j, cfg.dtype) + read(addend, base + j, cfg.dtype)
            e.store(total, base + j, g.narrow(e.let(value), cfg.dtype, caps), 1)

        # every thread reads back only what it has written itself
        g.strided(thread, k, threads, join)
        x = total

    def sum_of(term: Any, again: bool) -> Any:
        e.store(register, 0, e.f32(0.0), 1)
        g.strided(thread, k, threads, lambda j: e.store(register, 0, register[0] + term(j), 1))
        g.block_reduce(register, scratch, thread, threads, g.add, again)
        return e.let(register[0] * e.f32(1.0 / k))

    mean = sum_of(lambda j: read(x, base + j, cfg.dtype), False) if attrs.center else None

    def centered(j: Any) -> Any:
        value = read(x, base + j, cfg.dtype)
        return e.let(value - mean if mean is not None else value)

    def square(j: Any) -> Any:
        value = centered(j)
        return value * value

    variance = sum_of(square, attrs.center)
    scale = e.let(e.f32(1.0) / T.sqrt(variance + e.f32(attrs.eps)))

    def write(j: Any) -> None:
        value = centered(j) * scale
        if attrs.rounds_first and cfg.dtype != "float32":
            value = e.widen(e.let(g.narrow(e.let(value), cfg.dtype, caps)), cfg.dtype, 1)
        if weight is not None:
            factor = read(weight, j, cfg.weight_dtype)
            value = value * (factor + e.f32(1.0) if attrs.plus_one else factor)
        if bias is not None:
            value = value + read(bias, j, cfg.weight_dtype)
        e.store(y, base + j, g.narrow(e.let(value), cfg.dtype, caps), 1)

    g.strided(thread, k, threads, write)
