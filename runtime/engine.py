"""The one place that calls compiled functions. Tests put an engine in numpy in its stead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from llmc.errors import LlmcError
from llmc.kv_plan import KVPlan
from llmc.runtime.library import Library, pack, tensor_view
from llmc.runtime.memory import Bytes, huge_zeros, resident_bytes
from llmc.runtime.pages import Int32s
from llmc.runtime.weights import Weights

if TYPE_CHECKING:
    from llmc.runtime.sampler import Draw

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StepInputs:
    """Arguments of `step` and `decode`, all int32, each aligned to 64 bytes.

    T tokens of B sequences laid end to end; group g has a block table of W_g entries per sequence.

    Attributes:
        input_ids, positions: [T].
        query_start: [B+1]; sequence b's tokens are query_start[b]..query_start[b+1].
        context_len: [B]; tokens of each sequence, the new ones included.
        block_tables: per group [B, W_g].
        slots: per group [T]; page * page_size + offset where a token's key and value go.
        logit_rows: [R]; tokens whose logits are wanted.
    """

    input_ids: Int32s
    positions: Int32s
    query_start: Int32s
    context_len: Int32s
    block_tables: tuple[Int32s, ...]
    slots: tuple[Int32s, ...]
    logit_rows: Int32s

    def in_order(self) -> list[Int32s]:
        """The arrays in the order of the compiled functions' parameters."""
        groups = [a for pair in zip(self.block_tables, self.slots, strict=True) for a in pair]
        return [
            self.input_ids,
            self.positions,
            self.query_start,
            self.context_len,
            *groups,
            self.logit_rows,
        ]


def input_names(groups: int) -> list[str]:
    """Names of the compiled functions' parameters before pools and weights."""
    tables = [name for g in range(groups) for name in (f"block_table_{g}", f"slot_{g}")]
    return ["input_ids", "positions", "query_start", "context_len", *tables, "logit_rows"]


class Engine(Protocol):
    """Runs one step on a cache that it owns."""

    def run(self, function: str, inputs: StepInputs) -> Floats:
        """Logits f32[R, V] of `step` or `decode`; updates the cache."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes: `weights`, `weights_resident`, `kv`, `kv_resident`."""
        ...


@runtime_checkable
class SamplingEngine(Engine, Protocol):
    """An engine that also chooses tokens, where the logits are."""

    def sample(self, function: str, inputs: StepInputs, draws: Sequence[Draw]) -> list[int]:
        """A token for each row of logits of `step` or `decode`, as sampler.choose takes it; updates the cache.

        Raises:
            LlmcError: the logits are not numbers.
        """
        ...


class CompiledEngine:
    """The functions of a model.so with its weights and KV pools.

    Args:
        library: the loaded model.so.
        functions: names of its step functions.
        weights: its parameters.
        plan, pages: shape of the pools, which are allocated here.
    """

    def __init__(
        self,
        library: Library,
        functions: tuple[str, ...],
        weights: Weights,
        plan: KVPlan,
        pages: tuple[int, ...],
    ) -> None:
        self._functions = {name: library.function(name) for name in functions}
        self.library = library
        self._weights = weights
        self._pools: list[Bytes] = []
        tensors: list[Any] = []
        for group, count in zip(plan.groups, pages, strict=True):
            for shape in group.pool_shapes(count, plan.page_size):
                raw = _allocate(int(np.prod(shape)) * group.item_bytes)
                self._pools.append(raw)
                tensors.append(tensor_view(raw, shape, group.storage_dtype))
        self._tail = (pack(tensors), pack(weights.tensors))

    def run(self, function: str, inputs: StepInputs) -> Floats:
        logits: Any = np.from_dlpack(self._functions[function](*inputs.in_order(), *self._tail))
        return cast(Floats, logits)

    def memory(self) -> dict[str, int]:
        return {
            "weights": self._weights.nbytes,
            "weights_resident": self._weights.resident(),
            "kv": sum(pool.nbytes for pool in self._pools),
            "kv_resident": sum(resident_bytes(pool) for pool in self._pools),
        }


def _allocate(nbytes: int) -> Bytes:
    try:
        return huge_zeros(nbytes)
    except OSError:
        raise LlmcError(
            "out-of-memory",
            f"{nbytes} bytes for the KV cache cannot be allocated.",
            hint="Load with a smaller max_memory or kv_pages.",
        ) from None
