"""What is reported of a side."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from llmc.limits import MachineLimits
from tools.bench_sides.protocol import Round
from tools.bench_sides.shapes import SHAPES


@dataclass(frozen=True)
class Weights:
    """The weights that a side reads.

    Attributes:
        shape: name of the model's shape.
        nbytes: of all weights in the side's own format, scales included.
    """

    shape: str
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the source (tied weights counted once), head included."""
        return 8 * self.nbytes / parameters(self.shape)


def parameters(shape: str) -> int:
    """Weights of the source model; a tied head is no weight of its own."""
    c = SHAPES[shape]
    tables = 1 if c["tie_word_embeddings"] else 2
    return layer_parameters(shape) + tables * c["vocab_size"] * c["hidden_size"] + c["hidden_size"]


def layer_parameters(shape: str) -> int:
    """Weights of all decoder layers."""
    c = SHAPES[shape]
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    width = c.get("head_dim") or hidden // heads
    query, key = heads * width, c["num_key_value_heads"] * width
    attention = 2 * hidden * query + 2 * hidden * key
    if c["model_type"] == "qwen2":
        attention += query + 2 * key  # biases
    return c["num_hidden_layers"] * (attention + 3 * hidden * c["intermediate_size"] + 2 * hidden)


def prefill_operations(shape: str, prompt: int) -> int:
    """Multiplications plus additions of the linear layers: all layers for each token, the head for the last one."""
    c = SHAPES[shape]
    return 2 * (layer_parameters(shape) * prompt + c["vocab_size"] * c["hidden_size"])


def summary(
    rounds: list[Round], prompt: int, kind: str, weights: Weights, limits: MachineLimits
) -> dict[str, Any]:
    """Medians of one side, and how near they are to the machine's limits."""
    prefill = statistics.median(r.prefill for r in rounds)
    steps = [s for r in rounds for s in r.decode]
    decode = statistics.median(steps)
    peak = limits.multiply.get("bf16") or limits.multiply["f32"]
    return {
        "format": kind,
        "weight_bytes": weights.nbytes,
        "bits_per_weight": weights.bits_per_weight,
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": prompt / prefill,
        "prefill_spread": spread([r.prefill for r in rounds]),
        "prefill_share_of_multiply_peak": prefill_operations(weights.shape, prompt) / prefill / peak,
        "decode_seconds": decode,
        "decode_tokens_per_second": 1 / decode,
        "decode_spread": spread(steps),
        "decode_share_of_read_bandwidth": read_bytes(weights) / decode / limits.read,
        "peak_rss_bytes": max(r.peak_rss for r in rounds),
    }


def read_bytes(weights: Weights) -> float:
    """Weight bytes that a decode step must read: of an untied embedding it reads one row only."""
    c = SHAPES[weights.shape]
    if c["tie_word_embeddings"]:
        return weights.nbytes
    # bytes of the table are not known for every side; its share of the weights is near enough
    return weights.nbytes * (1 - c["vocab_size"] * c["hidden_size"] / parameters(weights.shape))


def spread(values: list[float]) -> float:
    """Half the distance between the 10th and the 90th percentile, as a share of the median."""
    if len(values) < 2:
        return 0.0
    ordered = sorted(values)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9))
    return (high - low) / 2 / statistics.median(ordered)
