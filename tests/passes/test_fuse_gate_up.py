"""FuseGateUp: gated feed-forward layers become one linear op with its gate inside."""

from __future__ import annotations

import pytest
from tvm import relax, tirx

from llmc import ir
from llmc.ops import ACTIVATIONS, LINEAR, LinearAttrs
from llmc.passes.fuse_gate_up import FuseGateUp
from llmc.passes.rewrite import bindings_of
from llmc.passes.step_module import LoweredGraph, PackedParam
from tests.passes.graphs import Model, linear

K, N = 32, 48


def two(act=relax.op.nn.silu, *, biases=False, swapped=False, used_twice=False, symbolic=False):
    m = Model()
    rows = m.tokens if symbolic else tirx.IntImm("int64", 8)
    x = relax.Var("x", ir.tensor_type([1, rows, K], "float32"))
    m.params.append(x)
    g, u = m.param("m.gate.weight", N, K), m.param("m.up.weight", N, K)
    bg, bu = (m.param("m.gate.bias", N), m.param("m.up.bias", N)) if biases else (None, None)

    def body(emit):
        gate, up = linear(emit, x, g), linear(emit, x, u)
        if biases:
            gate, up = emit(relax.op.add(gate, bg)), emit(relax.op.add(up, bu))
        active = emit(act(gate))
        y = emit(relax.op.multiply(*((up, active) if swapped else (active, up))))
        return emit(relax.op.add(y, gate)) if used_twice else y

    return build(m, body)


def build(m, body):
    """Like Model.build, for a parameter with a symbolic dimension."""
    with m.bb.function("main", [m.ids, m.positions, *m.params]):
        with m.bb.dataflow():
            out = m.bb.emit_output(body(m.bb.emit))
        m.bb.emit_func_output(out)
    fixed = {p: [int(d) if isinstance(d, tirx.IntImm) else 0 for d in p.ty.shape] for p in m.params}
    infos = tuple(PackedParam(p.name, p.name, str(p.ty.dtype), tuple(fixed[p])) for p in m.params)
    return LoweredGraph(m.bb.get(), infos)


def ops(lowered):
    return [
        LINEAR if ir.match_opaque(b.value, LINEAR) else ir.op_name(b.value)
        for b in bindings_of(lowered.module["main"])
        if isinstance(b.value, relax.Call)
    ]


def attrs_of(lowered):
    for b in bindings_of(lowered.module["main"]):
        match = ir.match_opaque(b.value, LINEAR)
        if match:
            return match[0], LinearAttrs.from_json(match[1])
    raise AssertionError("no llmc.linear")


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("symbolic", [False, True])
def test_two_projections(swapped, biases, symbolic):
    after = FuseGateUp()(two(swapped=swapped, biases=biases, symbolic=symbolic))
    assert ops(after) == [LINEAR]
    operands, attrs = attrs_of(after)
    assert attrs == LinearAttrs("silu", gated=True, has_bias=biases)
    assert len(operands) == (3 if biases else 2)
    weight = next(p for p in after.params if p.more)
    assert (weight.name, weight.sources) == ("m.gate+up.weight", ("m.gate.weight", "m.up.weight"))
    assert weight.shape == (2 * N, K)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_known(name):
    op = {"sigmoid": relax.op.sigmoid, "tanh": relax.op.tanh}.get(name) or getattr(relax.op.nn, name)
    assert attrs_of(FuseGateUp()(two(op)))[1].activation == name


def test_squared_relu_is_an_activation_too():
    # BitNet
    after = FuseGateUp()(two(lambda gate: relax.op.square(relax.op.nn.relu(gate)), symbolic=True))
    assert ops(after) == [LINEAR]
    assert attrs_of(after)[1] == LinearAttrs("relu2", gated=True)


def test_gate_that_is_read_again_stays():
    before = two(used_twice=True)
    assert FuseGateUp()(before) is before


def test_product_without_activation_stays():
    before = two(lambda x: relax.op.negative(x))
    assert FuseGateUp()(before) is before


@pytest.mark.parametrize("gate_second", [False, True])
def test_one_weight_that_holds_both(gate_second):
    m = Model()
    x, w = m.param("x", 1, 8, K), m.param("gate_up", 2 * N, K)

    def body(emit):
        halves = emit(relax.op.split(linear(emit, x, w), 2, axis=2))
        a, b = emit(relax.TupleGetItem(halves, 0)), emit(relax.TupleGetItem(halves, 1))
        gate, up = (b, a) if gate_second else (a, b)
        return emit(relax.op.multiply(up, emit(relax.op.nn.silu(gate))))

    after = FuseGateUp()(m.build(body))
    assert ops(after) == [LINEAR]
    assert attrs_of(after)[1] == LinearAttrs("silu", gated=True, gate_second=gate_second)


def test_halves_of_unequal_width_stay():
    m = Model()
    x, w, v = m.param("x", 1, 8, K), m.param("w", 2 * N, K), m.param("v", N, K)

    def body(emit):
        y = linear(emit, x, w)
        gate = emit(relax.op.strided_slice(y, axes=[2], begin=[8], end=[8 + N]))
        return emit(relax.op.multiply(linear(emit, x, v), emit(relax.op.nn.silu(gate))))

    before = m.build(body)
    assert FuseGateUp()(before) is before
