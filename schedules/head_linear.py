"""Each head of a tensor times a weight of its own, with heads read and written where they lie."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.ops import HeadLinearAttrs, HeadsAttrs
from llmc.schedules import emit as e
from llmc.schedules.epilogue import Epilogue
from llmc.schedules.layout import BlockedLayout, linear_layout
from llmc.schedules.micro_kernel import MicroKernel, for_tiles, weight_view
from llmc.schedules.rope import HeadOperands, HeadSource


@dataclass(frozen=True)
class HeadLinearConfig:
    """llmc.head_linear (llmc/ops.py): y[t, head, :n] = weight[head] @ x[t, head]; y[t, head, n:] = the rest of the head.

    Attributes:
        attrs: where heads of x lie, and what follows the product.
        n, k: of the weight [heads, n, k].
        dtype: of x, weight and y.
        shape: of x, -1 = the number of tokens.
        tensors, tensor_dtype: of the coefficients that the rest is rotated by.
        layout: of each head's weight; None = linear_layout's.
        prefetch: bytes that the weight is asked for ahead of its use.
    """

    attrs: HeadLinearAttrs
    n: int
    k: int
    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[tuple[int, ...], ...] = ()
    tensor_dtype: str = "float32"
    layout: BlockedLayout | None = None
    prefetch: int = 2304

    @property
    def width(self) -> int:
        """Elements of a head of y."""
        return self.n + (self.attrs.rest.dim if self.attrs.rest else 0)

    @property
    def sources(self) -> tuple[HeadSource, ...]:
        """x, as HeadOperands has it."""
        a = self.attrs
        rest = a.rest or HeadsAttrs(a.heads, 0, a.offset, a.token_stride, a.head_stride, a.head_major, ())
        return (HeadSource(self.shape, self.dtype, rest),)

    def packed_shape(self, caps: Capabilities) -> tuple[int, ...]:
        layout = self.layout or linear_layout(self.dtype, caps)
        return (self.attrs.heads, *layout.packed_shape(self.n, self.k))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def head_linear(cfg: HeadLinearConfig, caps: Capabilities) -> Any:
    """The PrimFunc (x, [coefficients], w packed [heads, ...], y[1,T,heads,width]).

    A task is one weight block of one head: it is read once for all tokens.
    """
    layout = cfg.layout or linear_layout(cfg.dtype, caps)
    attrs, heads = cfg.attrs, cfg.attrs.heads
    _, blocks, steps, nb, kp = cfg.packed_shape(caps)
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        ops = HeadOperands(cfg, caps, t)
        w = e.tensor("w", list(cfg.packed_shape(caps)), cfg.dtype)
        y = e.tensor("y", [1, t, heads, cfg.width], cfg.dtype)
        with e.root():
            ops.view()
            out = e.flat(y, t * heads * cfg.width)
            wf = weight_view(w, heads * blocks * steps * nb * kp, kp == 2)
            # neighbouring columns are read as pairs where every head begins with a whole one
            places = (cfg.k, attrs.offset, attrs.token_stride, attrs.head_stride)
            unit = 2 if kp == 2 and all(v % 2 == 0 for v in places) else 1
            x = ops.view_of(0, "int32") if unit == 2 else ops.sources[0]
            micro = MicroKernel(caps, layout, cfg.dtype, cfg.k, x, wf, cfg.prefetch, paired=unit == 2)
            epilogue = Epilogue(cfg.n, nb, cfg.dtype, cfg.dtype, row_stride=cfg.width)
            with e.parallel(heads * blocks, caps) as task:
                head, block = e.let(task // blocks), e.let(task % blocks)
                step = e.i64(attrs.head_stride // unit)
                first = e.let(head * (step * t if attrs.head_major else step) + attrs.offset // unit)

                def tile(rows: int, start: Any) -> None:
                    at = [e.let(start + r) for r in range(rows)]
                    bases = [e.let(token * (attrs.token_stride // unit) + first) for token in at]
                    acc = micro.sums(rows, bases, e.let(task * (steps * nb)), steps)
                    epilogue.store_held(acc, [e.let(token * heads + head) for token in at], block, out, caps)

                for_tiles(micro.max_rows(), t, tile)
                if attrs.rest is not None:
                    with T.If(block == 0), T.Then(), e.loop(t) as token:
                        _rest(cfg, caps, ops, out, token, head)
    return built[0]


def _rest(
    cfg: HeadLinearConfig, caps: Capabilities, ops: HeadOperands, out: Any, token: Any, head: Any
) -> None:
    base = e.let((token * cfg.attrs.heads + head) * cfg.width + cfg.n)

    def store(first: Any, value: Any, lanes: int) -> None:
        e.store(out, base + first, e.narrow(value, cfg.dtype, lanes, caps), lanes)

    ops.rotate(0, token, head, store)
