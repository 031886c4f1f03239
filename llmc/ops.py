"""The opaque operators of a ModelGraph: what the frontend emits and the passes lower.

They appear in Relax as ``R.call_pure_packed(name, tensors..., R.str(attrs.to_json()))`` (see llmc/ir.py).

    llmc.attention(q[1,h,T,dk], k[1,hk,T,dk], v[1,hk,T,dv], sinks[h]?, alibi[h]?, attrs) -> [1,T,h,dv]
    llmc.expert_linear(x[n,d], expert_ids[n], weight[e,o,d], bias[e,o]?, attrs) -> [n,o]
    llmc.linear(x[..,T,d], weight[o,d], bias[o]?, residual[..,T,n]?, attrs) -> [..,T,n]
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

ATTENTION = "llmc.attention"
EXPERT_LINEAR = "llmc.expert_linear"
LINEAR = "llmc.linear"

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
    """

    layer: int
    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    has_alibi: bool = False
    path: str = ""

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
