"""Row gathers: a block per row, neighbouring threads on neighbouring elements."""

from __future__ import annotations

from typing import Any

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gather import EmbeddingConfig, GatherConfig
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.qcodes import COLUMNS, ThreadCodes
from llmc.schedules.qgather import QuantEmbeddingConfig

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


def quant_embedding(cfg: QuantEmbeddingConfig, caps: Capabilities) -> Any:
    """The PrimFunc of llmc.schedules.qgather.quant_embedding, for a machine with threads."""
    layout = cfg.layout
    size = 1
    for extent in layout.packed_shape:
        size *= extent
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ones = [1] * cfg.lead
        ids = g.tensor("ids", [*ones, t], cfg.ids_dtype)
        table = g.tensor("table", list(layout.packed_shape), "uint8")
        out = g.tensor("out", [*ones, t, layout.k], cfg.dtype)
        with e.root():
            index, target = e.flat(ids, t), e.flat(out, t * layout.k)
            order = e.flat(table, size // 4, "int32") if layout.of.order else None
            with g.launch(t, _THREADS) as (token, thread):
                codes = ThreadCodes(caps, layout, table, size)
                codes.load_table(thread, _THREADS)
                if codes.has_table:
                    g.barrier()
                wanted = e.let(e.i64(index[token]))
                base = e.let(wanted // layout.n_block * layout.block_bytes)
                row = e.let(wanted % layout.n_block)

                def columns(i: Any) -> None:
                    for j, value in enumerate(codes.row_values(base, row, i * COLUMNS)):
                        column = e.let(i * COLUMNS + j)
                        with g.when(column < layout.k):
                            at = column
                            if order is not None:
                                at = e.let(e.i64(order[layout.list_at // 4 + column]))
                            e.store(target, token * layout.k + at, g.narrow(value, cfg.dtype, caps), 1)

                g.strided(thread, layout.padded_k // COLUMNS, _THREADS, columns)
    return built[0]
