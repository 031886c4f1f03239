"""A tiny model on a simulated GPU: its step functions through the runtime's own stepping, against torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from llmc.artifact import Limits
from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.kv_plan import is_coded
from llmc.passes.step_module import StepModule
from llmc.runtime.engine import Floats, StepInputs
from llmc.runtime.pages import PageAllocator
from llmc.runtime.sequence import Sequence
from llmc.runtime.stepper import Stepper
from llmc.simulate.step import KernelUse, SimulatedStep
from llmc.spec import CompileSpec
from llmc.targets.backend import get

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


class SimulatedModel:
    """Step functions with weights and pools, fed like a loaded artifact.

    Args:
        step: scheduled for a machine with blocks and threads.
        source: its weights.
        caps: of that machine.
        limits: of the compiled functions.
        races: whether to look for races.
    """

    def __init__(
        self, step: StepModule, source: SourceModel, caps: Capabilities, limits: Limits, *, races: bool = True
    ) -> None:
        from llmc.packing import packed_tensors

        assert source.weights is not None
        self.simulated = SimulatedStep(step, get(caps.preset)[0].tvm_target(caps), races=races)
        self._params = [
            np.ascontiguousarray(data).view(_dtype(p.dtype)).reshape(p.shape)
            for p, data in packed_tensors(step.params, source.weights)
        ]
        plan = step.kv_plan
        pages = tuple(limits.max_batch * -(-limits.max_seq_len // plan.page_size) + 1 for _ in plan.groups)
        self._pools: list[Any] = []
        for group, count in zip(plan.groups, pages, strict=True):
            for shape in group.pool_shapes(count, plan.page_size):
                # an entry that is read before it is written must show; as a scale, these bytes are NaN, too
                unwritten = 0xFF if group.storage_dtype == "uint8" else np.nan
                self._pools.append(np.full(shape, unwritten, _dtype(group.storage_dtype)))
        self._allocator = PageAllocator(plan, pages, limits.max_seq_len)
        self._stepper = Stepper(self, self._allocator, limits, int(step.output.shape[-1]))

    def run(self, function: str, inputs: StepInputs) -> Floats:
        """See llmc.runtime.engine.Engine."""
        found: Floats = self.simulated.run(function, inputs.in_order(), self._pools, self._params)
        return found

    def memory(self) -> dict[str, int]:
        """See llmc.runtime.engine.Engine; nothing is counted."""
        return {}

    def logits(self, batch: Seq[Seq[int]], prefill: int) -> list[Floats]:
        """Logits of every token of some sequences side by side: the first `prefill` ones through step, then decode."""
        sequences = [Sequence(self._allocator) for _ in batch]
        firsts = [min(prefill, len(ids)) for ids in batch]
        head = [(s, ids[:n]) for s, ids, n in zip(sequences, batch, firsts, strict=True)]
        rows = self._stepper.step(head, all_rows=True, function="step")
        out = [[part] for part in np.split(rows, np.cumsum(firsts)[:-1])]
        for at in range(min(firsts), max(len(ids) for ids in batch)):
            going = [i for i, ids in enumerate(batch) if firsts[i] <= at < len(ids)]
            if going:
                tail = [(sequences[i], batch[i][at : at + 1]) for i in going]
                for i, row in zip(going, self._stepper.step(tail), strict=True):
                    out[i].append(row[None])
        return [np.concatenate(parts) for parts in out]


@dataclass(frozen=True)
class SimulationReport:
    """What simulate_model found.

    Attributes:
        error: largest difference of a logit from torch's, in float32.
        largest: largest logit.
        noise: error of the source model itself when it runs in the artifact's type; None for float32.
        kernels: name -> what it did.
    """

    tokens: int
    error: float
    largest: float
    noise: float | None
    kernels: dict[str, KernelUse]


def simulate_model(
    model: Any, spec: CompileSpec, *, tokens: int = 20, decode: int = 3, races: bool = True, seed: int = 0
) -> SimulationReport:
    """Lower a model for a machine with blocks and threads and run a random sequence through the simulator.

    Args:
        tokens: of the sequence; the last `decode` of them go through ``decode`` one by one.

    Raises:
        SimulationError: a kernel misbehaves.
        LlmcError: bad arguments, or a target without blocks and threads.
    """
    from llmc.pipeline import lower_model
    from llmc.reference import reference_logits

    if not get(spec.target)[1].simt:
        raise LlmcError(
            "simulate-target",
            f"The simulator runs kernels that have blocks and threads; {spec.target} has none.",
            hint="Use --target cuda/sm_90.",
        )
    if not 0 <= decode < tokens:
        raise LlmcError(
            "simulate-tokens", f"decode must be 0 or more and less than tokens ({tokens}), found {decode}."
        )
    limits = Limits(tokens, 1, tokens)
    source, step, caps = lower_model(model, spec)
    ids = np.random.default_rng(seed).integers(0, int(step.output.shape[-1]), tokens).tolist()
    simulated = SimulatedModel(step, source, caps, limits, races=races)
    got = simulated.logits([ids], tokens - decode)[0]
    expected = reference_logits(source, ids, "float32").logits
    dtype = spec.dtype.value if spec.dtype else source.dtype
    kv_dtype = spec.kv_dtype.value if spec.kv_dtype else None
    noise = None
    if dtype != "float32" or is_coded(kv_dtype or dtype):
        rounded = reference_logits(source, ids, dtype, kv_dtype=kv_dtype).logits
        noise = float(np.abs(rounded - expected).max())
    return SimulationReport(
        tokens,
        float(np.abs(got - expected).max()),
        float(np.abs(expected).max()),
        noise,
        dict(simulated.simulated.uses),
    )


def _dtype(name: str) -> Any:
    return _DTYPES.get(name) or np.dtype(name)
