"""Runs the compiled functions of an artifact whose kernels and cache are on a device."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from llmc.artifact import ParamEntry
from llmc.kv_plan import KVPlan
from llmc.runtime.cuda import DeviceMemory
from llmc.runtime.engine import Floats, StepInputs
from llmc.runtime.library import Library, pack
from llmc.runtime.weights import Weights


class DeviceEngine:
    """An Engine (engine.py) with weights and pools in device memory.

    The host copies a step's integers in and its logits out; all else stays on the device.

    Args:
        library: the loaded model.so with its kernels.
        functions: names of its step functions.
        weights, params: mapped files, copied one tensor at a time.
        plan, pages: shape of the pools.
        memory: where tensors are made.
    """

    def __init__(
        self,
        library: Library,
        functions: tuple[str, ...],
        weights: Weights,
        params: tuple[ParamEntry, ...],
        plan: KVPlan,
        pages: tuple[int, ...],
        memory: DeviceMemory,
    ) -> None:
        self._functions = {name: library.function(name) for name in functions}
        self._library, self._memory = library, memory
        tensors = []
        for entry, raw in zip(params, weights.raw(params), strict=True):
            tensor = memory.empty(entry.shape, entry.dtype, f"the weight {entry.name}")
            memory.put(tensor, raw)
            tensors.append(tensor)
        self._weight_bytes = memory.nbytes
        pools = []
        for group, count in zip(plan.groups, pages, strict=True):
            for shape in (group.k_shape(count, plan.page_size), group.v_shape(count, plan.page_size)):
                pools.append(memory.empty(shape, group.dtype, "the KV cache"))
        self._pool_bytes = memory.nbytes - self._weight_bytes
        self._tail = (pack(pools), pack(tensors))

    def run(self, function: str, inputs: StepInputs) -> Floats:
        arguments: list[Any] = []
        before = self._memory.nbytes
        for array in inputs.in_order():
            tensor = self._memory.empty(array.shape, "int32", "a step's inputs")
            self._memory.put(tensor, array)
            arguments.append(tensor)
        self._memory.nbytes = before  # they are freed with this call
        logits: Any = self._functions[function](*arguments, *self._tail)
        shape = tuple(int(d) for d in logits.shape)
        return cast(Floats, self._memory.get(logits, shape, np.float32))

    def memory(self) -> dict[str, int]:
        return {
            "weights": self._weight_bytes,
            "weights_resident": self._weight_bytes,
            "kv": self._pool_bytes,
            "kv_resident": self._pool_bytes,
        }
