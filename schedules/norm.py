"""RMSNorm and LayerNorm along rows, with the addition before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.ops import NormAttrs
from llmc.schedules import emit as e

_PARALLEL_ELEMENTS = 16384  # below that, waking the other threads costs more


@dataclass(frozen=True)
class NormConfig:
    """y = (x - mean) / sqrt(var + eps) * weight + bias along the last axis; see NormAttrs in llmc/ops.py.

    Attributes:
        shape: of x and y; -1 = the symbolic dimension.
        dtype: of x, its addend, the sum and y.
        weight_dtype: of weight and bias.
        attrs: what is computed; the addend's norm is not rounded before it is added.
    """

    shape: tuple[int, ...]
    dtype: str
    weight_dtype: str
    attrs: NormAttrs

    @property
    def vectors(self) -> int:
        """Operands behind x and its addend."""
        own = 0 if self.attrs.only_sum else self.attrs.vectors
        return own + (self.attrs.before.vectors if self.attrs.before else 0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> NormConfig:
        return NormConfig(
            **{**values, "shape": tuple(values["shape"]), "attrs": NormAttrs.of(values["attrs"])}
        )


def norm(cfg: NormConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x, [addend], [the addend's weight[k], bias[k]], [weight[k]], [bias[k]], [sum], [y]); sums are float32."""
    attrs, k = cfg.attrs, cfg.shape[-1]
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        rows = e.i64(1)
        for d in cfg.shape[:-1]:
            rows = rows * (t if d < 0 else e.i64(d))
        dims = [t if d < 0 else d for d in cfg.shape]
        x = e.tensor("x", dims, cfg.dtype)
        addend = e.tensor("addend", dims, cfg.dtype) if attrs.adds else None
        vectors = [e.tensor(f"vector_{i}", [k], cfg.weight_dtype) for i in range(cfg.vectors)]
        total = e.tensor("sum", dims, cfg.dtype) if attrs.adds else None
        y = e.tensor("y", dims, cfg.dtype) if not attrs.only_sum else None
        with e.root():
            views = [e.flat(b, rows * k) if b is not None else None for b in (x, addend, total, y)]
            flat = [e.flat(b, k) for b in vectors]

            def row(r: Any) -> None:
                _row(cfg, caps, e.let(r * k), views, flat)

            with T.If(rows * k <= _PARALLEL_ELEMENTS):
                # the annotation of a parallel loop brings in the conversion functions; a serial loop needs it too
                with T.Then(), e.loop(rows, annotations=e.import_text(caps)) as r:
                    row(r)
                with T.Else(), e.parallel(rows, caps) as r:
                    row(r)
    return built[0]


def _row(cfg: NormConfig, caps: Capabilities, base: Any, views: list[Any], vectors: list[Any]) -> None:
    attrs, k = cfg.attrs, cfg.shape[-1]
    x, addend, total, y = views
    if addend is not None:
        value_of = lambda j, n: _read(addend, base + j, n, cfg.dtype)  # noqa: E731
        if attrs.before is not None:
            count = attrs.before.vectors
            value_of = _normalised(cfg, caps, attrs.before, base, addend, vectors[:count])
            vectors = vectors[count:]

        def add(j: Any, n: int) -> None:
            value = _read(x, base + j, n, cfg.dtype) + value_of(j, n)
            e.store(total, base + j, e.narrow(e.let(value), cfg.dtype, n, caps), n)

        along(k, caps, add)
        x = total
    if y is None:
        return
    normalised = _normalised(cfg, caps, attrs, base, x, vectors)
    along(
        k, caps, lambda j, n: e.store(y, base + j, e.narrow(e.let(normalised(j, n)), cfg.dtype, n, caps), n)
    )


def _normalised(
    cfg: NormConfig, caps: Capabilities, attrs: NormAttrs, base: Any, x: Any, vectors: list[Any]
) -> Callable[[Any, int], Any]:
    """(first, lanes) -> elements of the norm of a row, float32; the row's mean and variance are computed here."""
    k = cfg.shape[-1]
    mean = None
    if attrs.center:
        mean = e.let(sum_along(k, caps, lambda j, n: _read(x, base + j, n, cfg.dtype)) * e.f32(1.0 / k))

    def centered(j: Any, n: int) -> Any:
        value = _read(x, base + j, n, cfg.dtype)
        return e.let(value - e.splat(mean, n) if mean is not None else value)

    def square(j: Any, n: int) -> Any:
        value = centered(j, n)
        return value * value

    variance = e.let(sum_along(k, caps, square) * e.f32(1.0 / k))
    scale = e.let(e.f32(1.0) / T.sqrt(variance + e.f32(attrs.eps)))

    def element(j: Any, n: int) -> Any:
        value = centered(j, n) * e.splat(scale, n)
        if attrs.rounds_first and cfg.dtype != "float32":
            value = e.widen(e.let(e.narrow(e.let(value), cfg.dtype, n, caps)), cfg.dtype, n)
        rest = list(vectors)
        if attrs.has_weight:
            factor = _read(rest.pop(0), j, n, cfg.weight_dtype)
            value = value * (factor + e.splat(1.0, n) if attrs.plus_one else factor)
        if attrs.has_bias:
            value = value + _read(rest.pop(0), j, n, cfg.weight_dtype)
        return value

    return element


def _read(buffer: Any, at: Any, n: int, dtype: str) -> Any:
    return e.widen(e.load(buffer, at, n) if n > 1 else buffer[at], dtype, n)


def along(k: int, caps: Capabilities, body: Callable[[Any, int], None]) -> None:
    """body(first, lanes) for all elements of a row."""
    lanes = caps.lanes_f32
    with e.loop(k // lanes) as i:
        body(e.let(i * lanes), lanes)
    if k % lanes:
        with e.loop(k // lanes * lanes, k) as j:
            body(j, 1)


def sum_along(k: int, caps: Capabilities, term: Callable[[Any, int], Any]) -> Any:
    """Sum of a row's terms: four vectors side by side, as an addition takes four cycles."""
    lanes = caps.lanes_f32
    parts = [e.scratch(lanes) for _ in range(4)]
    for part in parts:
        e.store(part, 0, e.splat(0.0, lanes), lanes)

    def take(part: Any, at: Any) -> None:
        e.store(part, 0, e.load(part, 0, lanes) + term(at, lanes), lanes)

    whole = k // (4 * lanes)
    with e.loop(whole) as i:
        for p, part in enumerate(parts):
            take(part, e.let(i * (4 * lanes) + p * lanes))
    with e.loop(4 * whole, k // lanes) as i:
        take(parts[0], e.let(i * lanes))
    both = (e.load(parts[0], 0, lanes) + e.load(parts[1], 0, lanes)) + (
        e.load(parts[2], 0, lanes) + e.load(parts[3], 0, lanes)
    )
    out = e.scratch(1)
    e.store(out, 0, e.fold(e.let(both), lanes, lambda a, b: a + b), 1)
    if k % lanes:
        with e.loop(k // lanes * lanes, k) as j:
            e.store(out, 0, out[0] + term(j, 1), 1)
    return e.let(out[0])
