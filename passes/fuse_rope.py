"""FuseRoPE: the way from a projection to an attention operand, rotation included, becomes one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax

from llmc import ir
from llmc.ops import ATTENTION, HEADS, NORM, HeadsAttrs, NormAttrs
from llmc.passes.head_elements import FLOATS, Elements, position_only, runs_of, split_part
from llmc.passes.rewrite import Builder, Graph, update_function
from llmc.passes.step_module import LoweredGraph


class FuseRoPE:
    """Say of each attention operand where its heads lie and how they are rotated.

    before: q = permute(reshape(y[..., :n]));  r = q * cos + concat(-q[..., d/2:], q[..., :d/2]) * sin;  attention(r, ...)
    after:  r = llmc.heads(y, cos, sin, {offset, strides, runs});  attention(r, ...)

    A norm of each head between the projection and the rotation (Qwen 3, Gemma 3) goes with it. Elements are traced
    symbolically, so that every arrangement is the same case: halves, interleaved, partial, complex products, and none. A
    rotated head is rounded once. MakeStepFunction turns q, k and v of a block into one kernel that also writes the pages,
    and SpecializeDecode takes that into the attention kernel. Runs after FuseQKV, whose slices it reads in place, and
    after FuseNorm. A block whose operands are anything else stays.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        elements = Elements(graph, position_only(graph))
        made: dict[Any, Any] = {}
        build = Builder()
        changed = False
        for binding in graph.bindings:
            match = ir.match_opaque(binding.value, ATTENTION)
            heads = [heads_of(graph, elements, v) for v in match[0][:3]] if match else []
            if match is None or not _fit(heads):
                build.keep(binding)
                continue
            changed = True
            new = []
            for var, found in zip(match[0][:3], heads, strict=True):
                source = graph.source(var)
                if source not in made:  # layers that share a cache must see one variable
                    assert found is not None
                    call = ir.opaque_call(
                        HEADS, [found.base, *found.vectors, *found.tensors], found.attrs.to_json(), source.ty
                    )
                    made[source] = build.emit(call, "heads")
                new.append(made[source])
            operands = [*new, *match[0][3:]]
            build.bind(binding.var, ir.opaque_call(ATTENTION, operands, match[1], binding.var.ty))
        if not changed:
            return lowered
        result = build.function(func.params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", result), lowered.params)


@dataclass(frozen=True)
class Heads:
    """Operands and attributes of an llmc.heads."""

    base: Any
    vectors: tuple[Any, ...]
    tensors: tuple[Any, ...]
    attrs: HeadsAttrs


def _fit(heads: list[Heads | None]) -> bool:
    """All were found, and the rotated ones take the same coefficients."""
    if any(h is None for h in heads):
        return False
    q, k, v = (h for h in heads if h is not None)
    return not v.tensors and (not q.tensors or not k.tensors or q.tensors == k.tensors)


def heads_of(graph: Graph, elements: Elements, var: Any) -> Heads | None:
    """An attention operand [1, h, T, d] as an llmc.heads; None if it is none."""
    dims = ir.dims(var)
    if len(dims) != 4 or not all(ir.is_constant(dims[i]) for i in (0, 1, 3)) or ir.is_constant(dims[2]):
        return None
    heads, dim = int(dims[1]), int(dims[3])
    found = runs_of(elements.of(var, 1))
    if found is None:
        return None
    x, tensors, runs = found
    norm, vectors = None, ()
    before = normalised(graph, x)
    if before is not None:
        x, vectors, norm = before
    view = view_of(graph, x, heads)
    if view is None or len({str(t.ty.dtype) for t in tensors}) > 1:
        return None
    base, offset, token, head, head_major = view
    if base in graph.func.params or str(base.ty.dtype) not in FLOATS:
        return None
    width = int(ir.dims(x)[-1]) if norm is not None else 0
    attrs = HeadsAttrs(heads, dim, offset, token, head, head_major, runs, norm, width)
    return Heads(base, vectors, tensors, attrs)


def normalised(graph: Graph, var: Any) -> tuple[Any, tuple[Any, ...], NormAttrs] | None:
    """(input, vectors, attributes) of the norm that `var` is the result of."""
    match = ir.match_opaque(graph.definition(var), NORM)
    if match is None:
        return None
    attrs = NormAttrs.from_json(match[1])
    vectors = tuple(graph.source(v) for v in match[0][1:])
    plain = all(v in graph.func.params or ir.is_tensor_constant(v) for v in vectors)
    if attrs.adds or not plain or len({str(v.ty.dtype) for v in vectors}) > 1:
        return None
    return graph.source(match[0][0]), vectors, attrs


def view_of(graph: Graph, var: Any, heads: int) -> tuple[Any, int, int, int, bool] | None:
    """(tensor, offset, token stride, head stride, head major) of [1, h, T, w] or [1, T, h, w], up to its computation."""
    dims = [d for d in ir.dims(var)]
    shape = [d for d in dims[:-1] if not ir.is_one(d)]
    width = int(dims[-1])
    unknown = [i for i, d in enumerate(shape) if not ir.is_constant(d)]
    fixed = [int(d) for d in shape if ir.is_constant(d)]
    if len(unknown) != 1 or fixed not in ([], [heads]) or (heads > 1) != bool(fixed):
        return None
    head_major = bool(fixed) and unknown[0] == 1
    offset, token, head = 0, width if head_major or not fixed else heads * width, width
    while True:
        var = graph.source(var)
        value = graph.definition(var)
        if ir.is_op(value, "relax.reshape"):
            var = value.args[0]
            continue
        if ir.is_op(value, "relax.permute_dims"):
            axes = [int(a) for a in value.attrs.axes or ()]
            inside = ir.dims(value.args[0])
            if axes != [0, 2, 1, 3] or not ir.is_constant(inside[3]) or not ir.is_one(inside[0]):
                break
            width = int(inside[3])
            to_tokens = ir.is_constant(inside[2])  # [1, T, h, w] -> [1, h, T, w]
            if to_tokens != head_major and not ir.is_one(inside[2] if to_tokens else inside[1]):
                break
            if to_tokens:
                if head_major and (token, head) != (width, width):
                    break
                token, head, head_major = int(inside[2]) * width, width, False
            else:
                if (token, head) != (int(inside[1]) * width, width):
                    break
                token, head, head_major = width, width, int(inside[1]) > 1
            var = value.args[0]
            continue
        cut: tuple[Any, int, int, int] | None = None
        if isinstance(value, relax.TupleGetItem):
            cut = split_part(graph, value)
        elif ir.is_op(value, "relax.strided_slice"):
            bounds = ir.slice_of(value)
            cut = (value.args[0], *bounds[:3]) if bounds and bounds[3] == 1 else None
        if cut is None:
            break
        source, axis, begin, end = cut
        behind = ir.dims(source)[axis + 1 :]
        if not all(ir.is_constant(d) for d in behind):
            break
        inner = 1
        for d in behind:
            inner *= int(d)
        narrow, wide, start = (end - begin) * inner, int(ir.dims(source)[axis]) * inner, begin * inner
        if token == narrow and not head_major:  # heads lie inside of the cut
            token, offset = wide, offset + start
        elif token % narrow == 0 and (head % narrow == 0 or heads == 1):
            rows, rest = divmod(offset, narrow)
            token, head, offset = token // narrow * wide, head // narrow * wide, rows * wide + start + rest
        else:
            break
        var = source
    return var, offset, token, head, head_major
