"""A simulator of GPU kernels: lowered TIR in lockstep over numpy, with races, bounds and barriers checked."""

from llmc.simulate.errors import SimulationError
from llmc.simulate.kernel import Kernel, simulate

__all__ = ["Kernel", "SimulationError", "simulate"]
