"""What each kernel moves and computes: KernelCost of a configuration, and of a PrimFunc that Relax made.

Bytes are what a kernel has to move at least: each operand once, scratch not at all. A prefill that reads a page again for
the next tile of queries finds it in a cache, if the cache is large enough.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import tvm
from tvm import tirx

from llmc.kernel_work import Formula, KernelCost, smaller
from llmc.kv_plan import entry_bytes
from llmc.ops import NormAttrs
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.choice import Scheduled
from llmc.schedules.experts import ExpertConfig
from llmc.schedules.gather import EmbeddingConfig, GatherConfig
from llmc.schedules.gpu.topk import TopKConfig
from llmc.schedules.head_linear import HeadLinearConfig
from llmc.schedules.linear import LinearConfig
from llmc.schedules.norm import NormConfig
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qgather import QuantEmbeddingConfig
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.rope import RopeConfig
from llmc.schedules.rules import visit

COST = "llmc.cost"  # attribute of a PrimFunc: KernelCost.as_text()


@singledispatch
def kernel_cost(config: Any) -> KernelCost:
    """The cost of the kernel that is made from `config`; of an unknown one only its name."""
    return KernelCost(type(config).__name__.removesuffix("Config"))


@kernel_cost.register
def _(config: Scheduled) -> KernelCost:
    return kernel_cost(config.config)


@kernel_cost.register
def _(config: LinearConfig) -> KernelCost:
    return KernelCost("linear", _matmul(config.n, config.k, config.gated))


@kernel_cost.register
def _(config: QuantLinearConfig) -> KernelCost:
    return KernelCost(f"linear {config.layout.scheme}", _matmul(config.n, config.layout.k, config.gated))


@kernel_cost.register
def _(config: ExpertConfig) -> KernelCost:
    size = itemsize(config.weight_dtype) * config.n * config.k
    return _experts("experts", config.experts, config.n, config.k, size)


@kernel_cost.register
def _(config: QuantExpertConfig) -> KernelCost:
    layout = config.layout
    return _experts(f"experts {layout.scheme}", config.experts, layout.n, layout.k, layout.size)


@kernel_cost.register
def _(config: TopKConfig) -> KernelCost:
    return KernelCost(f"top {config.k}")


@kernel_cost.register
def _(config: NormConfig) -> KernelCost:
    attrs = config.attrs
    parts = [_norm_name(attrs.before)] if attrs.before else []
    parts += ["add"] if attrs.adds else []
    parts += [] if attrs.only_sum else [_norm_name(attrs)]
    each = attrs.adds + sum(
        _norm_operations(n) for n in (attrs.before, None if attrs.only_sum else attrs) if n
    )
    return KernelCost(" + ".join(parts), Formula.of(each * config.shape[-1], "N"))


@kernel_cost.register
def _(config: EmbeddingConfig) -> KernelCost:
    return KernelCost("embedding", read=((1, Formula.of(config.k * itemsize(config.dtype), "N")),))


@kernel_cost.register
def _(config: QuantEmbeddingConfig) -> KernelCost:
    layout = config.layout
    row = Formula.of(layout.size / layout.n, "N")
    return KernelCost(f"embedding {layout.scheme}", Formula.of(2 * layout.k, "N"), read=((1, row),))


@kernel_cost.register
def _(config: GatherConfig) -> KernelCost:
    return KernelCost("gather", read=((0, Formula.of(config.k * itemsize(config.dtype), "N")),))


@kernel_cost.register
def _(config: RopeConfig) -> KernelCost:
    first = config.operands + 1  # of the pools, behind the slots
    pools = () if config.k is None else _appended(config.attention, first)
    return KernelCost("rope" if config.k is None else "rope + append", _rotation(config), written=pools)


@kernel_cost.register
def _(config: HeadLinearConfig) -> KernelCost:
    rest = config.attrs.rest
    turned = sum(3 * run.count for run in rest.runs if run.pair) if rest else 0
    # a row of the result is a head of a token
    operations = Formula.of(2 * config.n * config.k + turned, "N")
    return KernelCost("head linear", operations)


def append_cost(config: AttentionConfig) -> KernelCost:
    """Of kv_append."""
    return KernelCost("append", written=_appended(config, 2 if config.latent else 3))


def attention_cost(config: AttentionConfig, rope: RopeConfig | None = None) -> KernelCost:
    """Of attention_prefill, and of attention_decode with or without a rotation in it."""
    window = config.window or config.chunk
    cached, pairs = (f"{s}{window or ''}" for s in "CP")
    keys, values = (
        config.kv_heads * entry_bytes(config.kv_dtype, dim) for dim in (config.key_dim, config.value_dim)
    )
    operations = Formula.of(2 * config.heads * (config.key_dim + config.value_dim), pairs)
    at, kind = 1, "attention"
    written: tuple[tuple[int, Formula], ...] = ()
    if rope is not None:
        at = rope.operands + (rope.q is None)
        parts = ["norm"] * any(s.attrs.norm is not None for s in rope.sources)
        parts += ["rope"] * any(s.attrs.rotates for s in rope.sources) + ["append"] * (rope.k is not None)
        kind = " + ".join([*parts, kind])
        operations += _rotation(rope)
        if rope.k is not None:
            at += 1
            written = _appended(config, at)
    read = [(at, Formula.of(keys, cached))]
    if not config.latent:
        read.append((at + 1, Formula.of(values, cached)))
    read.append((at + len(read) + 2, Formula()))  # the block table
    # the second result is scratch
    return KernelCost(kind, operations, tuple(read), (*written, (-2, Formula())))


def prim_func_cost(func: Any) -> KernelCost:
    """Of a PrimFunc with blocks, by counting: floating-point operations of each block, as often as it runs."""
    symbols: dict[Any, str] = {}
    for i, param in enumerate(func.params):
        for j, dim in enumerate(getattr(param.ty, "shape", ())):
            if isinstance(dim, tirx.Var):
                symbols.setdefault(dim, f"D{i}_{j}")
    operations, reduces = Formula(), False

    def count(node: Any) -> None:
        nonlocal operations, reduces
        if not isinstance(node, tvm.s_tir.SBlock) or not node.iter_vars:
            return
        size = Formula.of(1)
        for iv in node.iter_vars:
            size = size * dim_formula(iv.dom.extent, symbols)
            reduces = reduces or iv.iter_type == tirx.IterVar.CommReduce
        operations += size * _float_operations(node.body)

    visit(func.body, count)
    kind = "reduction" if reduces else "elementwise" if operations.terms else "copy"
    return KernelCost(kind, operations)


def dim_formula(dim: Any, symbols: dict[Any, str]) -> Formula:
    """A dimension as a formula; divisions are taken as exact. Unknown variables count as nothing."""
    if isinstance(dim, (int, tirx.IntImm)):
        return Formula.of(int(dim))
    if isinstance(dim, tirx.Var):
        return Formula.of(1, symbols[dim]) if dim in symbols else Formula()
    if isinstance(dim, (tirx.Add, tirx.Sub, tirx.Mul)):
        a, b = dim_formula(dim.a, symbols), dim_formula(dim.b, symbols)
        return a * b if isinstance(dim, tirx.Mul) else a + b * (1 if isinstance(dim, tirx.Add) else -1)
    if isinstance(dim, (tirx.FloorDiv, tirx.Div)) and isinstance(dim.b, tirx.IntImm):
        return dim_formula(dim.a, symbols) * (1 / int(dim.b))
    return Formula()


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return int(tvm.DataType(dtype).itemsize)


_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Min, tirx.Max)


def _float_operations(body: Any) -> int:
    found = 0

    def count(node: Any) -> None:
        nonlocal found
        dtype = str(getattr(getattr(node, "ty", None), "dtype", ""))
        found += "float" in dtype and isinstance(node, (*_ARITHMETIC, tvm.ir.Call))

    visit(body, count)
    return found


def _norm_name(attrs: NormAttrs) -> str:
    return "layer norm" if attrs.center else "rms norm"


def _norm_operations(attrs: NormAttrs) -> int:
    """Per element: square and sum, scale; what is optional."""
    return 3 + 2 * attrs.center + attrs.vectors + attrs.plus_one


def _matmul(n: int, k: int, gated: bool) -> Formula:
    return Formula.of(2 * n * k * (2 if gated else 1), "N")


def _experts(kind: str, experts: int, n: int, k: int, size: int) -> KernelCost:
    used = smaller(experts, Formula.of(1, "N"))
    return KernelCost(kind, Formula.of(2 * n * k, "N"), read=((2, Formula.of(size, used)),))


def _rotation(config: RopeConfig) -> Formula:
    each = 0
    for attrs in (source.attrs for source in config.sources):
        each += attrs.heads * (sum(3 * run.count for run in attrs.runs if run.pair) + 4 * attrs.norm_width)
    return Formula.of(each, "T")


def _appended(config: AttentionConfig, at: int) -> tuple[tuple[int, Formula], ...]:
    keys, values = (
        config.kv_heads * entry_bytes(config.kv_dtype, dim) for dim in (config.key_dim, config.value_dim)
    )
    appended = (at, Formula.of(keys, "T"))
    return (appended,) if config.latent else (appended, (at + 1, Formula.of(values, "T")))
