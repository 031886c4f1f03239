"""QuantizeWeights: decides which parameters are quantized and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax

from llmc import ir
from llmc.errors import LlmcError
from llmc.ops import EXPERT_LINEAR, HEAD_LINEAR
from llmc.passes.lower_linear import weight_behind
from llmc.passes.rewrite import Graph
from llmc.passes.step_module import LoweredGraph, PackedParam
from llmc.quant.schemes import NONE, Code, QuantRules, by_name, parse, rounding_activations
from llmc.spec import CompileSpec

_SMALLEST = 32  # narrower weights gain nothing


@dataclass(frozen=True)
class _Uses:
    """What a parameter is for."""

    linear: frozenset[Any]
    experts: frozenset[Any]
    tables: frozenset[Any]
    heads: frozenset[Any]  # a weight per head (llmc.head_linear)
    head: Any | None


class QuantizeWeights:
    """Set the scheme of every parameter that is to be quantized.

    before: param(rows, bf16)  used by matmul, expert_linear or take
    after:  the same with scheme = "q4g32"; the graph is unchanged

    A linear layer's or expert's weight gets the rules' default, the head its own, embeddings only what is said of them (a
    tied one follows the head); a pattern that matches the name wins. Routers and weights narrower than 32 are quantized
    only if a pattern says so. Runs before FuseQKV and FuseGateUp, which join weights of one scheme; LowerLinear,
    LowerExperts and LowerEmbedding then choose layout and kernel by the scheme.

    Args:
        rules: default and patterns.
        head: scheme of the output projection; None = the rules' default.
        embedding: scheme of an untied token embedding; None = not quantized.
        stored: parameter -> scheme that the checkpoint has it in already; only a pattern that matches changes that,
            or a default that is the same but for its activations; one with e4m3 activations rounds those of every e4m3 weight.
    """

    def __init__(
        self,
        rules: QuantRules,
        head: str | None = None,
        embedding: str | None = None,
        stored: Mapping[str, str] | None = None,
    ) -> None:
        self.rules, self.head, self.embedding = rules, head, embedding
        self.stored = stored or {}

    @staticmethod
    def of(
        spec: CompileSpec, stored: Mapping[str, str] | None = None, *, untied: bool = False
    ) -> QuantizeWeights:
        """As the spec and the checkpoint say; `untied`: the embedding is a copy of the head, and is stored like it."""
        embedding = spec.quant_embedding
        if untied and embedding is None:
            head = parse(spec.head_scheme() or spec.rules().default)
            # nothing is multiplied with an embedding, so there are no activations to round
            embedding = None if head is None else "q8" if head.activation_bits else head.name
        return QuantizeWeights(spec.rules(), spec.head_scheme(), embedding, stored)

    def __call__(self, lowered: LoweredGraph) -> LoweredGraph:
        if self.rules.is_empty and not self.head and not self.embedding and not self.stored:
            return lowered
        func = lowered.module["main"]
        variables = list(func.params[2:])
        uses = _uses(Graph(func), variables)
        experts = {int(var.ty.shape[0]) for var in uses.experts}
        pairs = list(zip(variables, lowered.params, strict=True))
        per_head = {name for var, info in pairs if var in uses.heads for name in info.sources}
        for _, info in pairs:
            self._check_per_head(info, per_head)
        infos = tuple(self._decide(info, var, uses, experts) for var, info in pairs)
        self._check_patterns(lowered.params)
        return LoweredGraph(lowered.module, infos)

    def _decide(self, info: PackedParam, var: Any, uses: _Uses, experts: set[int]) -> PackedParam:
        named = self.rules.named(info.name)
        used = var in uses.linear or var in uses.experts or var in uses.tables
        if not used:
            if named not in (None, NONE) and len(info.shape) > 1:
                raise LlmcError(
                    "cannot-quantize",
                    f"A rule asks for {named} for {info.name}, which is neither a linear layer's weight nor an "
                    "embedding.",
                    hint="Narrow the rule's pattern.",
                )
            return info
        if info.name in self.stored and named is None:
            return replace(info, scheme=self._kept(self.stored[info.name]))
        if var == uses.head:
            scheme = named or self.head or self.rules.default
        elif var in uses.linear or var in uses.experts:
            small = min(info.shape[-2:]) < _SMALLEST
            router = var in uses.linear and bool(experts & set(info.shape))
            scheme = named or (NONE if small or router else self.rules.default)
        else:
            scheme = named or self.embedding or NONE
        if parse(scheme) is None:
            return info
        return replace(info, scheme=scheme)

    def _check_per_head(self, info: PackedParam, per_head: set[str]) -> None:
        """Weights of llmc.head_linear have no kernel for codes; only what is said of them alone is worth a word."""
        named = self.rules.named(info.name)
        if named not in (None, NONE) and info.name in per_head:
            raise LlmcError(
                "cannot-quantize",
                f"A rule asks for {named} for {info.name}, which is multiplied head by head and stays in the "
                "activations' type.",
                hint="Narrow the rule's pattern, or keep keys and values expanded with --disable-pass AbsorbLatent.",
            )

    def _kept(self, stored: str) -> str:
        """The scheme of a weight that is stored in one."""
        default = parse(self.rules.default)
        if default is None:
            return stored
        known = by_name(stored)
        if default == replace(known, name=default.name, activation_bits=default.activation_bits):
            return default.name
        if default.activations is Code.E4M3 and known.code is Code.E4M3:  # its groups may be others
            return rounding_activations(known).name
        return stored

    def _check_patterns(self, params: tuple[PackedParam, ...]) -> None:
        """A pattern that matches nothing is a mistyped one."""
        for pattern, scheme in self.rules.patterns:
            one = QuantRules(patterns=((pattern, scheme),))
            if all(one.named(info.name) is None for info in params):
                raise LlmcError(
                    "rule-without-match",
                    f"The quantization rule {pattern!r} matches no parameter of the model.",
                    hint="Names look like " + ", ".join(p.name for p in params[:3]) + ".",
                )


def _uses(graph: Graph, variables: list[Any]) -> _Uses:
    weights = set(variables)
    linear, experts, tables, heads = set(), set(), set(), set()
    for binding in graph.bindings:
        value = binding.value
        expert = ir.match_opaque(value, EXPERT_LINEAR)
        if expert is not None:
            experts.add(graph.source(expert[0][2]))
        elif (per_head := ir.match_opaque(value, HEAD_LINEAR)) is not None:
            heads.add(graph.source(per_head[0][1]))
        elif ir.is_op(value, "relax.matmul"):
            found = weight_behind(graph, value.args[1], weights)
            if found is not None:
                linear.add(found.param)
        elif ir.is_op(value, "relax.take"):
            table = graph.source(value.args[0])
            if table in weights and len(table.ty.shape) == 2:
                tables.add(table)
    return _Uses(
        frozenset(linear),
        frozenset(experts & weights),
        frozenset(tables),
        frozenset(heads),
        _head(graph, weights),
    )


def _head(graph: Graph, weights: set[Any]) -> Any | None:
    """The weight of the matmul that the logits come from, through what is done to each of them (cast, softcap)."""
    result = graph.func.body.body
    if isinstance(result, relax.Tuple):
        result = result.fields[0]
    var = graph.source(result)
    if isinstance(graph.definition(var), relax.Tuple):
        var = graph.source(graph.definition(var).fields[0])
    for _ in range(16):
        value = graph.definition(var)
        if ir.is_op(value, "relax.matmul"):
            found = weight_behind(graph, value.args[1], weights)
            return None if found is None else found.param
        if not isinstance(value, relax.Call) or not ir.op_name(value):
            return None
        inputs = [a for a in value.args if isinstance(a, relax.Var) and graph.source(a) not in weights]
        if not inputs:
            return None
        var = graph.source(inputs[0])
    return None
