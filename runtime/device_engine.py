"""Runs the compiled functions of an artifact whose kernels and cache are on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from llmc.artifact import Limits, Manifest
from llmc.errors import LlmcError
from llmc.kv_plan import KVPlan
from llmc.runtime import cuda
from llmc.runtime.cudart import CudaError
from llmc.runtime.device_decode import DecodeSteps, Scratch
from llmc.runtime.device_inputs import StepBuffer
from llmc.runtime.device_memory import HostBuffer, ModelMemory, is_exhausted
from llmc.runtime.device_sampler import DeviceSampler
from llmc.runtime.engine import Floats, StepInputs
from llmc.runtime.library import Library, pack
from llmc.runtime.memory import aligned_zeros
from llmc.runtime.pages import pool_bytes
from llmc.runtime.sampler import Draw
from llmc.runtime.weights import Weights

_MOST_PINNED = 64 << 20  # bytes of logits that go through pinned memory
_SPARE = 64 << 20  # bytes that must be free beside a new tensor
# share of the free memory that the KV cache may take when nothing is said: the rest is for logits and graphs
_KV_SHARE = 0.9


@dataclass(frozen=True)
class Place:
    """What an artifact's step functions need to know of it.

    Attributes:
        functions: their names.
        limits: bounds of their arguments.
        vocab_size: columns of the logits.
    """

    functions: tuple[str, ...]
    plan: KVPlan
    limits: Limits
    vocab_size: int

    @staticmethod
    def of(manifest: Manifest) -> Place:
        names = tuple(f.name for f in manifest.functions)
        return Place(names, manifest.kv_plan, manifest.limits, manifest.model.vocab_size)

    @property
    def width(self) -> int:
        """Most pages of a sequence."""
        return -(-self.limits.max_seq_len // self.plan.page_size)


class DeviceEngine:
    """An Engine (engine.py) with weights and pools in device memory; it also samples there.

    Models of one process take turns. The host copies a step's integers in, waits once, for tokens or logits, and for nothing
    else. After construction all memory of step functions is taken; give it pools before the first step.

    Args:
        library: the loaded model.so with its kernels.
        place: what it computes.
        weights, manifest: mapped files, copied one tensor after another.
        memory: where tensors are made.

    Raises:
        LlmcError: the device's memory does not suffice.
    """

    def __init__(
        self, library: Library, place: Place, weights: Weights, manifest: Manifest, memory: ModelMemory
    ) -> None:
        self._functions = {name: library.function(name) for name in place.functions}
        self._library, self._memory, self._place = library, memory, place
        self._rows: set[int] = set()  # of logits that TVM's pool has memory for
        memory.require(sum(p.nbytes for p in manifest.params), "the weights")
        tensors = [memory.empty(p.shape, p.dtype, f"the weight {p.name}") for p in manifest.params]
        memory.fill(zip(tensors, weights.raw(manifest.params), strict=True))
        self._weight_bytes = memory.nbytes
        self._params = pack(tensors)
        self._staging = HostBuffer(memory)
        self._results = HostBuffer(memory)
        self._inputs = StepBuffer(memory, self._staging)
        self._sampler = DeviceSampler(library, memory, place.limits.max_batch, place.vocab_size)
        groups = len(place.plan.groups)
        self._decode = DecodeSteps(
            memory,
            self._staging,
            lambda tensors: self._call("decode", tensors),
            place.limits.max_batch,
            groups,
            place.width,
        )
        self._pool_bytes = 0
        self._tail: tuple[Any, Any] = (None, self._params)
        memory.cudart.wait_all()  # constants of the library came by the default stream
        with memory.turn:
            self._warm_up()

    def make_pools(self, pages: Sequence[int]) -> None:
        """Take the memory of the KV cache.

        Raises:
            LlmcError: the device's memory does not suffice.
        """
        before = self._memory.nbytes
        self._tail = (self._new_pools(pages), self._params)
        self._pool_bytes = self._memory.nbytes - before

    def _new_pools(self, pages: Sequence[int]) -> Any:
        plan, pools = self._place.plan, []
        for group, count in zip(plan.groups, pages, strict=True):
            for shape in group.pool_shapes(count, plan.page_size):
                pools.append(self._memory.empty(shape, group.storage_dtype, "the KV cache"))
        return pack(pools)

    def room(self) -> int:
        """Bytes that the KV cache may take by default.

        Raises:
            LlmcError: not enough for the smallest cache.
        """
        plan = self._place.plan
        smallest = pool_bytes(plan, [2 for _ in plan.groups])  # page 0 and another one
        self._memory.require(smallest + _SPARE, f"the smallest KV cache and {_SPARE} to spare")
        return int(max(0, self._memory.cudart.memory()[0] - _SPARE) * _KV_SHARE)

    def _warm_up(self) -> None:
        """Run each function once on one token: it loads its kernels and takes the memory that it needs at most.

        What fails here fails when the model is loaded. The token goes to page 0, which no sequence has.
        """
        before = self._memory.nbytes
        groups = range(len(self._place.plan.groups))
        self._tail = (self._new_pools([1 for _ in groups]), self._params)
        one, none = aligned_zeros(1), aligned_zeros(1)
        one[0] = 1
        start = aligned_zeros(2)
        start[1] = 1
        tables = tuple(none.reshape(1, 1) for _ in groups)
        inputs = StepInputs(none, none, start, one, tables, tuple(none for _ in groups), none)
        for name in self._place.functions:
            try:
                self._call(name, self._inputs.put(inputs.in_order()))
            except RuntimeError as e:
                said = str(e).strip().splitlines()[-1].rstrip(".")
                raise LlmcError(
                    "kernels-unloadable",
                    f"The GPU's driver does not run the artifact's kernels: {said}.",
                    hint="Update the NVIDIA driver, or compile the model for this GPU: --target cuda.",
                ) from None
            self._wait()
        self._memory.nbytes = before  # these pools are freed with the next ones
        # what another model's graphs use may have been freed for this one
        Scratch.may_be_freed()

    def _call(self, function: str, tensors: Sequence[Any]) -> Any:
        """Give a function's kernels to the stream; its logits, f32[R, V] on the device."""
        rows = int(tensors[-1].shape[0])
        size = rows * self._place.vocab_size * 4
        if rows not in self._rows and size + _SPARE > self._memory.cudart.memory()[0]:
            Scratch.may_be_freed()
        try:
            with self._memory.on_stream():
                logits = self._functions[function](*tensors, *self._tail)
        except RuntimeError as e:
            if not is_exhausted(e):
                raise
            Scratch.may_be_freed()
            raise self._memory.exhausted(
                f"the results of {function} ({rows} rows of logits)", size, e
            ) from None
        self._rows.add(rows)
        return logits

    def _start(self, function: str, inputs: StepInputs) -> Any:
        """Give a step to the stream: its logits on the device, rows that nobody asked for behind those asked for."""
        if function == "decode":
            return self._decode.run(inputs)
        # few numbers of rows, because TVM's pool keeps memory for each that it has seen
        wanted = inputs.logit_rows
        padded = aligned_zeros(_padded(len(wanted), self._place.limits.max_step_tokens))
        padded[: len(wanted)], padded[len(wanted) :] = wanted, wanted[-1]
        arrays = replace(inputs, logit_rows=padded).in_order()
        return self._call(function, self._inputs.put(arrays))

    def run(self, function: str, inputs: StepInputs) -> Floats:
        """See llmc.runtime.engine.Engine."""
        with self._memory.turn:
            return self._run(function, inputs)

    def _run(self, function: str, inputs: StepInputs) -> Floats:
        logits = self._start(function, inputs)
        rows, columns = len(inputs.logit_rows), int(logits.shape[1])
        if 4 * rows * columns > _MOST_PINNED:
            out = np.empty(rows * columns, np.float32)
        else:
            out = self._results.array(rows * columns, np.float32)
        self._memory.cudart.copy_out(out, logits.data_ptr(), self._memory.stream)
        self._wait()
        found = out.copy() if out.base is not None else out
        return cast(Floats, found.reshape(rows, columns))

    def sample(self, function: str, inputs: StepInputs, draws: Sequence[Draw]) -> list[int]:
        """See llmc.runtime.engine.SamplingEngine."""
        with self._memory.turn:
            tokens = self._sampler.start(self._start(function, inputs), draws)
            self._wait()
            return self._sampler.finish(tokens)

    def _wait(self) -> None:
        try:
            self._memory.cudart.wait(self._memory.stream)
        except CudaError as e:
            raise LlmcError(
                "device-failed",
                f"The GPU failed while it ran the model: {e}.",
                hint="Start the process anew; if it happens again, report it with the model and the GPU.",
            ) from None

    def memory(self) -> dict[str, int]:
        """See llmc.runtime.engine.Engine."""
        return {
            "weights": self._weight_bytes,
            "weights_resident": self._weight_bytes,
            "kv": self._pool_bytes,
            "kv_resident": self._pool_bytes,
        }


def load_engine(
    manifest: Manifest,
    library: Path,
    image: Path,
    weights: Weights,
    pages: Callable[[int], tuple[int, ...]],
) -> tuple[DeviceEngine, tuple[int, ...]]:
    """An engine on this machine's GPU, and the pages of its pools.

    Args:
        library, image: files of the host's code and of the kernels that fit the GPU.
        pages: from the bytes that are left for the KV cache.
    """
    cuda.load_runtime()
    try:
        kernels = cuda.module_from(image.read_bytes())
        loaded = Library(library, manifest.target.target, kernels)
        engine = DeviceEngine(loaded, Place.of(manifest), weights, manifest, ModelMemory())
    except CudaError as e:
        raise LlmcError(
            "device-failed",
            f"The GPU cannot be used: {e}.",
            hint="Look at nvidia-smi; another process may hold the GPU exclusively.",
        ) from None
    found = pages(engine.room())
    engine.make_pools(found)
    return engine, found


def _padded(rows: int, most: int) -> int:
    """The next power of two, at most `most` or rows."""
    return max(rows, min(most, 1 << (rows - 1).bit_length()))
