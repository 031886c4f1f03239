"""Rotating heads where they lie, and appending keys and values to their pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.ops import HeadsAttrs, Run
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_pools import Pools
from llmc.schedules.kv_codes import HeadWriter
from llmc.schedules.norm import along, sum_along

_SERIAL_TOKENS = 4  # so few tokens cost less than a parallel launch


@dataclass(frozen=True)
class HeadSource:
    """A tensor and the heads in it.

    Attributes:
        shape: -1 = the number of tokens.
        dtype: of the tensor.
        attrs: where the heads lie, their norm and rotation.
        vector_dtype: of the norm's weight and bias.
    """

    shape: tuple[int, ...]
    dtype: str
    attrs: HeadsAttrs
    vector_dtype: str = "float32"


@dataclass(frozen=True)
class RopeConfig:
    """q, k and v of an attention block as llmc.heads (llmc/ops.py).

    Attributes:
        attention: of the block.
        q, k, v: where the heads lie; k and v are None if the block reads the cache of another. Of latents there is no v, and
            perhaps no q: then it is rotated already.
        tensors: shapes of the coefficient tensors (none, one or two), -1 = the number of tokens; dtype theirs.
        tensor_dtype: of the coefficients.
    """

    attention: AttentionConfig
    q: HeadSource | None
    k: HeadSource | None
    v: HeadSource | None
    tensors: tuple[tuple[int, ...], ...]
    tensor_dtype: str

    @property
    def named(self) -> tuple[tuple[str, HeadSource | None], ...]:
        return (("q", self.q), ("k", self.k), ("v", self.v))

    @property
    def sources(self) -> tuple[HeadSource, ...]:
        return tuple(s for _, s in self.named if s is not None)

    def place(self, name: str) -> int:
        """Number of q, k or v among the sources."""
        return [n for n, s in self.named if s is not None].index(name)

    @property
    def operands(self) -> int:
        """Tensors that are read, before the slots."""
        return len(self.tensors) + sum(1 + source.attrs.vectors for source in self.sources)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class HeadsConfig(Protocol):
    """Heads in tensors, and the coefficients that they are rotated by; see RopeConfig."""

    @property
    def sources(self) -> tuple[HeadSource, ...]: ...
    @property
    def tensors(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def tensor_dtype(self) -> str: ...


class HeadOperands:
    """Arguments of a kernel that reads heads, in order: each source's tensor and the vectors of its norm, coefficients."""

    def __init__(self, cfg: HeadsConfig, caps: Capabilities, t: Any, names: Sequence[str] = ("x",)) -> None:
        self.heads, self.caps, self.t = cfg, caps, t
        self._sources, self._vectors = [], []
        for name, s in zip(names, cfg.sources, strict=True):
            self._sources.append(e.tensor(f"{name}_source", [t if d < 0 else d for d in s.shape], s.dtype))
            width = s.attrs.norm_width
            of_norm = [e.tensor(f"{name}_norm_{i}", [width], s.vector_dtype) for i in range(s.attrs.vectors)]
            self._vectors.append(of_norm)
        self._tensors = [
            e.tensor(f"coefficients_{i}", [t if d < 0 else d for d in shape], cfg.tensor_dtype)
            for i, shape in enumerate(cfg.tensors)
        ]

    def view(self) -> None:
        """Make the flat views; inside the root block."""
        self.sources = [self.view_of(i) for i in range(len(self._sources))]
        self.vectors = [
            [e.flat(b, s.attrs.norm_width) for b in of_norm]
            for of_norm, s in zip(self._vectors, self.heads.sources, strict=True)
        ]
        self.tensors = [
            e.flat(b, self._size(shape)) for b, shape in zip(self._tensors, self.heads.tensors, strict=True)
        ]

    def view_of(self, which: int, dtype: str | None = None) -> Any:
        """A source's tensor; with `dtype` in elements of twice the size."""
        size = self._size(self.heads.sources[which].shape)
        return e.flat(self._sources[which], size // 2 if dtype else size, dtype)

    def _size(self, shape: tuple[int, ...]) -> Any:
        return _product([self.t if d < 0 else d for d in shape])

    def rotate(self, which: int, token: Any, head: Any, store: Callable[[Any, Any, int], None]) -> None:
        """Compute a head of a token: store(first element, float32 values, lanes).

        Args:
            which: number of the source.
        """
        attrs = self.heads.sources[which].attrs
        stride = attrs.head_stride * self.t if attrs.head_major else e.i64(attrs.head_stride)
        base = e.let(token * attrs.token_stride + head * stride + attrs.offset)
        line = self._normalised(which, base) if attrs.norm is not None else None
        source, dtype = self.sources[which], self.heads.sources[which].dtype
        for run in attrs.runs:
            if run.a < attrs.norm_width:
                read = lambda at, lanes: self._read(line, at, lanes, "float32")  # noqa: E731
            else:
                read = lambda at, lanes: self._read(source, base + at, lanes, dtype)  # noqa: E731
            steps = (run.to_step, run.a_step, run.b_step, run.ca_step, run.cb_step)
            plain = all(s == 1 for s in (steps if run.pair else steps[:2]))
            lanes = self.caps.lanes_f32 if plain else 1
            whole = run.count // lanes * lanes
            if whole:
                with e.loop(whole // lanes) as i:
                    at = e.let(i * lanes)
                    store(run.to + at * run.to_step, self._value(run, read, token, at, lanes), lanes)
            if whole < run.count:
                with e.loop(whole, run.count) as i:
                    store(run.to + i * run.to_step, self._value(run, read, token, i, 1), 1)

    def _normalised(self, which: int, base: Any) -> Any:
        """A head after its norm, float32, not rounded in between."""
        source, attrs = self.heads.sources[which], self.heads.sources[which].attrs
        norm, width = attrs.norm, attrs.norm_width
        assert norm is not None
        line = e.workspace(width)

        def centered(at: Any, lanes: int, mean: Any) -> Any:
            value = self._read(self.sources[which], base + at, lanes, source.dtype)
            return e.let(value if mean is None else value - e.splat(mean, lanes))

        def mean_of(term: Callable[[Any, int], Any]) -> Any:
            return e.let(sum_along(width, self.caps, term) * e.f32(1.0 / width))

        def square(at: Any, lanes: int) -> Any:
            value = centered(at, lanes, mean)
            return value * value

        mean = mean_of(lambda at, lanes: centered(at, lanes, None)) if norm.center else None
        scale = e.let(e.f32(1.0) / T.sqrt(mean_of(square) + e.f32(norm.eps)))

        def write(at: Any, lanes: int) -> None:
            value = centered(at, lanes, mean) * e.splat(scale, lanes)
            vectors = [self._read(v, at, lanes, source.vector_dtype) for v in self.vectors[which]]
            if norm.has_weight:
                weight = vectors.pop(0)
                value = value * (weight + e.splat(1.0, lanes) if norm.plus_one else weight)
            if norm.has_bias:
                value = value + vectors.pop(0)
            e.store(line, at, e.let(value), lanes)

        along(width, self.caps, write)
        return line

    def _value(self, run: Run, read: Callable[[Any, int], Any], token: Any, at: Any, lanes: int) -> Any:
        x = lambda first, step: read(first + at * step, lanes)  # noqa: E731
        if not run.pair:
            return e.let(x(run.a, run.a_step))

        def coefficient(number: int, first: int, step: int) -> Any:
            row = token * self.heads.tensors[number][-1]
            return self._read(self.tensors[number], row + first + at * step, lanes, self.heads.tensor_dtype)

        left = e.let(x(run.a, run.a_step) * coefficient(run.ca_of, run.ca, run.ca_step))
        right = e.let(x(run.b, run.b_step) * coefficient(run.cb_of, run.cb, run.cb_step))
        return e.let(left + right if run.sign > 0 else left - right)

    def _read(self, buffer: Any, at: Any, lanes: int, dtype: str) -> Any:
        return e.widen(e.load(buffer, at, lanes) if lanes > 1 else buffer[at], dtype, lanes)


class RopeOperands(HeadOperands):
    """Arguments of a rotating kernel: of q, k and v as far as there are such, as HeadOperands.

    The caller adds [slot, pools, layer].
    """

    def __init__(self, cfg: RopeConfig, caps: Capabilities, t: Any) -> None:
        super().__init__(cfg, caps, t, [name for name, s in cfg.named if s is not None])
        self.cfg = cfg

    def rotate_head(self, name: str, token: Any, head: Any, store: Callable[[Any, Any, int], None]) -> None:
        """rotate() of q, k or v."""
        self.rotate(self.cfg.place(name), token, head, store)


def append_token(ops: RopeOperands, slots: Any, pools: Pools, layer: Any, token: Any, head: Any) -> None:
    """Write one cached head of a token: its rotated key and its value."""
    cfg, caps = ops.cfg.attention, ops.caps
    to = HeadWriter(cfg, caps, pools, e.let(e.i64(slots[token])), layer, head)
    if cfg.coded:
        for name, dim, write in (("k", cfg.key_dim, to.coded_key), ("v", cfg.value_dim, to.coded_value)):
            line = e.workspace(dim)
            ops.rotate_head(name, token, head, partial(_keep_rounded, cfg, caps, line))
            write(line)
        return
    line = e.workspace(cfg.key_dim)  # keys are dim-major: the rotated head is scattered

    def element(d: Any) -> Any:
        value = line[d]
        if cfg.dtype != "float32" and cfg.dtype != cfg.kv_dtype:  # as if the key had been stored in between
            value = e.widen(e.let(e.narrow(e.let(value), cfg.dtype, 1, caps)), cfg.dtype, 1)
        return e.narrow(e.let(value), cfg.kv_dtype, 1, caps)

    ops.rotate_head("k", token, head, lambda first, value, lanes: e.store(line, first, value, lanes))
    to.key(element)

    def narrowed(store: Callable[[Any, Any, int], None]) -> None:
        def keep(first: Any, value: Any, lanes: int) -> None:
            store(first, e.narrow(value, cfg.kv_dtype, lanes, caps), lanes)

        ops.rotate_head("v", token, head, keep)

    if not cfg.latent:
        to.value(narrowed)


def _keep_rounded(
    cfg: AttentionConfig, caps: Capabilities, line: Any, first: Any, value: Any, lanes: int
) -> None:
    """Elements of a head in float32, as if they had been stored in the model's type."""
    value = e.let(value)
    if cfg.dtype != "float32":
        value = e.widen(e.let(e.narrow(value, cfg.dtype, lanes, caps)), cfg.dtype, lanes)
    e.store(line, first, value, lanes)


def append_all(ops: RopeOperands, slots: Any, pools: Pools, layer: Any) -> None:
    """append_token for every token and cached head."""
    hk = ops.cfg.attention.kv_heads
    each_token(ops.t, hk, ops.caps, lambda token, head: append_token(ops, slots, pools, layer, token, head))


def each_token(t: Any, heads: int, caps: Capabilities, body: Callable[[Any, Any], None]) -> None:
    """body(token, head): over the threads when there are many tokens."""
    with T.If(t <= _SERIAL_TOKENS):
        # the annotation of a parallel loop brings in the conversion functions; a serial loop needs it too
        with T.Then(), e.loop(heads * t, annotations=e.import_text(caps)) as i:
            body(e.let(i // heads), e.let(i % heads))
        with T.Else(), e.parallel(heads * t, caps) as i:
            body(e.let(i // heads), e.let(i % heads))


def rope_append(cfg: RopeConfig, caps: Capabilities) -> Any:
    """The PrimFunc (q's tensor, [k's, v's], coefficients.., [slot i32[T], k_pool, v_pool, layer], q[1,T,h,dk]).

    Rotates q to its own tensor, and, with k and v, appends them to the pools in place. Of latents there is no v and no
    v_pool; without q there is none among arguments and results.
    """
    a = cfg.attention
    dk = a.key_dim
    built: list[Any] = []
    with e.kernel(built):
        t, pages = e.dim("T"), e.dim("P")
        ops = RopeOperands(cfg, caps, t)
        if cfg.k is not None:
            slot = e.tensor("slot", [t], "int32")
            k_pool = e.tensor("k_pool", [pages, a.layers, a.kv_heads, *a.k_page], a.pool_dtype)
            v_shape = [pages, a.layers, a.kv_heads, *a.v_page]
            v_pool = None if a.latent else e.tensor("v_pool", v_shape, a.pool_dtype)
            layer = e.scalar_arg("layer")
        q = None if cfg.q is None else e.tensor("q", [1, t, a.heads, dk], a.dtype)
        with e.root():
            ops.view()
            out = None if q is None else e.flat(q, t * a.heads * dk)
            if cfg.k is not None:
                slots = e.flat(slot, t)
                append_all(ops, slots, Pools(a, pages, k_pool, v_pool), layer)

            def query(token: Any, head: Any) -> None:
                base = e.let((token * a.heads + head) * dk)
                rotate_query(ops, token, head, out, base)

            if out is not None:
                each_token(t, a.heads, caps, query)
    return built[0]


def rotate_query(ops: RopeOperands, token: Any, head: Any, out: Any, base: Any) -> None:
    """Write a rotated head of q to out[base:], in q's dtype."""

    def store(first: Any, value: Any, lanes: int) -> None:
        e.store(out, base + first, e.narrow(value, ops.cfg.attention.dtype, lanes, ops.caps), lanes)

    ops.rotate_head("q", token, head, store)


def _product(values: list[Any]) -> Any:
    out: Any = e.i64(1)
    for v in values:
        out = out * v
    return out
