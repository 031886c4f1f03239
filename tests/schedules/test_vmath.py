import math

import numpy as np
import pytest

from llmc.schedules import emit as e
from llmc.schedules import vmath

REFERENCE = {
    "exp": (np.exp, -87, 88),
    "exp_nonpositive": (np.exp, -20, 0),
    "exp2_nonpositive": (np.exp2, -120, 0),
    "tanh": (np.tanh, -12, 12),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -80, 80),
    "erf": (np.vectorize(math.erf), -6, 6),
}


def kernel(name, lanes):
    built = []
    with e.kernel(built):
        n = e.dim("N")
        x, y = e.tensor("x", [n], "float32"), e.tensor("y", [n], "float32")
        with e.root(), e.loop(n // lanes) as i:
            e.store(y, i * lanes, getattr(vmath, name)(e.load(x, i * lanes, lanes), lanes), lanes)
    return built[0]


def test_accuracy_and_special_values(best, tools):
    library = tools.build(best, **{name: kernel(name, best.lanes_f32) for name in REFERENCE})

    def call(name, x):
        y = tools.tensor(np.zeros_like(x))
        library[name](tools.tensor(x), y)
        return y.numpy()

    for name, (f, low, high) in REFERENCE.items():
        x = np.linspace(low, high, 1 << 16).astype(np.float32)
        expected = f(x.astype(np.float64))
        bound = 3e-7 if name != "exp_nonpositive" else 2e-6
        error = np.abs(call(name, x) - expected) / np.maximum(np.abs(expected), 1e-37)
        assert error.max() < bound, name
        assert np.isnan(call(name, np.full(16, np.nan, np.float32))).all(), name
    ends = np.resize(np.array([np.inf, -np.inf, 0, 1e30, -1e30, 100, -200, -1e-20], np.float32), 16)
    with np.errstate(over="ignore"):
        assert np.array_equal(call("exp", ends)[:8], np.exp(ends)[:8])
    assert call("exp_nonpositive", -np.abs(ends))[1] == 0
    assert np.array_equal(call("tanh", ends)[:8], np.tanh(ends)[:8])
    assert call("sigmoid", ends)[:5].tolist() == [1, 0, 0.5, 1, 0]
    assert call("erf", ends)[:5].tolist() == [1, -1, 0, 1, -1]


def test_coarse_powers_are_good_enough_for_bf16(best, tools):
    lanes, built = best.lanes_f32, []
    with e.kernel(built):
        n = e.dim("N")
        x, y = e.tensor("x", [n], "float32"), e.tensor("y", [n], "float32")
        with e.root(), e.loop(n // lanes) as i:
            value = vmath.exp2_nonpositive(e.load(x, i * lanes, lanes), lanes, coarse=True)
            e.store(y, i * lanes, value, lanes)
    at = np.linspace(-100, 0, 1 << 16).astype(np.float32)
    y = tools.tensor(np.zeros_like(at))
    tools.build(best, k=built[0])["k"](tools.tensor(at), y)
    expected = np.exp2(at.astype(np.float64))
    assert np.abs(y.numpy() / expected - 1).max() < 4e-6
    assert y.numpy()[-1] == 1


@pytest.mark.parametrize("preset", ["x86-64-v3", "aarch64"])
def test_no_scalar_calls(preset, tools):
    from llmc.targets.cpu.backend import capabilities

    caps = capabilities(preset)
    text = tools.assembly(caps, **{name: kernel(name, caps.lanes_f32) for name in REFERENCE})
    for name in ("expf", "tanhf", "erff", "roundevenf"):
        assert name not in text
