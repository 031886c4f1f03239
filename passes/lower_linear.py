"""LowerLinear: matmuls with a weight become calls of the linear kernel on packed weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tvm import relax, tirx

from llmc import ir
from llmc.caps import Capabilities
from llmc.ops import LINEAR, LinearAttrs
from llmc.passes.rewrite import Builder, Graph, Kernels, update_function
from llmc.passes.step_module import LoweredGraph, PackedParam
from llmc.passes.weight_layouts import WeightLayouts
from llmc.quant.schemes import by_name
from llmc.schedules.choice import ByRows
from llmc.schedules.kernels import builders
from llmc.schedules.layout import BlockedLayout, own_vectors
from llmc.schedules.linear import LinearConfig, LinearSchedule
from llmc.schedules.qlayout import QuantLayout, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.schedules.tune_qlinear import QuantKernel
from llmc.schedules.tuned_choice import Tuned


@dataclass(frozen=True)
class _Weight:
    """A parameter seen through casts and transposes: which one, whether [in, out], and in which dtype it is used."""

    param: Any
    transposed: bool
    dtype: str


@dataclass
class _Match:
    weight: _Weight
    x: Any
    bias: Any | None
    out_dtype: str
    result: Any  # the variable that the kernel's output is bound to
    attrs: LinearAttrs = field(default_factory=LinearAttrs)
    residual: Any | None = None


class LowerLinear:
    """Replace ``matmul(x, permute_dims(w)) (+ bias) (as float32)`` by one kernel over the packed weight.

    before: w [N, K] param;  t = permute_dims(w); y = matmul(x, t); z = add(y, b)
    after:  w' [N/nb, K/kp, nb, kp] param;  z = call_tir(linear, x, w', b)

    Also ``matmul(x, w)`` with w [K, N], weights behind a cast, and the logits' cast to float32, which the head then
    writes directly; and llmc.linear, which carries its activation, gate and residual. Runs before LegalizeOps, because
    the ops are still recognisable; before LowerEmbedding, which reuses the packed layout of tied weights. A matmul
    whose operand is not a plain weight is left to the generic schedules.
    """

    def __init__(
        self, caps: Capabilities, tuned: Tuned | None = None, layouts: WeightLayouts | None = None
    ) -> None:
        self.caps = caps
        self.tuned = tuned or Tuned()
        self.layouts = layouts or WeightLayouts()

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        func = lowered.module["main"]
        graph = Graph(func)
        params = list(func.params)
        infos = list(lowered.params)
        index_of = {var: i for i, var in enumerate(params[2:])}
        module = ir.shallow_copy(lowered.module)
        kernels = Kernels(module)
        build = Builder()
        matches = self._match_all(graph, set(index_of))
        absorbed = {m for match in matches.values() for m in match[1]}
        packed_vars: dict[tuple[tuple[str, ...], str, bool, bool], Any] = {}
        # what the first kernel of a weight has decided about its layout
        decided: dict[tuple[tuple[str, ...], str, bool, bool], dict[str, int]] = {}
        for binding in graph.bindings:
            if binding.var in absorbed:
                continue
            found = matches.get(binding.var)
            if found is None:
                build.keep(binding)
                continue
            match = found[0]
            info = infos[index_of[match.weight.param]]
            n, k = (info.shape[1], info.shape[0]) if match.weight.transposed else info.shape
            dtype = match.weight.dtype
            gated = match.attrs.gated
            outputs = n // 2 if gated else n
            stored = "uint8" if info.scheme else dtype
            key = (info.sources, stored, match.weight.transposed, gated)
            config, layout, shape = self._kernel(match, info, outputs, k, decided.get(key))
            decided.setdefault(key, self.tuned.shared(config))
            if key not in packed_vars:
                name = info.name if not _is_packed(packed_vars, info.sources) else f"{info.name}.{stored}"
                packed = replace(
                    info,
                    name=name,
                    dtype=stored,
                    shape=shape,
                    layout=layout.as_text(),
                    transposed=match.weight.transposed,
                    gated=gated,
                )
                packed_vars[key] = relax.Var(
                    info.name.replace(".", "_") + "_packed", ir.tensor_type(shape, stored)
                )
                params.append(packed_vars[key])
                infos.append(packed)
            kernel: Any = config
            if isinstance(config, QuantLinearConfig):
                kernel = self.tuned.apply(config)
            gvar = kernels.get(kernel, _kernel_name(config, k), partial(_build, kernel, self.caps))
            args = [match.x, packed_vars[key], *(a for a in (match.bias, match.residual) if a is not None)]
            out = ir.tensor_type([*ir.dims(match.x)[:-1], tirx.IntImm("int64", config.n)], match.out_dtype)
            build.bind(binding.var, relax.call_tir(gvar, args, out))
        new = build.function(params, func.body.body, func.attrs, symbol="main")
        return LoweredGraph(update_function(module, "main", new), tuple(infos))

    def _kernel(
        self, match: _Match, info: PackedParam, n: int, k: int, shared: dict[str, int] | None
    ) -> tuple[LinearConfig | QuantLinearConfig, BlockedLayout | QuantLayout, tuple[int, ...]]:
        """Configuration, layout of the weight and its packed shape; `shared` = what is decided about the layout."""
        dtype, attrs = match.weight.dtype, match.attrs
        has_bias, lead = match.bias is not None, len(match.x.ty.shape) - 2
        has_residual = match.residual is not None
        if info.scheme:
            packed = self.layouts.quantized(info.sources, gated=attrs.gated) or quant_layout(
                by_name(info.scheme), n, k, self.caps, gated=attrs.gated
            )
            # integer kernels leave prefetching to the machine: docs/design/008 has the figures
            quantized = QuantLinearConfig(
                n=n,
                layout=packed,
                in_dtype=dtype,
                out_dtype=match.out_dtype,
                has_bias=has_bias,
                lead=lead,
                activation=attrs.activation,
                gated=attrs.gated,
                gate_second=attrs.gate_second,
                has_residual=has_residual,
                prefetch=0 if packed.quads else QuantLinearConfig.prefetch,
            )
            return quantized, packed, packed.packed_shape
        config = LinearConfig(
            n=n,
            k=k,
            in_dtype=dtype,
            weight_dtype=dtype,
            out_dtype=match.out_dtype,
            has_bias=has_bias,
            lead=lead,
            activation=attrs.activation,
            gated=attrs.gated,
            gate_second=attrs.gate_second,
            has_residual=has_residual,
        )
        decided = self.layouts.blocked(info.sources, dtype, gated=attrs.gated)
        if decided is not None:
            vectors = own_vectors(decided, dtype, self.caps)
            if vectors is None:  # not among this machine's own: a task of its own for the tuner
                config = replace(config, layout=decided)
            else:
                config = replace(config, schedule=ByRows((LinearSchedule(vectors=vectors),)))
                shared = {"vectors": vectors}
        config = self.tuned.apply(config, shared=shared)
        return config, config.weight_layout(self.caps), config.packed_shape(self.caps)

    def _match_all(self, graph: Graph, weights: set[Any]) -> dict[Any, tuple[_Match, list[Any]]]:
        """result variable -> (match, variables that the kernel absorbs)."""
        found: dict[Any, tuple[_Match, list[Any]]] = {}
        for binding in graph.bindings:
            opaque = ir.match_opaque(binding.value, LINEAR)
            if opaque:
                found[binding.var] = (self._opaque(graph, binding.var, *opaque, weights), [])
                continue
            if not ir.is_op(binding.value, "relax.matmul"):
                continue
            x, w = binding.value.args
            weight = weight_behind(graph, w, weights)
            if weight is None or not _rows_of_tokens(x):
                continue
            match = _Match(weight, x, None, str(binding.value.ty.dtype), binding.var)
            if str(x.ty.dtype) != weight.dtype:
                continue
            absorbed: list[Any] = []
            self._absorb_bias(graph, match, absorbed)
            self._absorb_cast(graph, match, absorbed)
            found[match.result] = (match, absorbed)
        return found

    def _opaque(self, graph: Graph, var: Any, operands: list[Any], text: str, weights: set[Any]) -> _Match:
        """An llmc.linear; the pass that made it has checked its operands."""
        attrs = LinearAttrs.from_json(text)
        rest = list(operands[2:])
        bias = rest.pop(0) if attrs.has_bias else None
        residual = rest.pop(0) if attrs.has_residual else None
        weight = graph.source(operands[1])
        assert weight in weights
        known = _Weight(weight, False, str(weight.ty.dtype))
        return _Match(known, operands[0], bias, str(var.ty.dtype), var, attrs, residual)

    def _absorb_bias(self, graph: Graph, match: _Match, absorbed: list[Any]) -> None:
        user = _only_user(graph, match.result)
        if user is None or not ir.is_op(user.value, "relax.add"):
            return
        a, b = user.value.args
        bias = b if graph.source(a) == graph.source(match.result) else a
        shape = getattr(bias.ty, "shape", None)
        if shape is None or len(shape) != 1 or str(bias.ty.dtype) != str(match.x.ty.dtype):
            return
        if graph.definition(graph.source(bias)) is not None or not _same_shape(user.var, match.result):
            return  # only plain weights: a computed bias might be defined after the matmul
        absorbed.append(match.result)
        match.result, match.bias = user.var, bias

    def _absorb_cast(self, graph: Graph, match: _Match, absorbed: list[Any]) -> None:
        user = _only_user(graph, match.result)
        if user is None or not ir.is_op(user.value, "relax.astype") or str(user.var.ty.dtype) != "float32":
            return
        absorbed.append(match.result)
        match.result, match.out_dtype = user.var, "float32"


_FLOATS = ("float32", "float16", "bfloat16")


def weight_behind(graph: Graph, var: Any, weights: set[Any]) -> _Weight | None:
    """Trace `var` to a two-dimensional parameter through permute_dims and astype."""
    swaps, dtype = 0, str(var.ty.dtype)
    while True:
        var = graph.source(var)
        if var in weights:
            break
        value = graph.definition(var)
        if ir.is_op(value, "relax.permute_dims") and len(value.args[0].ty.shape) == 2:
            swaps, var = swaps + 1, value.args[0]
        elif ir.is_op(value, "relax.astype"):
            if str(value.args[0].ty.dtype) not in _FLOATS:
                return None
            var = value.args[0]
        else:
            return None
    if len(var.ty.shape) != 2 or dtype not in _FLOATS:
        return None
    return _Weight(var, transposed=swaps % 2 == 0, dtype=dtype)


def _is_packed(packed: dict[tuple[tuple[str, ...], str, bool, bool], Any], sources: tuple[str, ...]) -> bool:
    """True if the source weight is packed already (in another dtype or orientation)."""
    return any(key[0] == sources for key in packed)


def _build(config: LinearConfig | QuantLinearConfig | QuantKernel, caps: Capabilities) -> Any:
    build = builders(caps)
    return (build.linear if isinstance(config, LinearConfig) else build.quant_linear)(config, caps)


def _kernel_name(config: LinearConfig | QuantLinearConfig, k: int) -> str:
    """``linear_`` first: the search for the head goes by it."""
    parts = [
        "linear",
        config.layout.scheme if isinstance(config, QuantLinearConfig) else "",
        config.activation,
        "gated" if config.gated else "",
        "add" if config.has_residual else "",
    ]
    return "_".join([*filter(None, parts), str(config.n), str(k)])


def _rows_of_tokens(x: Any) -> bool:
    """[1, ..., 1, rows, K]: leading dimensions are units."""
    shape = ir.dims(x)
    return len(shape) >= 2 and all(isinstance(d, tirx.IntImm) and int(d) == 1 for d in shape[:-2])


def _only_user(graph: Graph, var: Any) -> Any | None:
    users = graph.users(var)
    return users[0] if graph.uses.get(var, 0) == 1 and len(users) == 1 else None


def _same_shape(a: Any, b: Any) -> bool:
    return len(ir.dims(a)) == len(ir.dims(b))
