"""What the cuda target gives the tuner: kernel classes, the runner, the name of the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc import cuda_driver
from llmc.caps import Capabilities

if TYPE_CHECKING:
    from llmc.schedules.tunable import Tunable
    from llmc.targets.runner import Runner


def tunables() -> tuple[Tunable, ...]:
    """The kernel classes whose schedules can be tuned."""
    from llmc.schedules.gpu.tune_attention import TunableGpuDecode, TunableGpuPrefill
    from llmc.schedules.gpu.tune_experts import TunableGpuExperts
    from llmc.schedules.gpu.tune_linear import TunableGpuLinear
    from llmc.schedules.gpu.tune_norm import TunableGpuNorm
    from llmc.schedules.gpu.tune_qlinear import TunableGpuIntLinear, TunableGpuQuantLinear

    linears = (TunableGpuLinear(), TunableGpuQuantLinear(), TunableGpuIntLinear())
    return (*linears, TunableGpuExperts(), TunableGpuNorm(), TunableGpuPrefill(), TunableGpuDecode())


def runner(caps: Capabilities) -> Runner:
    """Runs candidates in this process."""
    from llmc.targets.cuda.runner import CudaRunner

    return CudaRunner(caps)


def device() -> str:
    """The first GPU and its multiprocessors; "" where there is none."""
    devices = cuda_driver.query().devices
    return f"{devices[0].name}, {devices[0].multiprocessors} multiprocessors" if devices else ""
