"""How the tuner runs candidates on a target: load, place arguments, time, and the two limits of the machine."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llmc.schedules.tunable import Arguments, Work
from llmc.schedules.tune_data import Array


@dataclass(frozen=True)
class Limits:
    """What a machine reaches at best with a given number of threads, measured.

    Attributes:
        read: bytes per second read from memory.
        peak: dtype -> operations per second on registers (a multiply-add is two).
    """

    read: float
    peak: Mapping[str, float]

    def least_seconds(self, work: Work) -> float:
        """No kernel for this work is faster: the time of its memory traffic or of its operations."""
        return max(work.bytes / self.read, work.operations / self.peak[work.dtype])


class Runner(ABC):
    """Runs kernels in the process that it is made in. Nothing here survives a candidate that crashes.

    Attributes:
        errors_stay: after an error of a kernel all later ones of the process fail: it has to be replaced.
    """

    errors_stay: ClassVar[bool] = False

    @abstractmethod
    def limits(self) -> Limits:
        """Measure the machine's limits."""

    @abstractmethod
    def load(self, path: Path) -> Any:
        """The kernel of a library that a build worker wrote."""

    @abstractmethod
    def copies(self, array: np.ndarray[Any, Any]) -> Sequence[Any]:
        """A cold array where kernels read it, so often that reading all copies in turn misses every cache."""

    @abstractmethod
    def place(
        self, arguments: Arguments, cold: Mapping[int, Sequence[Any]] | None = None
    ) -> Sequence[Sequence[Any]]:
        """Argument lists that differ in their copies of the cold arrays.

        Args:
            cold: index of a cold array -> its copies, where they are made already; its value does not count then.
        """

    @abstractmethod
    def result(self, arguments: Arguments, placed: Sequence[Any]) -> np.ndarray[Any, Any]:
        """The checked output of one argument list, as numpy; cleared to NaN for the next call."""

    @abstractmethod
    def seconds(self, kernel: Any, placed: Sequence[Any]) -> float:
        """Wall time of one call."""


def argument_lists(
    arguments: Arguments, cold: Mapping[int, Sequence[Any]], tensor: Callable[[Array], Any]
) -> list[list[Any]]:
    """What Runner.place gives: lists that go through all copies of the cold arrays and all that takes turns with a value.

    Args:
        cold: index of each cold array -> its copies.
        tensor: makes an argument of an array.
    """
    held: list[Sequence[Any]] = []
    for i, value in enumerate(arguments.values):
        if i in cold:
            held.append(cold[i])
        elif isinstance(value, int):
            held.append([value])
        else:
            held.append([tensor(array) for array in (value, *arguments.others.get(i, ()))])
    count = math.lcm(*(len(values) for values in held))
    return [[values[n % len(values)] for values in held] for n in range(count)]
