"""The debug variant of a compiled graph: the same passes and kernels, returning each decoder layer's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmc.artifact import StoredParams
from llmc.errors import LlmcError
from llmc.frontend.graph import SourceModel
from llmc.spec import CompileSpec

if TYPE_CHECKING:
    from llmc.passes.step_module import PackedParam


def run(
    source: SourceModel, spec: CompileSpec, token_ids: Sequence[int], stored: StoredParams | None = None
) -> Mapping[str, np.ndarray]:
    """Prefill `token_ids` in one step through the paged kernels and return the hidden states.

    Args:
        stored: the artifact of this graph; its weights are mapped, in their layouts. Without one the source's are packed
            and held in memory.

    Returns:
        module path of each decoder layer -> float32 [n, d].
    """
    import tvm
    from tvm import relax

    from llmc.frontend.capture import capture
    from llmc.passes import order
    from llmc.passes.plan_kv_cache import PlanKVCache
    from llmc.passes.quantize_weights import QuantizeWeights
    from llmc.passes.step_module import LoweredGraph
    from llmc.passes.weight_layouts import WeightLayouts
    from llmc.quant.stored import stored_schemes
    from llmc.targets.backend import get
    from llmc.targets.codegen import build_executable

    assert source.weights is not None
    backend, caps = get(spec.target)
    if backend.on_device:
        raise LlmcError("taps-on-device", f"Hidden states cannot be taken out of {caps.preset} code yet.")
    target = backend.tvm_target(caps)
    graph = capture(source, taps=True)
    lowered = LoweredGraph.from_model(graph)
    quantize = QuantizeWeights.of(spec, stored_schemes(source.weights), untied=bool(source.untied))
    decided = WeightLayouts((entry, entry.layout) for entry in (stored.entries if stored else ()))
    for _, graph_pass in order.graph_phase(caps, quantize, None, spec.disable_passes, decided):
        lowered = graph_pass(lowered)
    n = len(token_ids)
    kv_dtype = spec.kv_dtype.value if spec.kv_dtype else None
    plan = PlanKVCache(page_size=spec.page_size, kv_dtype=kv_dtype, max_seq_len=2**31 - 1)(lowered)
    step = order.make_step(caps, plan)(lowered)
    bounds = {"T": n, "B": 1, "R": n}
    for name, step_pass in order.step_phase(caps, target, bounds, spec.disable_passes):
        if name != "SpecializeDecode":
            step = step_pass(step)
    module = step.module
    with target:
        for _, build_pass in order.build_phase():
            module = build_pass(module)
    vm = relax.VirtualMachine(build_executable(module, target), tvm.cpu())
    params = _weights(step.params, source, stored)
    pages = -(-n // plan.page_size) + 1
    pools = []
    for group in plan.groups:
        for shape in group.pool_shapes(pages, plan.page_size):
            pools.append(_zeros(shape, group.storage_dtype))
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


def _weights(params: Sequence[PackedParam], source: SourceModel, stored: StoredParams | None) -> list[object]:
    from llmc.packing import packed_tensors
    from llmc.quant.stored import SourceQuantizer
    from llmc.runtime.library import tensor_view
    from llmc.runtime.memory import map_file

    assert source.weights is not None
    entries = {entry.name: entry for entry in stored.entries} if stored is not None else {}
    found: dict[str, object] = {}
    shards: dict[str, np.ndarray] = {}
    for param in params:
        entry = entries.get(param.name)
        same = (param.shape, param.dtype, param.layout_text)
        if stored is None or entry is None or (entry.shape, entry.dtype, entry.layout) != same:
            continue
        if entry.shard not in shards:
            shards[entry.shard] = map_file(stored.folder / entry.shard)
        raw = shards[entry.shard][entry.offset : entry.offset + entry.nbytes]
        found[param.name] = tensor_view(raw, entry.shape, entry.dtype)
    rest = tuple(param for param in params if param.name not in found)
    for param, data in packed_tensors(rest, source.weights, SourceQuantizer(source.weights)):
        found[param.name] = _tensor(data, param.dtype)
    return [found[param.name] for param in params]


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
