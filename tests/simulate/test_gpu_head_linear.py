"""Products per head for machines with threads: numbers and races in the simulator."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmc.schedules.gpu.head_linear import head_linear
from tests.schedules.test_head_linear import BASE, CASES, error
from tests.simulate.gpu import SimulatedTools, gpu

TOOLS = SimulatedTools()
# one token: threads; a few and many: matrix units where the machine has them
EACH = [
    ("rotated", "sm_90", (1, 5)),
    ("rotated-bf16", "sm_80", (1, 3, 70)),
    ("rotated-bf16", "sm_75", (3,)),
    ("odd-bf16", "sm_90", (1, 5)),
]


@pytest.mark.parametrize(("case", "preset", "tokens"), EACH)
def test_against_numpy(case: str, preset: str, tokens: tuple[int, ...]) -> None:
    cfg, caps = CASES[case], gpu(preset)
    kernel = TOOLS.build(caps, k=head_linear(cfg, caps))["k"]
    for count in tokens:
        assert error(cfg, caps, TOOLS, kernel, count) < TOOLS.exact[cfg.dtype], count


def test_another_layout_is_refused() -> None:
    from llmc.schedules.layout import BlockedLayout

    with pytest.raises(ValueError, match="this kernel reads"):
        head_linear(replace(BASE, layout=BlockedLayout(64, 1)), gpu())
