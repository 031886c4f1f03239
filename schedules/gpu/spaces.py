"""A space of schedules of several kinds, and the kinds' limits on a machine with threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.schedules.tunable import Space

MOST_THREADS = 1024  # of a block
REGISTERS = 65536  # of a multiprocessor
SPARE_REGISTERS = 40  # of a thread beside its sums: addresses, loads under way


@dataclass(frozen=True)
class OneOf(Space):
    """The default, and the members of several spaces whose schedules are of one type.

    Attributes:
        parts: spaces without a member in common.
    """

    parts: tuple[Space, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        yield self.default
        for part in self.parts:
            yield from part

    def __contains__(self, schedule: Any) -> bool:
        return schedule == self.default or any(schedule in part for part in self.parts)

    def random(self, rng: np.random.Generator) -> Any:
        """A member; the kinds are equally likely."""
        return self.parts[int(rng.integers(len(self.parts)))].random(rng) if self.parts else self.default

    def mutate(self, schedule: Any, rng: np.random.Generator) -> Any:
        """A neighbour of the same kind; of the default, or now and then, any member."""
        part = self._part_of(schedule)
        return self.random(rng) if part is None or rng.random() < 0.1 else part.mutate(schedule, rng)

    def cross(self, a: Any, b: Any, rng: np.random.Generator) -> Any:
        part = self._part_of(a)
        return a if part is None or b not in part else part.cross(a, b, rng)

    def nearest(self, values: Mapping[str, int]) -> Any:
        """The member that differs in the fewest fields."""

        def unlike(schedule: Any) -> int:
            return sum(
                int(getattr(schedule, name)) != int(value)
                for name, value in values.items()
                if hasattr(schedule, name)
            )

        return min((self.default, *(part.nearest(values) for part in self.parts)), key=unlike)

    def representatives(self) -> Iterator[Any]:
        yield self.default
        for part in self.parts:
            yield from part.representatives()

    def _part_of(self, schedule: Any) -> Space | None:
        return next((part for part in self.parts if schedule in part), None)


def fits_registers(sums: int, threads: int) -> bool:
    """Whether threads with so many float32 sums each have registers for them, and a block is not too large."""
    each = sums + SPARE_REGISTERS
    return each <= 255 and threads <= MOST_THREADS and each * threads <= REGISTERS
