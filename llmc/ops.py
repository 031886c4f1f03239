"""The opaque operators of a ModelGraph: what the frontend emits and the passes lower.

They appear in Relax as ``R.call_pure_packed(name, tensors..., R.str(attrs.to_json()))`` (see llmc/ir.py).

    llmc.attention(q[1,h,T,dk], k[1,hk,T,dk], v[1,hk,T,dv], sinks[h]?, alibi[h]?, attrs) -> [1,T,h,dv]
    llmc.expert_linear(x[n,d], expert_ids[n], weight[e,o,d], bias[e,o]?, attrs) -> [n,o]
    llmc.linear(x[..,T,d], weight[o,d], bias[o]?, residual[..,T,n]?, attrs) -> [..,T,n]
    llmc.norm(x[..,k], addend like x?, weight[k]?, bias[k]?, attrs) -> like x; with addend: (sum, norm)
    llmc.heads(x, cos[..,T,n]?, sin[..,T,m]?, attrs) -> [1,h,T,d]
    llmc.head_linear(x, weight[h,o,d], cos[..,T,n]?, sin[..,T,m]?, attrs) -> [1,T,h,o + rest]

Of latent attention (AttentionAttrs.latent) k is [1,1,T,dk], v is k again, and the result [1,T,h,latent].
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

ATTENTION = "llmc.attention"
EXPERT_LINEAR = "llmc.expert_linear"
LINEAR = "llmc.linear"
NORM = "llmc.norm"
HEADS = "llmc.heads"
HEAD_LINEAR = "llmc.head_linear"

# what a linear kernel can apply to its sums: name -> Relax operator of one operand
ACTIVATIONS = {
    "silu": "relax.nn.silu",
    "gelu": "relax.nn.gelu",
    "gelu_tanh": "relax.nn.gelu_tanh",
    "relu": "relax.nn.relu",
    "sigmoid": "relax.sigmoid",
    "tanh": "relax.tanh",
}


@dataclass(frozen=True)
class AttentionAttrs:
    """What an attention block computes, per layer.

    For query position i and key position j of one sequence, head n, and kv head n // (h // hk):

        score = scale * q_i . k_j
        score = softcap * tanh(score / softcap)                 if softcap > 0
        score = score + alibi[n] * (j - i)                      if has_alibi
        allowed: j <= i  and (window == 0 or i - j < window) and (chunk == 0 or i // chunk == j // chunk)
        p = softmax over allowed j, with one more logit sinks[n] in the denominator if has_sinks

    Attributes:
        layer: running number of the attention block in the graph, 0-based; each block has its own.
        scale: factor on q.k.
        window: tokens that a query sees, itself included (Mistral's convention); 0 = all.
        chunk: size of the chunks that attention stays inside (Llama 4); 0 = none.
        softcap: bound of the scores (Gemma 2); 0 = none.
        has_sinks: a learned extra logit per head (gpt-oss) follows v in the operands.
        has_alibi: a slope per head (ALiBi, Press et al. 2021) follows v, after the sinks if both.
        path: name of the module that does the attention, for messages.
        latent: all heads read one key per token, and its first `latent` elements are the value; 0 = keys and values are apart.
        token_major: q is [1,T,h,dk].
    """

    layer: int
    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    has_alibi: bool = False
    path: str = ""
    latent: int = 0
    token_major: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> AttentionAttrs:
        return AttentionAttrs(**json.loads(text))


@dataclass(frozen=True)
class ExpertLinearAttrs:
    """One linear layer of a mixture of experts: row n of the result is ``weight[ids[n]] @ x[n] (+ bias[ids[n]])``.

    Attributes:
        has_bias: a bias [e, o] follows the weight in the operands.
        transposed: the weight is stored as [e, d, o] instead of [e, o, d] (gpt-oss).
    """

    has_bias: bool = False
    transposed: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> ExpertLinearAttrs:
        return ExpertLinearAttrs(**json.loads(text))


@dataclass(frozen=True)
class LinearAttrs:
    """A matmul with a weight and what its kernel does to the sums before it stores them.

        y = x @ weight.T (+ bias)
        y = act(y)                      if an activation is named, without gate
        y = act(y[:n]) * y[n:]          if gated: the weight holds 2n rows, the gate's first
        y = y + residual                if has_residual

    Attributes:
        activation: a key of ACTIVATIONS, ``relu2`` (relu(y)**2), or "" for none.
        gated: the weight's rows are a gate and what it multiplies.
        gate_second: the gate is the second half of the rows.
        has_bias, has_residual: which operands follow the weight, in this order.
    """

    activation: str = ""
    gated: bool = False
    gate_second: bool = False
    has_bias: bool = False
    has_residual: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> LinearAttrs:
        return LinearAttrs(**json.loads(text))


@dataclass(frozen=True)
class NormAttrs:
    """A norm along the last axis, computed in float32.

        addend = norm(addend)                                   if before: with attributes of its own
        x = x + addend                                          if adds; rounded to x's dtype, and the first result
        y = x / sqrt(mean(x**2) + eps)                          RMSNorm
        y = (x - mean(x)) / sqrt(var(x) + eps)                  if center: LayerNorm
        y = y * weight (+ bias)                                 weight + 1 if plus_one (Gemma)

    Attributes:
        eps: added to the mean square.
        rounds_first: y is rounded to x's dtype before the weight (Llama), not only after it (Gemma).
        has_weight, has_bias: which operands follow (those of `before` first).
        adds: the addend follows x in the operands.
        before: the addend is a norm of its operand (Gemma 2, OLMo 2).
        only_sum: the sum is the only result.
    """

    eps: float
    center: bool = False
    plus_one: bool = False
    rounds_first: bool = False
    has_weight: bool = False
    has_bias: bool = False
    adds: bool = False
    before: NormAttrs | None = None
    only_sum: bool = False

    @property
    def vectors(self) -> int:
        """Weights and biases of the norm itself."""
        return self.has_weight + self.has_bias

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> NormAttrs:
        return NormAttrs.of(json.loads(text))

    @staticmethod
    def of(values: dict[str, Any]) -> NormAttrs:
        """From plain values."""
        before = NormAttrs.of(values["before"]) if values.get("before") else None
        return NormAttrs(**{**values, "before": before})


@dataclass(frozen=True)
class Run:
    """Neighbouring elements of a rotated head that are computed alike: for i < count,

        out[to + i * to_step] = x[a + i * a_step] * c                                          if not pair
        out[to + i * to_step] = x[a + ..] * cos[ca + ..] + sign * x[b + ..] * sin[cb + ..]     if pair

    where cos is operand `ca_of` and sin operand `cb_of` of the two coefficient tensors, and c is 1.
    """

    to: int
    to_step: int
    count: int
    a: int
    a_step: int
    pair: bool = False
    ca_of: int = 0
    ca: int = 0
    ca_step: int = 0
    sign: int = 1
    b: int = 0
    b_step: int = 0
    cb_of: int = 0
    cb: int = 0
    cb_step: int = 0


@dataclass(frozen=True)
class HeadsAttrs:
    """Heads of a projection, read in place and rotated (Su et al. 2021, RoPE, in any arrangement).

    Element i of head n of token t, before the rotation, is element
    ``offset + t * token_stride + n * head_stride (* T if head_major) + i`` of x in C order.

    Attributes:
        heads, dim: of the result.
        runs: the rotation; they cover every element of a head once.
        norm: the first `norm_width` elements of each head are normalised first; weight and bias of that width follow x.
    """

    heads: int
    dim: int
    offset: int
    token_stride: int
    head_stride: int
    head_major: bool
    runs: tuple[Run, ...]
    norm: NormAttrs | None = None
    norm_width: int = 0

    @property
    def rotates(self) -> bool:
        return any(run.pair for run in self.runs)

    @property
    def vectors(self) -> int:
        """Operands of the norm."""
        return 0 if self.norm is None else self.norm.vectors

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> HeadsAttrs:
        return HeadsAttrs.of(json.loads(text))

    @staticmethod
    def of(values: dict[str, Any]) -> HeadsAttrs:
        """From plain values."""
        norm = NormAttrs.of(values["norm"]) if values["norm"] else None
        return HeadsAttrs(**{**values, "runs": tuple(Run(**r) for r in values["runs"]), "norm": norm})


@dataclass(frozen=True)
class HeadLinearAttrs:
    """Each head of a tensor times a weight of its own: out[t, n, :o] = weight[n] @ x[t, n]; the rest of a head is read in place.

    Element i of head n of token t is element ``offset + t * token_stride + n * head_stride (* T if head_major) + i`` of x in C
    order.

    Attributes:
        heads: of x, weight and result.
        rest: what follows the product in each head of the result, from the same x, perhaps rotated; None = nothing.
    """

    heads: int
    offset: int
    token_stride: int
    head_stride: int
    head_major: bool
    rest: HeadsAttrs | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> HeadLinearAttrs:
        values = json.loads(text)
        rest = HeadsAttrs.of(values["rest"]) if values["rest"] else None
        return HeadLinearAttrs(**{**values, "rest": rest})
