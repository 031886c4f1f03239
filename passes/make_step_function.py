"""MakeStepFunction: the one-sequence graph becomes ``step`` over ragged batches with a paged KV cache."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from tvm import relax, tirx

from llmc import ir
from llmc.artifact import TensorSpec
from llmc.caps import Capabilities
from llmc.kv_plan import KVPlan
from llmc.ops import ATTENTION, HEADS, AttentionAttrs, HeadsAttrs
from llmc.passes.rewrite import Builder, Graph, Kernels
from llmc.passes.step_module import LoweredGraph, StepModule
from llmc.schedules.attention_config import AttentionConfig, LatentConfig
from llmc.schedules.costs import append_cost, attention_cost
from llmc.schedules.gather import GatherConfig
from llmc.schedules.kernels import builders, with_defaults
from llmc.schedules.rope import HeadSource, RopeConfig
from llmc.schedules.tuned_choice import Tuned


class MakeStepFunction:
    """Turn ``main`` into ``step`` (DESIGN 3.2).

    before: main(input_ids, positions, *params):  o = llmc.attention(q, k, v) ... logits = head(h)
    after:  step(input_ids, positions, query_start, context_len, block_table_g, slot_g, ..., logit_rows, pools, params):
                pk, pv = call_tir_inplace(kv_append, k, v, slot_g, pk, pv, layer)
                o = call_tir(attention_prefill, q, pk, pv, query_start, context_len, block_table_g, layer)
                ... hr = gather_rows(h, logit_rows); logits = head(hr)

    Everything but attention is per token (the frontend has checked it), so laying several sequences end to end needs no
    other change. Runs after LowerLinear (it finds the head there); before LegalizeOps.
    """

    def __init__(self, caps: Capabilities, plan: KVPlan, tuned: Tuned | None = None) -> None:
        self.caps = caps
        self.plan = plan
        self.tuned = tuned or Tuned()

    def __call__(self, lowered: LoweredGraph) -> StepModule:
        func = lowered.module["main"]
        graph = Graph(func)
        module = ir.shallow_copy(lowered.module)
        self._kernels, self._build = Kernels(module), Builder()
        build = self._build
        self._graph = graph
        self._attention_configs: dict[str, AttentionConfig] = {}
        self._rope_configs: dict[str, RopeConfig] = {}
        tokens = func.params[0].ty.shape[0]
        dims = {name: tirx.Var(name, "int64") for name in ("B", "R")}
        inputs, specs = self._inputs(func, tokens, dims)
        by_name = {spec.name: var for spec, var in zip(specs, inputs, strict=True)}
        pools = self._pools()
        pool_tuple = relax.Var("pools", relax.TupleType([p.ty for own in pools for p in own]))
        head = _head(graph, func)
        used = [i for i, p in enumerate(func.params[2:]) if graph.uses.get(p, 0)]
        param_tuple = relax.Var("params", relax.TupleType([func.params[2 + i].ty for i in used]))
        for slot, i in enumerate(used):
            build.bind(func.params[2 + i], relax.TupleGetItem(param_tuple, slot))
        current: list[list[Any]] = []
        for own in pools:
            first = sum(map(len, current))
            current.append(
                [build.emit(relax.TupleGetItem(pool_tuple, first + j), p.name) for j, p in enumerate(own)]
            )
        row_count = dims["R"]
        row_vars: dict[Any, Any] = {}
        appended: set[int] = set()
        for binding in graph.bindings:
            match = ir.match_opaque(binding.value, ATTENTION)
            if match:
                operands, text = match
                self._attention(
                    binding.var, operands, AttentionAttrs.from_json(text), by_name, current, appended
                )
            elif binding.var in head.after:
                _rebind_rows(build, binding, row_vars, tokens, row_count)
            else:
                build.keep(binding)
            if binding.var == head.rows_of:
                row_vars[binding.var] = self._gather(binding.var, by_name["logit_rows"], row_count)
        result, taps = _results(graph, func)
        logits = row_vars.get(result)
        if logits is None:  # nothing recognised as a head: gather the logits themselves
            logits = self._gather(result, by_name["logit_rows"], row_count)
        if str(logits.ty.dtype) != "float32":
            logits = build.emit(relax.op.astype(logits, "float32"), "logits")
        outputs = relax.Tuple([logits, *taps]) if taps else logits
        step = build.function([*inputs, pool_tuple, param_tuple], outputs, None, symbol="step")
        del module[module.get_global_var("main")]
        module[relax.GlobalVar("step")] = step
        vocab = int(logits.ty.shape[-1])
        return StepModule(
            module,
            tuple(lowered.params[i] for i in used),
            self.plan,
            tuple(specs),
            TensorSpec("logits", "float32", ("R", vocab)),
            tuple(sorted(self._attention_configs.items())),
            tuple(sorted(self._rope_configs.items())),
        )

    def _inputs(self, func: Any, tokens: Any, dims: dict[str, Any]) -> tuple[list[Any], list[TensorSpec]]:
        batch, rows = dims["B"], dims["R"]
        table: list[tuple[str, list[Any], tuple[str | int, ...]]] = [
            ("query_start", [batch + 1], ("B+1",)),
            ("context_len", [batch], ("B",)),
        ]
        for g in range(len(self.plan.groups)):
            width = tirx.Var(f"W{g}", "int64")
            table.append((f"block_table_{g}", [batch, width], ("B", f"W{g}")))
            table.append((f"slot_{g}", [tokens], ("T",)))
        table.append(("logit_rows", [rows], ("R",)))
        inputs = [func.params[0], func.params[1]]
        specs = [TensorSpec("input_ids", "int32", ("T",)), TensorSpec("positions", "int32", ("T",))]
        for name, shape, text in table:
            inputs.append(relax.Var(name, ir.tensor_type(shape, "int32")))
            specs.append(TensorSpec(name, "int32", text))
        return inputs, specs

    def _pools(self) -> list[list[Any]]:
        """The variables of each group's pools; the number of pages is symbolic, each group's own."""
        out = []
        for g, group in enumerate(self.plan.groups):
            pages = tirx.Var(f"P{g}", "int64")
            shapes = group.pool_shapes(1, self.plan.page_size)
            out.append(
                [
                    relax.Var(f"{name}_pool_{g}", ir.tensor_type([pages, *shape[1:]], group.storage_dtype))
                    for name, shape in zip("kv", shapes, strict=False)
                ]
            )
        return out

    def _attention(
        self,
        out: Any,
        operands: list[Any],
        attrs: AttentionAttrs,
        by_name: dict[str, Any],
        current: list[list[Any]],
        appended: set[int],
    ) -> None:
        build = self._build
        q, k, v = operands[:3]
        g, index = self.plan.locate(attrs.layer)
        group = self.plan.groups[g]
        config = (LatentConfig if attrs.latent else AttentionConfig)(
            heads=int(q.ty.shape[2 if attrs.token_major else 1]),
            kv_heads=group.kv_heads,
            key_dim=group.key_dim,
            value_dim=group.value_dim,
            dtype=str(q.ty.dtype),
            kv_dtype=group.dtype,
            page_size=self.plan.page_size,
            layers=len(group.layers),
            scale=attrs.scale,
            window=attrs.window,
            chunk=attrs.chunk,
            softcap=attrs.softcap,
            has_sinks=attrs.has_sinks,
            has_alibi=attrs.has_alibi,
            token_major=attrs.token_major,
        )
        config = with_defaults(config, self.caps)
        for kernel in ("attention_prefill", "attention_decode"):
            config = self.tuned.apply(config, kernel)
        layer = relax.prim_value(tirx.IntImm("int64", index))
        heads = [ir.match_opaque(self._graph.definition(v), HEADS) for v in (q, k, v)]
        owns = attrs.layer not in dict(self.plan.shared) and attrs.layer not in appended
        if attrs.latent and heads[1] and owns:
            current[g] = self._append_latents(config, g, heads[1], by_name[f"slot_{g}"], current[g], layer)
            appended.add(attrs.layer)
            owns = False
        elif heads[0] and heads[1] and heads[2]:
            config = replace(config, token_major=True)
            sources = [h for h in heads if h is not None][: 3 if owns else 1]
            q, current[g] = self._rotate(config, g, sources, by_name[f"slot_{g}"], current[g], layer)
            appended.add(attrs.layer)
            owns = False
        if owns:
            self._append(config, g, k, v, by_name[f"slot_{g}"], current, layer)
            appended.add(attrs.layer)
        gvar = self._kernels.get(
            config,
            f"attention_prefill_{g}",
            lambda: builders(self.caps).attention_prefill(config, self.caps),
            attention_cost(config),
        )
        self._attention_configs[gvar.name_hint] = config
        args = [q, *current[g], by_name["query_start"], by_name["context_len"], by_name[f"block_table_{g}"]]
        build.bind(out, relax.call_tir(gvar, relax.Tuple([*args, *operands[3:], layer]), out.ty))

    def _append(
        self, config: AttentionConfig, g: int, k: Any, v: Any, slot: Any, current: list[list[Any]], layer: Any
    ) -> None:
        """Keys and values to their pages."""
        key = ("append", g, str(k.ty.dtype))
        build_it = partial(builders(self.caps).kv_append, config, self.caps)
        gvar = self._kernels.get(key, f"kv_append_{g}", build_it, append_cost(config))
        operands = [k, slot] if config.latent else [k, v, slot]
        current[g] = self._in_place(gvar, operands, current[g], layer, f"pool_{g}")

    def _in_place(self, gvar: Any, operands: list[Any], pools: list[Any], layer: Any, name: str) -> list[Any]:
        """A kernel whose only results are the pools, which it changes."""
        build, at = self._build, len(operands)
        where, types = [at + j for j in range(len(pools))], [pool.ty for pool in pools]
        call = relax.op.call_tir_inplace(gvar, relax.Tuple([*operands, *pools, layer]), where, types)
        if len(pools) == 1:
            return [build.emit(call, name)]
        both = build.emit(call, "pools")
        return [build.emit(relax.TupleGetItem(both, j), name) for j in range(len(pools))]

    def _rotate(
        self, attention: AttentionConfig, g: int, heads: list[Any], slot: Any, pools: list[Any], layer: Any
    ) -> tuple[Any, list[Any]]:
        """(q rotated, pools) from the llmc.heads of q alone, or of q, k and v, which are appended."""
        build = self._build
        gvar, args = self._rope(attention, g, dict(zip("qkv", heads, strict=False)))
        tokens = next(d for d in slot.ty.shape)
        q_type = ir.tensor_type([1, tokens, attention.heads, attention.key_dim], attention.dtype)
        if len(heads) == 1:
            return build.emit(relax.call_tir(gvar, relax.Tuple(args), q_type), "q"), pools
        at = len(args) + 1
        call = relax.op.call_tir_inplace(
            gvar,
            relax.Tuple([*args, slot, *pools, layer]),
            [-1, at, at + 1],
            [q_type, pools[0].ty, pools[1].ty],
        )
        three = build.emit(call, "rotated")
        q, *after = [
            build.emit(relax.TupleGetItem(three, j), n) for j, n in enumerate(("q", "k_pool", "v_pool"))
        ]
        return q, after

    def _append_latents(
        self, attention: AttentionConfig, g: int, head: Any, slot: Any, pools: list[Any], layer: Any
    ) -> list[Any]:
        """The pools after an llmc.heads of keys was appended; queries are there already."""
        gvar, args = self._rope(attention, g, {"k": head})
        return self._in_place(gvar, [*args, slot], pools, layer, f"pool_{g}")

    def _rope(self, attention: AttentionConfig, g: int, heads: dict[str, Any]) -> tuple[Any, list[Any]]:
        """(kernel that rotates, its arguments up to the slots) of q, k and v as far as they are there."""
        attrs = [HeadsAttrs.from_json(text) for _, text in heads.values()]
        own = [operands[: 1 + a.vectors] for (operands, _), a in zip(heads.values(), attrs, strict=True)]
        rest = [operands[1 + a.vectors :] for (operands, _), a in zip(heads.values(), attrs, strict=True)]
        tensors = max(rest, key=len)
        sources = {
            name: HeadSource(_shape(ops[0]), str(ops[0].ty.dtype), a, str(ops[-1].ty.dtype))
            for name, ops, a in zip(heads, own, attrs, strict=True)
        }
        config = RopeConfig(
            attention,
            sources.get("q"),
            sources.get("k"),
            sources.get("v"),
            tuple(_shape(t) for t in tensors),
            str(tensors[0].ty.dtype) if tensors else "float32",
        )
        parts = ["rope" if "q" in heads else "latent", "append" if "k" in heads else "", str(g)]
        build_it = partial(builders(self.caps).rope_append, config, self.caps)
        gvar = self._kernels.get(config, "_".join(filter(None, parts)), build_it)
        self._rope_configs[gvar.name_hint] = config
        return gvar, [*(operand for ops in own for operand in ops), *tensors]

    def _gather(self, x: Any, rows: Any, row_count: Any) -> Any:
        lead = len(x.ty.shape) - 2
        config = GatherConfig(k=int(x.ty.shape[-1]), dtype=str(x.ty.dtype), lead=lead)
        gvar = self._kernels.get(
            config, "gather_rows", lambda: builders(self.caps).gather_rows(config, self.caps)
        )
        out = ir.tensor_type([*[1] * lead, row_count, x.ty.shape[-1]], str(x.ty.dtype))
        return self._build.emit(relax.call_tir(gvar, relax.Tuple([x, rows]), out), "rows")


def _shape(var: Any) -> tuple[int, ...]:
    """-1 = the number of tokens."""
    return tuple(int(d) if ir.is_constant(d) else -1 for d in ir.dims(var))


def _results(graph: Graph, func: Any) -> tuple[Any, list[Any]]:
    """(logits, taps) of ``main``; taps only in a debug variant."""
    body = graph.source(func.body.body)
    value = graph.definition(body) if isinstance(body, relax.Var) else body
    if isinstance(value, relax.Tuple):
        return graph.source(value.fields[0]), [graph.source(f) for f in value.fields[1:]]
    return body, []


class _Head:
    """Where to select the rows that need logits: the variable to gather, and the bindings that follow it."""

    def __init__(self, rows_of: Any | None, after: set[Any]) -> None:
        self.rows_of = rows_of
        self.after = after


# operators that keep a row a row, so that rows may be selected before them
_PER_TOKEN = frozenset(
    {
        "relax.add",
        "relax.astype",
        "relax.clip",
        "relax.divide",
        "relax.exp",
        "relax.expand_dims",
        "relax.maximum",
        "relax.minimum",
        "relax.multiply",
        "relax.negative",
        "relax.power",
        "relax.reshape",
        "relax.rsqrt",
        "relax.sqrt",
        "relax.squeeze",
        "relax.subtract",
        "relax.tanh",
    }
)


def _head(graph: Graph, func: Any) -> _Head:
    """Walk back from the logits while each step has one tensor operand that depends on tokens.

    The walk ends at the last attention, expert or other many-operand op; the gather goes there, so that the head (and the
    final norm's tail) run only for the rows asked for.
    """
    var, taps = _results(graph, func)
    if taps:  # a debug variant returns hidden states of all tokens: keep it simple
        return _Head(None, set())
    params = set(func.params)
    after: list[Any] = []
    best: _Head = _Head(None, set())
    while True:
        value = graph.definition(var)
        if not isinstance(value, relax.Call):
            return best
        if ir.is_op(value, "relax.call_tir"):
            inputs = [a for a in value.args[1].fields if isinstance(a, relax.Var) and a not in params]
        elif ir.op_name(value) in _PER_TOKEN:
            inputs = [a for a in value.args if isinstance(a, relax.Var) and a not in params]
        else:
            return best
        inputs = [a for a in inputs if _is_computed(graph, a)]
        if len(inputs) != 1 or graph.uses.get(var, 0) != 1:
            return best
        after.append(var)
        is_linear = ir.is_op(value, "relax.call_tir") and value.args[0].name_hint.startswith("linear_")
        var = inputs[0]
        if is_linear and ir.is_rows(var):
            best = _Head(var, set(after))
            return best


def _is_computed(graph: Graph, var: Any) -> bool:
    return graph.definition(graph.source(var)) is not None


def _rebind_rows(build: Builder, binding: Any, row_vars: dict[Any, Any], tokens: Any, rows: Any) -> None:
    """Emit a binding behind the gather: operands and types have R rows instead of T."""
    value = binding.value
    args = [_substitute(a, row_vars, tokens, rows) for a in value.args]
    types = [_with_rows(t, tokens, rows) for t in value.ty_args]
    call = relax.Call(value.op, args, value.attrs, types)
    row_vars[binding.var] = build.emit(call, "head")


def _substitute(arg: Any, row_vars: dict[Any, Any], tokens: Any, rows: Any) -> Any:
    if isinstance(arg, relax.Tuple):
        return relax.Tuple([_substitute(a, row_vars, tokens, rows) for a in arg.fields])
    if isinstance(arg, relax.ShapeExpr):
        return relax.ShapeExpr([rows if d is tokens or d.same_as(tokens) else d for d in arg.values])
    return row_vars.get(arg, arg) if isinstance(arg, relax.Var) else arg


def _with_rows(ty: Any, tokens: Any, rows: Any) -> Any:
    if isinstance(ty, relax.TensorType):
        return ir.tensor_type([rows if d.same_as(tokens) else d for d in ty.shape], str(ty.dtype))
    return ty
