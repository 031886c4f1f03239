"""FuseNorm: the arithmetic of RMSNorm and LayerNorm becomes one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from llmc import ir
from llmc.ops import NORM, NormAttrs
from llmc.passes.rewrite import Builder, Graph, update_function
from llmc.passes.step_module import LoweredGraph


@dataclass
class _Match:
    """A norm: of `x`, with these operands, bound to `result`."""

    x: Any
    operands: list[Any]
    attrs: NormAttrs
    result: Any


class FuseNorm:
    """Recognise norms along the last axis.

    before: f = astype(x, float32);  r = rsqrt(mean(f * f) + eps);  y = w * astype(f * r, bfloat16)
    after:  y = llmc.norm(x, w, {eps, rounds_first})

    Also with the cast behind the weight, (1 + w) (Gemma), without a weight, with the mean taken off (Cohere), and
    relax.nn.layer_norm. The op rounds where the source does. Runs before FuseAddNorm and before LowerNorm.
    """

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        weights = set(func.params[2:])
        matches: dict[Any, _Match] = {}
        for binding in graph.bindings:
            found = None
            if ir.is_op(binding.value, "relax.rsqrt"):
                found = _from_rsqrt(graph, binding, weights)
            elif ir.is_op(binding.value, "relax.nn.layer_norm"):
                found = _layer_norm(graph, binding, weights)
            if found is not None and _is_row_wise(found.x, found.result):
                matches[found.result] = found
        if not matches:
            return lowered
        build = Builder()
        for binding in graph.bindings:
            match = matches.get(binding.var)
            if match is None:
                build.keep(binding)
                continue
            operands = [match.x, *match.operands]
            build.bind(binding.var, ir.opaque_call(NORM, operands, match.attrs.to_json(), binding.var.ty))
        new = build.function(func.params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(lowered.module, "main", new), lowered.params)


def _layer_norm(graph: Graph, binding: Any, weights: set[Any]) -> _Match | None:
    """relax.nn.layer_norm, with the casts around it where the model is not in float32."""
    value = binding.value
    x, gamma, beta = (graph.source(v) for v in value.args)
    # a norm without weight or bias comes with ones and zeros
    has_weight, has_bias = _uniform(graph, gamma) != 1.0, _uniform(graph, beta) != 0.0
    bare: Any = _minus_one(graph, gamma)
    plus_one = bare is not None
    gamma = bare if plus_one else gamma
    vectors: list[Any] = [v for v, used in ((gamma, has_weight), (beta, has_bias)) if used]
    axes = [int(a) for a in value.attrs.axes]
    if axes not in ([-1], [len(ir.dims(x)) - 1]) or not value.attrs.center or not value.attrs.scale:
        return None
    result = binding.var
    narrow, down = _uncast(graph, x), _only_cast(graph, result)
    if narrow is not x and down is not None and str(down.ty.dtype) == str(narrow.ty.dtype):
        x, result = narrow, down
        inner = [_uncast(graph, v) for v in vectors]
        if len({str(v.ty.dtype) for v in inner}) <= 1:
            vectors = inner
    if any(v not in weights and not ir.is_tensor_constant(v) for v in vectors):
        return None
    if len({str(v.ty.dtype) for v in vectors}) > 1 or str(result.ty.dtype) != str(x.ty.dtype):
        return None
    eps = float(value.attrs.epsilon)
    attrs = NormAttrs(eps=eps, center=True, has_weight=has_weight, has_bias=has_bias, plus_one=plus_one)
    return _Match(x, vectors, attrs, result)


def _minus_one(graph: Graph, var: Any) -> Any | None:
    """w if `var` is w + 1 (Gemma, Nemotron), perhaps cast to float32."""
    value = graph.definition(_uncast(graph, var))
    if ir.is_op(value, "relax.add") and ir.scalar_of(value.args[1]) == 1.0:
        return graph.source(value.args[0])
    return None


def _uniform(graph: Graph, var: Any) -> float | None:
    """The number that a constant tensor holds throughout, also behind casts."""
    while ir.is_op(graph.definition(var), "relax.astype"):
        var = graph.source(graph.definition(var).args[0])
    value = graph.definition(var) if isinstance(var, relax.Var) else var
    return ir.uniform_value(value)


def _uncast(graph: Graph, var: Any) -> Any:
    """What `var` is the float32 cast of; `var` itself if it is none."""
    value = graph.definition(var)
    if ir.is_op(value, "relax.astype") and str(value.ty.dtype) == "float32":
        return graph.source(value.args[0])
    return var


def _from_rsqrt(graph: Graph, binding: Any, weights: set[Any]) -> _Match | None:
    """Follow a root of a mean square: up to the input, down to the weight."""
    inside = graph.resolve(binding.value.args[0])
    if not ir.is_op(inside, "relax.add"):
        return None
    eps, mean_var = ir.scalar_of(inside.args[1]), inside.args[0]
    mean = graph.resolve(mean_var)
    if eps is None or not ir.is_op(mean, "relax.mean"):
        return None
    wide = _squared(graph, mean)
    if wide is None or str(wide.ty.dtype) != "float32":
        return None
    x, center = wide, False
    centered = graph.definition(wide)
    if ir.is_op(centered, "relax.subtract"):
        x = graph.source(centered.args[0])
        if not _is_mean_of(graph, centered.args[1], x):
            return None
        center = True
    product = _scaled(graph, binding.var, wide, x if center else None)
    if product is None:
        return None
    cast = graph.definition(x)
    if ir.is_op(cast, "relax.astype"):
        x = graph.source(cast.args[0])
    dtype = str(x.ty.dtype)
    attrs: dict[str, Any] = {"eps": eps, "center": center}
    result, operands = product, []
    down = _only_cast(graph, result)
    if down is not None and str(down.ty.dtype) == dtype != "float32":
        result, attrs["rounds_first"] = down, True
    weighted = _weighted(graph, result, weights)
    if weighted is not None:
        result, weight, plus_one = weighted
        operands, attrs["has_weight"], attrs["plus_one"] = [weight], True, plus_one
        down = _only_cast(graph, result)
        if down is not None and str(down.ty.dtype) == dtype and str(result.ty.dtype) == "float32" != dtype:
            result = down
    if str(result.ty.dtype) != dtype:
        return None
    return _Match(x, operands, NormAttrs(**attrs), result)


def _squared(graph: Graph, mean: Any) -> Any | None:
    """f if `mean` is the mean of f * f along the last axis, kept as a unit."""
    if not _is_last_axis(mean):
        return None
    square = graph.resolve(mean.args[0])
    if ir.is_op(square, "relax.multiply") and graph.source(square.args[0]) == graph.source(square.args[1]):
        return graph.source(square.args[0])
    if ir.is_op(square, "relax.power") and ir.scalar_of(square.args[1]) == 2.0:
        return graph.source(square.args[0])
    return None


def _is_last_axis(mean: Any) -> bool:
    axes = [int(a) for a in mean.attrs.axis or ()]
    return bool(mean.attrs.keepdims) and axes in ([-1], [len(ir.dims(mean.args[0])) - 1])


def _is_mean_of(graph: Graph, var: Any, x: Any) -> bool:
    mean = graph.resolve(var)
    return ir.is_op(mean, "relax.mean") and _is_last_axis(mean) and graph.source(mean.args[0]) == x


def _scaled(graph: Graph, root: Any, wide: Any, uncentered: Any | None) -> Any | None:
    """The variable of wide * root, if that is all that the root is used for."""
    users = graph.users(root)
    if len(users) != 1 or graph.uses.get(root, 0) != 1 or not ir.is_op(users[0].value, "relax.multiply"):
        return None
    a, b = (graph.source(v) for v in users[0].value.args)
    other = a if b == root else b
    if other == wide:
        return users[0].var
    # the source may compute x - mean twice
    again: Any = graph.definition(other)
    if (
        uncentered is not None
        and ir.is_op(again, "relax.subtract")
        and graph.source(again.args[0]) == uncentered
        and _is_mean_of(graph, again.args[1], uncentered)
    ):
        return users[0].var
    return None


def _only_user(graph: Graph, var: Any, op: str) -> Any | None:
    users = graph.users(var)
    if graph.uses.get(var, 0) != 1 or len(users) != 1 or not ir.is_op(users[0].value, op):
        return None
    return users[0]


def _only_cast(graph: Graph, var: Any) -> Any | None:
    user = _only_user(graph, var, "relax.astype")
    return user.var if user is not None else None


def _weighted(graph: Graph, var: Any, weights: set[Any]) -> tuple[Any, Any, bool] | None:
    """(product, weight, plus one) of `var` times a weight vector."""
    user = _only_user(graph, var, "relax.multiply")
    if user is None:
        return None
    a, b = user.value.args
    weight = graph.source(b if graph.source(a) == var else a)
    bare: Any = _minus_one(graph, weight)
    plus_one, weight = bare is not None, weight if bare is None else bare
    value = graph.definition(weight)
    if ir.is_op(value, "relax.astype") and str(value.ty.dtype) == "float32":
        weight = graph.source(value.args[0])
    if weight not in weights or len(weight.ty.shape) != 1 or str(user.var.ty.dtype) != str(var.ty.dtype):
        return None
    return user.var, weight, plus_one


def _is_row_wise(x: Any, result: Any) -> bool:
    """Same shape; a constant last axis, and at most one symbolic dimension."""
    a, b = ir.dims(x), ir.dims(result)
    unknown = [d for d in a if not ir.is_constant(d)]
    same = len(a) == len(b) and all(
        int(d) == int(e) if ir.is_constant(d) and ir.is_constant(e) else d.same_as(e)
        for d, e in zip(a, b, strict=True)
    )
    return (
        same and ir.is_constant(a[-1]) and len(unknown) <= 1 and all(isinstance(d, tirx.Var) for d in unknown)
    )
