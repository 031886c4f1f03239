"""ShareTensors and TrustWeights: fewer calls of the virtual machine, the same kernels on the same memory."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from llmc.passes.order import TrustWeights
from llmc.passes.share_tensors import ShareTensors


@I.ir_module
class Planned:
    """Two tensors of one shape at one place, one of another shape there, a view of each, a tuple that is read."""

    @R.function(pure=False)
    def step(x: R.Tensor(("n", 8), "float32"), params: R.Tuple(R.Tensor((8,), "float32"))):
        n = T.int64()
        s: R.Any = R.memory.alloc_storage(
            R.shape([4096]), R.prim_value(0), R.str("global"), R.dtype("float32")
        )
        a: R.Tensor((n, 8), "float32") = R.memory.alloc_tensor(
            s, R.prim_value(0), R.shape([n, 8]), R.dtype("float32")
        )
        R.call_packed("kernel", x, a, ty_args=R.Tuple)
        b: R.Tensor((n * 8,), "float32") = R.reshape(a, R.shape([n * 8]))
        R.call_packed("kernel", b, x, ty_args=R.Tuple)
        c: R.Tensor((n, 8), "float32") = R.memory.alloc_tensor(
            s, R.prim_value(0), R.shape([n, 8]), R.dtype("float32")
        )
        both = (c, x)
        first: R.Tensor((n, 8), "float32") = both[0]
        R.call_packed("kernel", x, first, ty_args=R.Tuple)
        d: R.Tensor((n * 8,), "float32") = R.reshape(c, R.shape([n * 8]))
        e: R.Tensor((n, 4), "float32") = R.memory.alloc_tensor(
            s, R.prim_value(0), R.shape([n, 4]), R.dtype("float32")
        )
        f: R.Tensor((n, 8), "float32") = R.memory.alloc_tensor(
            s, R.prim_value(64), R.shape([n, 8]), R.dtype("float32")
        )
        R.call_packed("kernel", d, e, f, ty_args=R.Tuple)
        return first


def calls(module, name):
    return [
        b.value
        for block in module["step"].body.blocks
        for b in block.bindings
        if isinstance(b.value, relax.Call) and name in str(b.value.op)
    ]


def test_one_tensor_per_place_and_shape():
    module = ShareTensors()(Planned)
    relax.analysis.well_formed(module)
    allocated = calls(module, "alloc_tensor")
    # a and c are one; another shape or another place is another tensor
    assert len(allocated) == 3
    assert len(calls(module, "reshape")) == 1
    kernels = [[a.name for a in call.args] for call in calls(module, "kernel")]
    assert kernels == [["x", "a"], ["b", "x"], ["x", "a"], ["b", "e", "f"]]
    assert module["step"].body.body.name == "a"
    bindings = [b for block in module["step"].body.blocks for b in block.bindings]
    assert not any(isinstance(b.value, relax.Tuple | relax.TupleGetItem) for b in bindings)
    # [n, 8], [n * 8] and [n, 4] are made once each
    assert sum(isinstance(b.value, relax.ShapeExpr) for b in bindings) == 3


def test_branches_stay_as_they_are():
    @I.ir_module
    class Branching:
        @R.function
        def step(x: R.Tensor(("n",), "float32"), flag: R.Tensor((), "bool")):
            if flag:
                y = R.add(x, x)
            else:
                y = R.multiply(x, x)
            return y

    tvm.ir.assert_structural_equal(ShareTensors()(Branching), Branching)


def test_weights_are_not_checked_at_every_step():
    module = TrustWeights()(Planned)
    assert int(module["step"].attrs["num_input"]) == 1
    lowered = relax.transform.VMShapeLower()(module).script()
    # of x alone: the tuple's field would be a second one
    assert lowered.count("vm.builtin.check_tensor_info") == 1
