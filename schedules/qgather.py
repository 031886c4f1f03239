"""Token embeddings from a quantized table: the packed weight of a tied head, or a table of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.iactivations import Outliers
from llmc.schedules.qcodes import QuantCodes
from llmc.schedules.qlayout import QuantLayout

_SERIAL_ROWS = 4  # a parallel launch costs more than unpacking this many rows


@dataclass(frozen=True)
class QuantEmbeddingConfig:
    """out[T, k] = dequantize(table)[ids[T], :].

    Attributes:
        layout: of the table; rows are its n.
        dtype: of the result.
        ids_dtype: int32 or int64.
        lead: unit dimensions before T in ids and result.
    """

    layout: QuantLayout
    dtype: str
    ids_dtype: str = "int32"
    lead: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> QuantEmbeddingConfig:
        return QuantEmbeddingConfig(**{**values, "layout": QuantLayout(**values["layout"])})


def quant_embedding(cfg: QuantEmbeddingConfig, caps: Capabilities) -> Any:
    """The PrimFunc (ids[1 x lead, T], table, out[1 x lead, T, k]); ids must lie in [0, rows)."""
    layout = cfg.layout
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ones = [1] * cfg.lead
        ids = e.tensor("ids", [*ones, t], cfg.ids_dtype)
        table = e.tensor("table", list(layout.packed_shape), "uint8")
        out = e.tensor("out", [*ones, t, layout.k], cfg.dtype)
        with e.root():
            idf, to = e.flat(ids, t), e.flat(out, t * layout.k)
            codes = QuantCodes(caps, layout, table, layout.size)
            outliers = Outliers(layout, table) if layout.outliers else None

            def row(r: Any) -> None:
                index = e.let(e.i64(idf[r]))
                lane = e.let(index % layout.n_block)
                base = e.let(index // layout.n_block * layout.block_bytes)
                _row(codes, base, lane, to, r, cfg.dtype, caps)
                if outliers is not None:
                    with e.loop(layout.outliers) as j:
                        value = e.narrow(outliers.weights(base, j, lane, 1), cfg.dtype, 1, caps)
                        e.store(to, r * layout.k + outliers.column(j), value, 1)

            with T.If(t <= _SERIAL_ROWS):
                with T.Then(), e.loop(t) as r:
                    row(r)
                with T.Else(), T.parallel(t, annotations=codes.import_text()) as r:
                    row(r)
    return built[0]


def _row(codes: QuantCodes, base: Any, lane: Any, out: Any, r: Any, dtype: str, caps: Capabilities) -> None:
    """One lane of the block at `base` into row r."""
    layout, of = codes.layout, codes.layout.of
    with e.loop(layout.padded_k // layout.piece) as p:
        place = codes.place(base, p)
        scale = e.let(codes.scale(place.scales, lane, 1, place.tops))
        first = e.let(p * layout.piece)
        with e.loop(T.max(e.i64(0), T.min(e.i64(layout.piece), layout.k - first))) as j:
            value = codes.value(place, j, lane)
            if of.offsets:
                value = (value + e.f32(codes.half)) * scale + codes.offset(place, lane, 1)
            else:
                value = (value if of.symmetric else value - codes.zero(place, lane, 1)) * scale
            column = first + j
            if codes.order is not None:
                column = e.i64(codes.order[layout.list_at // 4 + column])
            e.store(out, r * layout.k + column, e.narrow(value, dtype, 1, caps), 1)
