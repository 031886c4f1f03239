"""The debug variant of a compiled graph: the same passes and kernels, returning each decoder layer's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llmc.errors import LlmcError
from llmc.frontend.graph import SourceModel
from llmc.spec import CompileSpec


def run(source: SourceModel, spec: CompileSpec, token_ids: Sequence[int]) -> Mapping[str, np.ndarray]:
    """Prefill `token_ids` in one step through the paged kernels and return the hidden states.

    Returns:
        module path of each decoder layer -> float32 [n, d].
    """
    import tvm
    from tvm import relax

    from llmc.frontend.capture import capture
    from llmc.packing import packed_tensors
    from llmc.passes import order
    from llmc.passes.plan_kv_cache import PlanKVCache
    from llmc.passes.quantize_weights import QuantizeWeights
    from llmc.passes.step_module import LoweredGraph
    from llmc.quant.stored import SourceQuantizer, stored_schemes
    from llmc.targets.backend import get
    from llmc.targets.codegen import build_executable

    assert source.weights is not None
    backend, caps = get(spec.target)
    if backend.on_device:
        raise LlmcError("taps-on-device", f"Hidden states cannot be taken out of {caps.preset} code yet.")
    target = backend.tvm_target(caps)
    graph = capture(source, taps=True)
    lowered = LoweredGraph.from_model(graph)
    quantize = QuantizeWeights.of(spec, stored_schemes(source.weights))
    for _, graph_pass in order.graph_phase(caps, quantize):
        lowered = graph_pass(lowered)
    n = len(token_ids)
    kv_dtype = spec.kv_dtype.value if spec.kv_dtype else None
    plan = PlanKVCache(page_size=spec.page_size, kv_dtype=kv_dtype, max_seq_len=2**31 - 1)(lowered)
    step = order.make_step(caps, plan)(lowered)
    bounds = {"T": n, "B": 1, "R": n}
    for name, step_pass in order.step_phase(caps, target, bounds):
        if name != "SpecializeDecode":
            step = step_pass(step)
    module = step.module
    with target:
        for _, build_pass in order.build_phase():
            module = build_pass(module)
    vm = relax.VirtualMachine(build_executable(module, target), tvm.cpu())
    params = []
    for param, data in packed_tensors(step.params, source.weights, SourceQuantizer(source.weights)):
        params.append(_tensor(data, param.dtype))
    pages = -(-n // plan.page_size) + 1
    pools = []
    for group in plan.groups:
        for shape in (group.k_shape(pages, plan.page_size), group.v_shape(pages, plan.page_size)):
            pools.append(_zeros(shape, group.dtype))
    ids = np.asarray(token_ids, np.int32)
    order_ = np.arange(n, dtype=np.int32)
    arrays = [ids, order_, np.array([0, n], np.int32), np.array([n], np.int32)]
    table = np.arange(1, pages, dtype=np.int32)[None]
    for _ in plan.groups:
        arrays += [table, order_ + plan.page_size]
    arrays.append(order_)
    outputs = vm["step"](*[tvm.runtime.tensor(a) for a in arrays], tuple(pools), tuple(params))
    return {
        path: _float32(out).reshape(n, -1) for path, out in zip(graph.taps, list(outputs)[1:], strict=True)
    }


def _tensor(data: np.ndarray, dtype: str) -> object:
    """A tvm tensor of `dtype` from bytes (bfloat16 comes as uint16)."""
    import ml_dtypes
    import tvm

    return tvm.runtime.tensor(data.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else data)


def _zeros(shape: tuple[int, ...], dtype: str) -> object:
    return _tensor(np.zeros(shape, np.uint16 if dtype == "bfloat16" else np.dtype(dtype)), dtype)


def _float32(tensor: object) -> np.ndarray:
    array: np.ndarray = tensor.numpy()  # type: ignore[attr-defined]
    return array.astype(np.float32)
