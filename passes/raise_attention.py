"""RaiseAttention: attention in whatever form it was written becomes llmc.attention with its mask as attributes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tvm import relax, tirx

from llmc.errors import LlmcError
from llmc.ir import IRModule, match_opaque, opaque_call, tensor_type
from llmc.ops import ATTENTION, AttentionAttrs
from llmc.passes.match_attention import Match, match_softmax
from llmc.passes.resolve_mask import MASK, MaskAttrs, MaskError, MaskResolver, ResolvedMask, Term
from llmc.passes.rewrite import Builder, Graph, bindings_of, update_function

MASKED_ATTENTION = "llmc.masked_attention"


@dataclass(frozen=True)
class MaskedAttentionAttrs:
    """Attention as a frontend saw it: llmc.masked_attention(q, k, v, mask?, sinks?, attrs), mask [1, 1|h, T, T] added.

    Attributes:
        scale, softcap, path: as in AttentionAttrs.
        causal: what the caller said; counts only when there is no mask.
        window: what the caller said; has to agree with the mask.
    """

    scale: float
    softcap: float = 0.0
    causal: bool = False
    window: int = 0
    has_mask: bool = False
    has_sinks: bool = False
    path: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> MaskedAttentionAttrs:
        return MaskedAttentionAttrs(**json.loads(text))


class RaiseAttention:
    """Find every attention of ``main``, resolve its mask, and number the blocks.

    before: m = llmc.mask(causal, window 4); y = llmc.masked_attention(q, k, v, m)
    after:  y = llmc.attention(q, k, v, {layer: 0, window: 4})
    before: s = matmul(q, kT) / 8 + alibi; s = where(tril[:T, :T], s, -1e9); y = matmul(softmax(s), v)
    after:  y = llmc.attention(q, k, v, slopes, {layer: 0, scale: 0.125, has_alibi})

    What only the masks read is left dead. Runs before everything else, because later passes know only llmc.attention.
    A softmax over tokens that matches no attention is left alone; the frontend's token check refuses it.

    Args:
        where: name of the module that computes a variable, for messages.
        positions: parameter of ``main`` that holds the positions; a mask may be computed from it.
        limit: largest length that the model is made for; masks are looked at up to it.
    """

    def __init__(
        self, where: Callable[[Any], str] = str, positions: Any = None, limit: int = 2**31 - 1
    ) -> None:
        self.where = where
        self.positions = positions
        self.limit = limit

    def __call__(self, module: IRModule) -> IRModule:
        func = module["main"]
        graph = Graph(func)
        given = {} if self.positions is None else {self.positions: lambda n: np.arange(n, dtype="int32")}
        resolver = MaskResolver(graph, given, self.limit)
        found: dict[Any, Match] = {}
        for binding in graph.bindings:
            match = self._direct(binding.value) or match_softmax(graph, resolver, binding)
            if match is not None:
                found[binding.var if match.result is None else match.result] = match
        if not found:
            return module
        builder = Builder()
        layer = 0
        for binding in bindings_of(func):
            match = found.get(binding.var)
            if match is None:
                builder.keep(binding)
                continue
            path = match.path or self.where(binding.var)
            mask = self._resolve(match, resolver, path)
            _emit(builder, binding.var, match, mask, layer, path)
            layer += 1
        return update_function(module, "main", builder.function(func.params, func.body.body, func.attrs))

    def _direct(self, value: Any) -> Match | None:
        """llmc.masked_attention as a match."""
        call = match_opaque(value, MASKED_ATTENTION)
        if call is None:
            return None
        operands, text = call
        attrs = MaskedAttentionAttrs.from_json(text)
        q, k, v, *rest = operands
        terms = (Term(rest.pop(0)),) if attrs.has_mask else ()
        return Match(
            q=q,
            k=k,
            v=v,
            heads=int(q.ty.shape[1]),
            scale=attrs.scale,
            softcap=attrs.softcap,
            terms=terms,
            sinks=rest[0] if attrs.has_sinks else None,
            causal=attrs.causal,
            window=attrs.window,
            path=attrs.path,
        )

    def _resolve(self, match: Match, resolver: MaskResolver, path: str) -> ResolvedMask:
        try:
            if not match.terms:
                mask = ResolvedMask(match.causal, match.window if match.causal else 0)
            else:
                mask = resolver.resolve(match.terms, match.heads)
                if match.window and match.window != mask.window:
                    raise MaskError(
                        f"a mask with window {mask.window or 'none'} while it is called with window {match.window}"
                    )
            if not mask.causal:
                raise MaskError("no causal mask: tokens see later tokens")
        except MaskError as error:
            raise LlmcError(
                "mask-not-understood",
                f"The attention in {path} has {error}.",
                hint="llmc compiles decoder-only models with causal, sliding-window, chunked or ALiBi attention.",
                context={"module": path},
            ) from None
        return mask


def _emit(builder: Builder, var: Any, match: Match, mask: ResolvedMask, layer: int, path: str) -> None:
    """Bind `var` to the attention; match.layout brings [1, T, h, dv] into the form that was there before."""
    attrs = AttentionAttrs(
        layer=layer,
        scale=match.scale,
        window=mask.window,
        chunk=mask.chunk,
        softcap=match.softcap,
        has_sinks=match.sinks is not None,
        has_alibi=mask.slopes is not None,
        path=path,
    )
    q, k, v = (
        fix(builder, x) for fix, x in ((match.fix_q, match.q), (match.fix_k, match.k), (match.fix_v, match.v))
    )
    operands = [q, k, v]
    if match.sinks is not None:
        operands.append(match.sinks)
    if mask.slopes is not None:
        operands.append(relax.const(np.array(mask.slopes, "float32"), "float32"))
    heads, length, value_dim = q.ty.shape[1], q.ty.shape[2], v.ty.shape[3]
    out_type = tensor_type([tirx.IntImm("int64", 1), length, heads, value_dim], str(v.ty.dtype))
    call = opaque_call(ATTENTION, operands, attrs.to_json(), out_type)
    if match.layout is None:
        builder.bind(var, call)
    else:
        builder.bind(var, match.layout(builder, builder.emit(call, "attention")))


__all__ = ["MASK", "MASKED_ATTENTION", "MaskAttrs", "MaskedAttentionAttrs", "RaiseAttention"]
