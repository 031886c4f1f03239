"""The memory of a compile does not grow with the number of layers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.compile_memory import compile_peak, write_llama


@pytest.mark.slow(reason="four compiles")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quant", ["none", "q4g32"])
def test_memory_does_not_grow_with_the_layers(quant: str, tmp_path: Path) -> None:
    """Ten more layers of 46 MB each in float32: weights are streamed when packed, and when the reference runs.

    Resident memory also counts the artifact's mapped weights, 23 MB per layer in bfloat16.
    """
    resident = []
    for layers in (4, 14):
        write_llama(tmp_path / f"m{layers}", layers, 1024)
        resident.append(
            compile_peak(tmp_path / f"m{layers}", tmp_path / f"out{layers}", "--quant", quant).resident
        )
    assert resident[1] - resident[0] < 250
    assert resident[1] < 1400
