"""Models of the device functions that kernels call by name (cuda.func_call): what each does to all threads at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmc.simulate.machine import Machine

# name in the generated source -> its model
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def model(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the model of a device function; it is called with the machine and the evaluated arguments."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS[name] = function
        return function

    return register


@model("llmc_warp_barrier")
def _warp_barrier(m: Machine) -> None:
    m.warp_barrier()
