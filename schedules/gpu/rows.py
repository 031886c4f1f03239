"""Which rows of x a block of threads works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules import emit as e


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows, or neighbours in an order.

    Attributes:
        first, end: numbers of the first row and behind the last one.
        order: int32; row i of them is row order[i] of x. None = row i.
    """

    first: Any
    end: Any
    order: Any = None

    def inside(self, i: Any) -> Any:
        """Whether there is an i-th row."""
        return self.first + i < self.end

    def at(self, i: Any) -> Any:
        """Number of the i-th row; a row past the last one is the last one."""
        number = e.let(T.min(self.first + i, self.end - 1))
        return number if self.order is None else e.let(e.i64(self.order[number]))


class Shifted:
    """A vector among those of several experts.

    Args:
        buffer: of all, flat.
        first: element at which this one begins.
    """

    def __init__(self, buffer: Any, first: Any) -> None:
        self._buffer, self._first = buffer, first

    def __getitem__(self, index: Any) -> Any:
        return self._buffer[self._first + index]
