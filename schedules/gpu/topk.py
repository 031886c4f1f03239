"""The largest elements of rows, in order: a warp per row, one element after another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g


@dataclass(frozen=True)
class TopKConfig:
    """values[.., k], indices[.., k] of x[.., n]: its largest (smallest) elements, first of equal ones first.

    Attributes:
        shape: of x; -1 = the symbolic dimension.
        k: how many.
        largest: or the smallest.
        dtype: of x and values; index_dtype: of indices.
    """

    shape: tuple[int, ...]
    k: int
    largest: bool
    dtype: str
    index_dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def top_k(cfg: TopKConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x, values, indices). NaN are never chosen before the numbers are used up; k is at most n."""
    n, k = cfg.shape[-1], cfg.k
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        dims = [t if d < 0 else d for d in cfg.shape]
        rows = e.i64(1)
        for d in dims[:-1]:
            rows = rows * (d if not isinstance(d, int) else e.i64(d))
        x = g.tensor("x", dims, cfg.dtype)
        values = g.tensor("values", [*dims[:-1], k], cfg.dtype)
        indices = g.tensor("indices", [*dims[:-1], k], cfg.index_dtype)
        with e.root():
            source, to = e.flat(x, rows * n), e.flat(values, rows * k)
            numbers = e.flat(indices, rows * k)
            with g.launch(rows, g.WARP) as (row, thread):
                best, index = g.local(1), g.local(1, "int32")
                last, last_index = g.local(1), g.local(1, "int32")
                e.store(last, 0, e.f32(float("inf")), 1)
                e.store(last_index, 0, g.i32(-1), 1)
                with g.loop(k) as i:
                    e.store(best, 0, e.f32(float("-inf")), 1)
                    e.store(index, 0, g.i32(n), 1)

                    def look(j: Any) -> None:
                        value, number = e.let(_key(cfg, source[row * n + j])), e.let(g.i32(j))
                        behind = _before(last[0], last_index[0], value, number)
                        with g.when(T.And(behind, _before(value, number, best[0], index[0]))):
                            e.store(best, 0, value, 1)
                            e.store(index, 0, number, 1)

                    g.strided(thread, n, g.WARP, look)
                    offset = g.WARP // 2
                    while offset:
                        value, number = e.let(g.across(best[0], offset)), e.let(g.across(index[0], offset))
                        with g.when(_before(value, number, best[0], index[0])):
                            e.store(best, 0, value, 1)
                            e.store(index, 0, number, 1)
                        offset //= 2
                    e.store(last, 0, best[0], 1)
                    e.store(last_index, 0, index[0], 1)
                    with g.when(thread == 0):
                        chosen = T.min(index[0], g.i32(n - 1))
                        e.store(to, row * k + i, source[row * n + chosen], 1)
                        e.store(numbers, row * k + i, tirx.Cast(cfg.index_dtype, chosen), 1)
    return built[0]


def _key(cfg: TopKConfig, value: Any) -> Any:
    """float32 that is larger for what comes first."""
    wide = e.widen(value, cfg.dtype, 1)
    return wide if cfg.largest else e.f32(0.0) - wide


def _before(value: Any, index: Any, other: Any, other_index: Any) -> Any:
    """Whether an element comes before another one."""
    return T.Or(value > other, T.And(value == other, index < other_index))
