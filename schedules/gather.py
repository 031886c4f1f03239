"""Row gathers: token embeddings (also from a packed weight) and the rows whose logits are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.layout import BlockedLayout

_SERIAL_ROWS = 4  # a parallel launch costs more than copying this many rows


@dataclass(frozen=True)
class EmbeddingConfig:
    """out[T, k] = table[ids[T], :].

    Attributes:
        rows, k: of the table [rows, k].
        dtype: of table and result.
        ids_dtype: int32 or int64.
        lead: unit dimensions before T in ids and result.
        layout: the table is a weight packed so; None = rows as they are.
    """

    rows: int
    k: int
    dtype: str
    ids_dtype: str = "int32"
    lead: int = 0
    layout: BlockedLayout | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> EmbeddingConfig:
        layout = values.get("layout")
        return EmbeddingConfig(**{**values, "layout": BlockedLayout(**layout) if layout else None})


@dataclass(frozen=True)
class GatherConfig:
    """out[R, k] = x[rows[R], :], with `lead` unit dimensions before T and R in x and out."""

    k: int
    dtype: str
    lead: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> GatherConfig:
        return GatherConfig(**values)


def embedding(cfg: EmbeddingConfig, caps: Capabilities) -> Any:
    """The PrimFunc (ids[1 x lead, T], table, out[1 x lead, T, k]); ids must lie in [0, rows)."""
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ones = [1] * cfg.lead
        ids = e.tensor("ids", [*ones, t], cfg.ids_dtype)
        if cfg.layout is None:
            shape: tuple[int, ...] = (cfg.rows, cfg.k)
        else:
            shape = cfg.layout.packed_shape(cfg.rows, cfg.k)
        table = e.tensor("table", shape, cfg.dtype)
        out = e.tensor("out", [*ones, t, cfg.k], cfg.dtype)
        with e.root():
            idf = e.flat(ids, t)
            if cfg.layout is None:
                source, target = e.flat(table, cfg.rows * cfg.k), e.flat(out, t * cfg.k)
                _each_row(t, caps, lambda r: _copy_row(source, e.i64(idf[r]), target, r, cfg.k, caps))
            else:
                _gather_packed(cfg, cfg.layout, shape, idf, table, out, t, caps)
    return built[0]


def gather_rows(cfg: GatherConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x[1 x lead, T, k], rows i32[R], out[1 x lead, R, k])."""
    built: list[Any] = []
    with e.kernel(built):
        t, r = e.dim("T"), e.dim("R")
        ones = [1] * cfg.lead
        x = e.tensor("x", [*ones, t, cfg.k], cfg.dtype)
        rows = e.tensor("rows", [r], "int32")
        out = e.tensor("out", [*ones, r, cfg.k], cfg.dtype)
        with e.root():
            source, target, index = e.flat(x, t * cfg.k), e.flat(out, r * cfg.k), e.flat(rows, r)
            _each_row(r, caps, lambda i: _copy_row(source, e.i64(index[i]), target, i, cfg.k, caps))
    return built[0]


def _each_row(count: Any, caps: Capabilities, body: Callable[[Any], None]) -> None:
    """body(r) for r < count: over the threads when there are many."""
    with T.If(count <= _SERIAL_ROWS):
        with T.Then(), e.loop(count) as r:
            body(r)
        with T.Else(), e.parallel(count, caps) as r:
            body(r)


def _copy_row(source: Any, row: Any, target: Any, to: Any, k: int, caps: Capabilities) -> None:
    lanes = caps.vector_bytes // (4 if str(source.dtype) == "float32" else 2)
    begin, end = e.let(row * k), e.let(to * k)
    with e.loop(k // lanes) as j:
        e.store(target, end + j * lanes, e.load(source, begin + j * lanes, lanes), lanes)
    if k % lanes:
        with e.loop(k // lanes * lanes, k) as j:
            e.store(target, end + j, source[begin + j], 1)


def _gather_packed(
    cfg: EmbeddingConfig,
    layout: BlockedLayout,
    shape: tuple[int, ...],
    ids: Any,
    table: Any,
    out: Any,
    t: Any,
    caps: Capabilities,
) -> None:
    """A row of a packed weight: one lane of its block, k_pack elements per step."""
    _, steps, nb, kp = shape
    k = cfg.k
    size = shape[0] * steps * nb
    together = kp == 2 and k % 2 == 0  # a pair is one 32-bit element on both sides
    source = e.flat(table, size, "int32") if together else e.flat(table, size * kp)
    target = e.flat(out, t * k // 2, "int32") if together else e.flat(out, t * k)
    width = 1 if together else kp
    row_size = k // 2 if together else k

    def body(r: Any) -> None:
        row = e.let(e.i64(ids[r]))
        begin = e.let((row // nb * steps * nb + row % nb) * width)
        with e.loop(row_size // width) as j:
            for p in range(width):
                e.store(target, r * row_size + j * width + p, source[begin + j * nb * width + p], 1)
        for p in range(row_size % width):
            j = row_size // width
            e.store(target, r * row_size + j * width + p, source[begin + j * nb * width + p], 1)

    _each_row(t, caps, body)
