"""What a matmul kernel does to one sum before it stores it: bias, activation, gate, residual (LinearAttrs in ops.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules import emit as e


def _gelu_tanh(x: Any) -> Any:
    inner = e.let(x * e.f32(math.sqrt(2 / math.pi)) * (e.f32(1.0) + x * x * e.f32(0.044715)))
    return x * e.f32(0.5) * (e.f32(1.0) + T.tanh(inner))


def _relu(x: Any) -> Any:
    return T.max(e.f32(0.0), x)


def _relu2(x: Any) -> Any:
    positive = e.let(_relu(x))
    return positive * positive


def _sigmoid(x: Any) -> Any:
    return e.f32(1.0) / (e.f32(1.0) + T.exp(e.f32(0.0) - x))


# keys of llmc.ops.ACTIVATIONS, and relu2
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * e.f32(0.5) * (e.f32(1.0) + T.erf(x * e.f32(math.sqrt(0.5)))),
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
    "sigmoid": _sigmoid,
    "tanh": T.tanh,
}


def finish(cfg: Any, sums: list[Any], column: Any, row: Any, bias: Any, residual: Any) -> Any:
    """The float32 value of y[row, column].

    Args:
        cfg: a LinearConfig.
        sums: [the sum], or of a gated weight [gate, what it multiplies].
    """
    value = sums[0]
    first, second = (cfg.n, 0) if cfg.gate_second else (0, cfg.n)
    if bias is not None:
        value = value + e.widen(bias[(first if cfg.gated else 0) + column], cfg.in_dtype, 1)
    if cfg.activation:
        value = ACTIVATIONS[cfg.activation](e.let(value))
    if cfg.gated:
        factor = sums[1]
        if bias is not None:
            factor = factor + e.widen(bias[second + column], cfg.in_dtype, 1)
        value = value * factor
    if residual is not None:
        value = value + e.widen(residual[row * cfg.n + column], cfg.in_dtype, 1)
    return e.let(value)
