import re

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from llmc import ir
from llmc.schedules.generic import SCHEDULED, DefaultSchedule
from llmc.targets.cpu.backend import capabilities, tvm_target

HEADS, DIM = 4, 24


def _function(width, dtype):
    """What a decoder layer leaves to generic schedules: norms, activations, rotary embedding, softmax."""
    op, bb, tokens = relax.op, relax.BlockBuilder(), tirx.Var("T", "int64")

    def var(name, shape, dtype=dtype):
        return relax.Var(name, ir.tensor_type(shape, dtype))

    x, gate = var("x", [1, tokens, width]), var("gate", [1, tokens, width])
    heads = var("heads", [1, tokens, HEADS, DIM])
    weight, cos = var("weight", [width]), var("cos", [1, tokens, DIM])
    logits = var("logits", [1, tokens, 100], "float32")
    params = [x, gate, heads, weight, cos, logits]
    with bb.function("main", params):
        with bb.dataflow():
            h = bb.emit(op.add(x, gate))
            f = bb.emit(op.astype(h, "float32"))
            mean = bb.emit(op.mean(bb.emit(op.multiply(f, f)), [-1], keepdims=True))
            scale = bb.emit(op.rsqrt(bb.emit(op.add(mean, relax.const(1e-6, "float32")))))
            norm = bb.emit(op.multiply(weight, bb.emit(op.astype(bb.emit(op.multiply(f, scale)), dtype))))
            swiglu = bb.emit(op.multiply(bb.emit(op.nn.silu(gate)), x))
            gelus = bb.emit(op.add(bb.emit(op.nn.gelu_tanh(gate)), bb.emit(op.nn.gelu(x))))
            q = bb.emit(op.permute_dims(heads, [0, 2, 1, 3]))
            low = bb.emit(op.strided_slice(q, [3], [0], [DIM // 2]))
            high = bb.emit(op.strided_slice(q, [3], [DIM // 2], [DIM]))
            turned = bb.emit(op.concat([bb.emit(op.negative(high)), low], axis=-1))
            rotary = bb.emit(op.add(q, bb.emit(op.multiply(turned, bb.emit(op.expand_dims(cos, 1))))))
            soft = bb.emit(op.nn.softmax(logits, -1))
            wide = bb.emit(
                op.nn.layer_norm(f, relax.const(np.ones(width, "f")), relax.const(np.ones(width, "f")), [-1])
            )
            best = bb.emit(op.max(logits, [-1], keepdims=False))
            result = bb.emit_output(relax.Tuple([h, norm, swiglu, gelus, rotary, soft, wide, best]))
        bb.emit_func_output(result)
    module = bb.get()
    transform = relax.transform
    for step in (
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FuseOps(),
        transform.FuseTIR(),
    ):
        module = step(module)
    return module, [[None if not isinstance(d, tirx.IntImm) else int(d) for d in p.ty.shape] for p in params]


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 64), ("float16", 100), ("float32", 33)])
def test_scheduled_equals_unscheduled(dtype, width, best, tools):
    caps = best
    module, shapes = _function(width, dtype)
    scheduled = DefaultSchedule(caps)(module)
    plain, ours = (
        relax.VirtualMachine(relax.build(m, tvm_target(caps)), tvm.cpu()) for m in (module, scheduled)
    )
    rng = np.random.default_rng(0)
    bound = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    for tokens in (1, 3, 600):  # 600 x 33 elements are past the threshold for threads
        args = [
            tools.tensor(tools.random(rng, tuple(tokens if d is None else d for d in shape), dtype))
            for shape in shapes[:-1]
        ]
        args.append(tools.tensor(tools.random(rng, (1, tokens, 100), "float32")))
        for a, b in zip(plain["main"](*args), ours["main"](*args), strict=True):
            a, b = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
            assert np.isfinite(b).all()
            assert np.abs(a - b).max() <= bound * max(1.0, np.abs(a).max())


@pytest.mark.parametrize("preset", ["x86-64-v4-bf16", "aarch64"])
def test_hot_kernels_are_vectors(preset, tools):
    caps = capabilities(preset)
    module = DefaultSchedule(caps)(_function(64, "bfloat16")[0])
    funcs = {gv.name_hint: f for gv, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
    text = tools.assembly(caps, **funcs)
    assert not re.search(r"\b(expf|tanhf|erff|powf|__truncsfbf2)\b", text)
    register = r"%zmm\d" if caps.vector_bytes == 64 else r"fmla\s+v\d+\.4s"
    for name in ("silu", "rsqrt", "concatenate"):
        body = [f for f in funcs if name in f]
        assert body, f"no kernel with {name}: {list(funcs)}"
    assert len(re.findall(register, text)) > 100


def test_scheduled_functions_are_left_alone(best):
    module, _ = _function(64, "float32")
    gvar, func = next((g, f) for g, f in module.functions.items() if isinstance(f, tirx.PrimFunc))
    marked = tvm.IRModule({gvar: func.with_attr(SCHEDULED, True)})
    tvm.ir.assert_structural_equal(DefaultSchedule(best)(marked), marked)


def test_unknown_functions_stay_correct(best, tools):
    """A reduction over the first axis matches no rule."""
    bb, tokens = relax.BlockBuilder(), tirx.Var("T", "int64")
    x = relax.Var("x", ir.tensor_type([tokens, 8], "float32"))
    with bb.function("main", [x]):
        bb.emit_func_output(bb.emit(relax.op.sum(x, [0])))
    module = DefaultSchedule(best)(relax.transform.LegalizeOps()(bb.get()))
    vm = relax.VirtualMachine(relax.build(module, tvm_target(best)), tvm.cpu())
    a = np.arange(40, dtype=np.float32).reshape(5, 8)
    assert np.allclose(vm["main"](tools.tensor(a)).numpy(), a.sum(0))
