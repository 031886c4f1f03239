"""Linear kernels with activations, gates, biases and residuals against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.packing import pack_sources
from llmc.passes.step_module import PackedParam
from llmc.schedules.choice import ByRows
from llmc.schedules.layout import linear_layout
from llmc.schedules.linear import LinearConfig, LinearSchedule, linear

TORCH = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
K = 40
# of the rows that share a pass, two and one are enough: all take the same epilogue, and each is code of its own
NARROW = ByRows((LinearSchedule(rows_tile=2),))


def build(tools, caps, schedule=NARROW, **options):
    layout = linear_layout(options["in_dtype"], caps)
    config = LinearConfig(k=K, layout=layout, schedule=schedule, **options)
    return config, tools.build(caps, linear=linear(config, caps))["linear"]


def check(tools, caps, *, n, dtype="float32", rows=(1, 9), **options):
    config, kernel = build(
        tools, caps, n=n, in_dtype=dtype, weight_dtype=dtype, out_dtype="float32", **options
    )
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    held = 2 * n if config.gated else n
    w, bias = torch.randn(held, K).to(kind), torch.randn(held).to(kind)
    param = PackedParam(
        "w", "w", dtype, config.packed_shape(caps), config.layout.as_text(), gated=config.gated
    )
    packed = pack_sources(param, lambda _: w).view(tools.dtypes[dtype])
    for t in rows:
        x, r = torch.randn(t, K).to(kind), torch.randn(t, n).to(kind)
        args = [x] + [a for a, used in ((bias, config.has_bias), (r, config.has_residual)) if used]
        arrays = [a.float().numpy().astype(tools.dtypes[dtype]) for a in args]
        out = tools.tensor(np.full((t, n), np.nan, np.float32))
        kernel(tools.tensor(arrays[0]), tools.tensor(packed), *map(tools.tensor, arrays[1:]), out)
        y = x.float() @ w.float().T + (bias.float() if config.has_bias else 0)
        if config.gated:
            gate, up = (y[:, n:], y[:, :n]) if config.gate_second else (y[:, :n], y[:, n:])
            y = TORCH[config.activation](gate) * up
        elif config.activation:
            y = TORCH[config.activation](y)
        y = y + r.float() if config.has_residual else y
        np.testing.assert_allclose(out.numpy(), y.numpy(), rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("activation", sorted(TORCH))
def test_activation(tools, best, activation):
    check(tools, best, n=70, activation=activation, has_bias=True)


@pytest.mark.parametrize("n", [64, 50])
@pytest.mark.parametrize("gate_second", [False, True])
def test_gate(tools, caps, n, gate_second):
    check(tools, caps, n=n, activation="silu", gated=True, gate_second=gate_second, has_bias=True)


def test_gate_in_bfloat16(tools, caps):
    check(tools, caps, n=96, dtype="bfloat16", activation="silu", gated=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residual(tools, caps, dtype):
    check(tools, caps, n=50, dtype=dtype, has_residual=True)


def test_everything_at_once_in_pieces_of_the_columns(tools, best):
    """Sums that are kept in memory between pieces take the same epilogue."""
    pieces = ByRows((LinearSchedule(k_block=16),))
    check(tools, best, n=64, activation="gelu", gated=True, has_bias=True, has_residual=True, schedule=pieces)
