"""Kernels for blocks and threads, tuned with the simulator as the device and a formula as the clock.

``python -m tests.tune.simulated build|measure TARGET SOCKET`` is llmc.tune.serve for it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from llmc.caps import Capabilities
from llmc.schedules.gpu.tune_linear import TunableGpuLinear
from llmc.schedules.linear import LinearConfig
from llmc.schedules.tunable import Arguments
from llmc.simulate import Kernel
from llmc.simulate.expressions import visit
from llmc.targets import simt
from llmc.targets.backend import get
from llmc.targets.cuda.backend import tvm_target
from llmc.targets.runner import Limits, Runner
from llmc.tune import serve

TARGET = "cuda/sm_90"
DEVICE = "simulator"
CONFIG = LinearConfig(40, 64, "bfloat16", "bfloat16", "bfloat16", has_residual=True)


class SimulatedRunner(Runner):
    """Results from the simulator; a call takes a microsecond per statement of the kernel that is no loop."""

    errors_stay = True

    def __init__(self, caps: Capabilities) -> None:
        self.caps = caps

    def limits(self) -> Limits:
        return Limits(1e9, {"float32": 1e12, "bfloat16": 1e13})

    def load(self, path: Path) -> Any:
        lowered = tvm.ir.load_json(path.read_text())
        return Kernel(lowered), statements(lowered)

    def copies(self, array: np.ndarray[Any, Any]) -> Sequence[Any]:
        return [array]

    def place(
        self, arguments: Arguments, cold: Mapping[int, Sequence[Any]] | None = None
    ) -> Sequence[Sequence[Any]]:
        made = {i: v[0] for i, v in (cold or {}).items()}
        return [[made.get(i, v if isinstance(v, int) else v.copy()) for i, v in enumerate(arguments.values)]]

    def result(self, arguments: Arguments, placed: Sequence[Any]) -> np.ndarray[Any, Any]:
        found = placed[arguments.out].copy()
        placed[arguments.out][:] = arguments.values[arguments.out]
        return found

    def seconds(self, kernel: Any, placed: Sequence[Any]) -> float:
        simulated, count = kernel
        if count:  # once is enough for the numbers
            simulated.run(list(placed))
        return count * 1e-6


def statements(func: Any) -> int:
    """How many stores and calls the kernel is made of."""
    found = 0

    def note(node: Any) -> None:
        nonlocal found
        found += isinstance(node, (tirx.BufferStore, tirx.Evaluate))

    visit(func.body, note)
    return found


def write_tir(func: Any, target: Any, caps: Capabilities, path: Path) -> None:
    """In place of machine code: what the source is generated from."""
    named = func.with_attr("global_symbol", "k")
    path.write_text(tvm.ir.save_json(simt.lower(tvm.IRModule({"k": named}), tvm_target(caps))["k"]))


def command(kind: str) -> list[str]:
    """Of a worker."""
    return [sys.executable, "-m", "tests.tune.simulated", kind, TARGET]


def main(arguments: Sequence[str]) -> None:
    backend, caps = get(TARGET)
    odd = replace(
        backend,
        tunables=lambda: (TunableGpuLinear(),),
        runner=SimulatedRunner,
        library=write_tir,
        unfit=lambda path: "it is too large" if path.stat().st_size > 2_000_000 else "",
    )
    serve.get = lambda target: (odd, caps)  # type: ignore[attr-defined]
    serve.main(list(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
