"""Kernels of a step against the machine's limits: what each reads and computes, and how much of what is possible.

Source of the model: Williams, Waterman, Patterson, "Roofline" (CACM 52(4), 2009). Times are measured
(llmc/runtime/profile.py), bytes and operations counted by the compiler (llmc/kernel_work.py), limits measured on the
same machine (llmc/limits.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.artifact import Manifest
from llmc.inspect import KernelFigures, kernel_figures
from llmc.kernel_work import Workload
from llmc.limits import MachineLimits
from llmc.quant.schemes import SCHEMES, Code
from llmc.runtime.profile import StepTimes

# words in the class of kernels that multiply matrices
_MATRIX = ("linear", "attention", "expert")


@dataclass(frozen=True)
class KernelRow:
    """A kernel in a step; all figures are of all its calls together.

    Attributes:
        name, kind: of the kernel and of its class.
        calls: per step.
        seconds: spent in it.
        moved: bytes read and written; None = the artifact does not tell.
        operations: arithmetic, a multiplication and an addition count as two; None likewise.
        operands: the type that it multiplies in, as MachineLimits names it; "" = it multiplies no matrices.
        read_share: bytes per second as a share of the measured read bandwidth. Above 1: they come from a cache.
        multiply_share: operations per second as a share of the measured peak of `operands`.
    """

    name: str
    kind: str
    calls: int
    seconds: float
    moved: float | None
    operations: float | None
    operands: str
    read_share: float | None
    multiply_share: float | None

    @property
    def intensity(self) -> float | None:
        """Operations per byte."""
        if not self.moved or self.operations is None:
            return None
        return self.operations / self.moved


@dataclass(frozen=True)
class StepRoofline:
    """A step and its kernels, the slowest first.

    Attributes:
        function: the compiled function.
        sizes: of the step, in words.
        wall: seconds of a step, the choice of the token included.
        kernel_seconds, vm_seconds, python_seconds: in kernels, in the virtual machine between them, in Python.
        vm_calls: calls of the virtual machine that are no kernels.
        overhead: share outside kernels of what kernels, virtual machine and Python take.
        rows: its kernels.
    """

    function: str
    sizes: str
    wall: float
    kernel_seconds: float
    vm_seconds: float
    python_seconds: float
    vm_calls: int
    overhead: float
    rows: tuple[KernelRow, ...]


def step_roofline(
    manifest: Manifest, times: StepTimes, work: Workload, sizes: str, limits: MachineLimits
) -> StepRoofline:
    """Put times, counts and limits together.

    Args:
        manifest: of the artifact that ran.
        times: of its step.
        work: sizes of that step.
        sizes: the same in words.
        limits: of this machine with as many threads.
    """
    function = next(f for f in manifest.functions if f.name == times.function)
    figures = {f.entry.name: f for f in kernel_figures(function, work)}
    rows = [
        _row(name, calls, seconds, figures.get(name), manifest.model.dtype, limits)
        for name, (calls, seconds) in times.kernels.items()
    ]
    return StepRoofline(
        times.function,
        sizes,
        times.wall,
        times.kernel_seconds,
        times.vm_seconds,
        times.python_seconds,
        times.vm_calls,
        times.overhead,
        tuple(sorted(rows, key=lambda row: -row.seconds)),
    )


def _row(
    name: str, calls: int, seconds: float, figures: KernelFigures | None, dtype: str, limits: MachineLimits
) -> KernelRow:
    if figures is None:
        return KernelRow(name, "", calls, seconds, None, None, "", None, None)
    kind = figures.entry.kind
    moved, operations = figures.moved_at * calls, figures.operations_at * calls
    operands = multiplies_in(kind, dtype, limits)
    peak = limits.multiply.get(operands)
    per_second = 1 / seconds if seconds else 0.0
    return KernelRow(
        name,
        kind,
        calls,
        seconds,
        moved,
        operations,
        operands,
        moved * per_second / limits.read,
        operations * per_second / peak if peak else None,
    )


def multiplies_in(kind: str, dtype: str, limits: MachineLimits) -> str:
    """The operand type whose peak a kernel of this class is held against; "" for one that multiplies no matrices.

    int8 where activations are integers, the model's 16-bit type where the machine multiplies it, else float32.
    """
    if not any(word in kind for word in _MATRIX):
        return ""
    scheme = SCHEMES.get(kind.rpartition(" ")[2])
    if scheme is not None and scheme.activations is Code.INT and "int8" in limits.multiply:
        return "int8"
    if dtype == "bfloat16" and "bf16" in limits.multiply:
        return "bf16"
    return "f32"


def best_share(row: KernelRow) -> tuple[float, str] | None:
    """How near a kernel is to the limit that binds it, and which that is; None = unknown."""
    if row.read_share is None:
        return None
    if row.multiply_share is None or row.read_share >= row.multiply_share:
        return row.read_share, "bandwidth"
    return row.multiply_share, f"{row.operands} peak"


def totals(step: StepRoofline, limits: MachineLimits) -> dict[str, Any]:
    """Bytes and operations of all kernels whose counts are known, and the bandwidth over the whole step."""
    moved = sum(row.moved or 0.0 for row in step.rows)
    operations = sum(row.operations or 0.0 for row in step.rows)
    return {
        "moved": moved,
        "operations": operations,
        "read_share": moved / step.wall / limits.read if step.wall else 0.0,
        "unknown": [row.name for row in step.rows if row.moved is None],
    }
