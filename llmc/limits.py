"""What this machine can do at most: bytes read and multiplications per second, measured with compiled kernels.

The kernels are made for the machine at hand, in memory: no C++ driver is needed, but TVM's compiler is imported. To
keep it out of a process that runs a model, `measured_limits` measures in one of its own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from llmc.errors import LlmcError


@dataclass(frozen=True)
class MachineLimits:
    """Limits that were measured, all of `threads` threads together.

    Attributes:
        threads: that ran.
        read: bytes per second from memory.
        multiply: operand type (f32, bf16, int8) -> multiplications plus additions per second, of registers.
    """

    threads: int
    read: float
    multiply: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> MachineLimits:
        return MachineLimits(**values)


def measured_limits(threads: int) -> MachineLimits:
    """Measure in a process of its own; takes a few seconds.

    Raises:
        LlmcError: it failed, with the last line of what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "llmc.limits", str(threads)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise LlmcError(
            "limits-failed",
            f"The machine's limits could not be measured: {said[-1] if said else f'code {done.returncode}'}.",
            hint="Without --roofline no limits are needed.",
            context={"output": done.stderr},
        )
    return MachineLimits.from_json(json.loads(done.stdout.strip().splitlines()[-1]))


def measure(threads: int) -> MachineLimits:
    """Measure in this process, whose thread pool gets `threads` threads."""
    from llmc.runtime.library import use_threads

    use_threads(threads)
    from llmc.targets.cpu import limits
    from llmc.targets.cpu.backend import BACKEND

    caps = dataclasses.replace(BACKEND.capabilities(""), threads=threads)
    return MachineLimits(threads, *limits.measure(caps, BACKEND.tvm_target(caps)))


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1])).to_json()))
