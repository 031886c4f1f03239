"""Row gathers: a block per row, neighbouring threads on neighbouring elements."""

from __future__ import annotations

from typing import Any

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gather import EmbeddingConfig, GatherConfig
from llmc.schedules.gpu import emit as g

_THREADS = 128


def embedding(cfg: EmbeddingConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.gather.embedding, for a machine with threads."""
    layout, k = cfg.layout, cfg.k
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ones = [1] * cfg.lead
        ids = g.tensor("ids", [*ones, t], cfg.ids_dtype)
        shape = (cfg.rows, k) if layout is None else layout.packed_shape(cfg.rows, k)
        table = g.tensor("table", shape, cfg.dtype)
        out = g.tensor("out", [*ones, t, k], cfg.dtype)
        size = 1
        for extent in shape:
            size *= extent
        with e.root():
            index, source, target = e.flat(ids, t), e.flat(table, size), e.flat(out, t * k)
            with g.launch(t, _THREADS) as (row, thread):
                wanted = e.let(e.i64(index[row]))

                def copy(i: Any) -> None:
                    at = wanted * k + i
                    if layout is not None:
                        nb, kp = layout.n_block, layout.k_pack
                        block = (wanted // nb * shape[1] + i // kp) * nb + wanted % nb
                        at = block * kp + i % kp
                    e.store(target, row * k + i, source[at], 1)

                g.strided(thread, k, _THREADS, copy)
    return built[0]


def gather_rows(cfg: GatherConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.gather.gather_rows, for a machine with threads."""
    built: list[Any] = []
    with e.kernel(built):
        t, r = e.dim("T"), e.dim("R")
        ones = [1] * cfg.lead
        x = g.tensor("x", [*ones, t, cfg.k], cfg.dtype)
        rows = g.tensor("rows", [r], "int32")
        out = g.tensor("out", [*ones, r, cfg.k], cfg.dtype)
        with e.root():
            source, target, index = e.flat(x, t * cfg.k), e.flat(out, r * cfg.k), e.flat(rows, r)
            with g.launch(r, _THREADS) as (row, thread):
                first = e.let(e.i64(index[row]) * cfg.k)
                g.strided(
                    thread,
                    cfg.k,
                    _THREADS,
                    lambda i: e.store(target, row * cfg.k + i, source[first + i], 1),
                )
    return built[0]
