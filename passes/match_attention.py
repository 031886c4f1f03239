"""Finds attention that a model spells out: matmul, scale, bias or mask, softcap, softmax, matmul."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.passes.resolve_mask import MaskResolver, Term
from llmc.passes.rewrite import Builder, Graph

Fix = Callable[[Builder, Any], Any]


def _unchanged(builder: Builder, x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Match:
    """One attention before its mask is resolved.

    Attributes:
        q, k, v: operands; fix_q, fix_k, fix_v bring them to [1,h,T,dk], [1,hk,T,dk], [1,hk,T,dv].
        terms: what is added to the scores.
        sinks: extra logit per head, or None.
        causal, window: what was said besides the mask.
        result: variable that the attention's output replaces; None = the matched binding itself.
        layout: brings [1,T,h,dv] into the type of `result`; None = it has that type.
    """

    q: Any
    k: Any
    v: Any
    scale: float
    softcap: float
    terms: tuple[Term, ...]
    sinks: Any
    causal: bool
    window: int
    path: str
    result: Any
    fix_q: Fix = _unchanged
    fix_k: Fix = _unchanged
    fix_v: Fix = _unchanged
    layout: Fix | None = None


def match_softmax(graph: Graph, resolver: MaskResolver, binding: Any) -> Match | None:
    """The attention around a softmax, or None."""
    return None
