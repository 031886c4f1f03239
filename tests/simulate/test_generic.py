"""The schedule of what Relax makes of ordinary operators, on a machine with threads."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax, tirx

from llmc.schedules.gpu.generic import schedule
from tests.simulate.gpu import SimulatedTools, gpu

TOOLS = SimulatedTools()


CASES = {
    "softmax": (lambda x: relax.op.nn.softmax(x, -1), lambda x: _softmax(x)),
    "sum": (lambda x: relax.op.sum(x, -1), lambda x: x.sum(-1)),
    "total": (lambda x: relax.op.sum(x), lambda x: x.sum()),
    "gelu of a transpose": (
        lambda x: relax.op.exp(relax.op.permute_dims(x)) + relax.const(1.0, "float32"),
        lambda x: np.exp(x.T) + 1,
    ),
    "max over the first axis": (lambda x: relax.op.max(x, 0), lambda x: x.max(0)),
}


def _softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x - x.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


@pytest.mark.parametrize("case", CASES)
def test_operators(case: str) -> None:
    build, expected = CASES[case]
    n = tirx.Var("n", "int64")
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([n, 37], "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(build(x))
        bb.emit_func_output(out)
    module = relax.transform.LegalizeOps()(bb.get())
    module = relax.transform.AnnotateTIROpPattern()(module)
    module = relax.transform.FuseTIR()(relax.transform.FuseOps()(module))
    funcs = [(g.name_hint, f) for g, f in module.functions.items() if isinstance(f, tirx.PrimFunc)]
    assert len(funcs) == 1, "the case must be one kernel"
    kernel = TOOLS.build(gpu(), k=schedule(funcs[0][1].with_attr("global_symbol", "main")))["k"]
    data = np.random.default_rng(0).standard_normal((300, 37)).astype(np.float32)
    want = expected(data.astype(np.float64))
    got = TOOLS.tensor(np.full(want.shape, np.nan, np.float32))
    kernel(TOOLS.tensor(data), got)
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=1e-5)
