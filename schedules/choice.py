"""Which schedule runs for how many rows: a few choices and the thresholds between them (DESIGN 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from tvm.tirx.script import builder as T

from llmc.schedules import emit as e

S = TypeVar("S")


@dataclass(frozen=True)
class ByRows(Generic[S]):
    """A schedule for every number of rows.

    Attributes:
        choices: schedules, for few rows first; frozen dataclasses of ints and bools.
        limits: ascending; choices[i] runs for at most limits[i] rows, the last choice for all above. A limit for the
            last choice too makes a kernel that refuses more rows: less code, for trying a choice out.

    Raises:
        ValueError: neither as many limits as choices nor one less, or limits that do not ascend.
    """

    choices: tuple[S, ...]
    limits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.choices) - len(self.limits) not in (0, 1) or not self.choices:
            raise ValueError(f"{len(self.choices)} choices do not go with the limits {self.limits}")
        if list(self.limits) != sorted({*self.limits}) or (self.limits and self.limits[0] < 1):
            raise ValueError(f"limits must be positive and ascend, found {self.limits}")

    @staticmethod
    def of(pairs: list[tuple[int, S]]) -> ByRows[S]:
        """From (most rows, schedule) in ascending order; the last one also serves all rows above.

        Neighbours that agree become one choice.
        """
        limits: list[int] = []
        choices: list[S] = []
        for most, choice in pairs:
            if choices and choices[-1] == choice:
                limits[-1] = most
                continue
            limits.append(most)
            choices.append(choice)
        return ByRows(tuple(choices), tuple(limits[:-1]))

    def at(self, rows: int) -> S:
        """The schedule for `rows` rows."""
        return self.choices[sum(rows > limit for limit in self.limits)]

    def to_json(self) -> dict[str, Any]:
        return {"limits": list(self.limits), "choices": [asdict(c) for c in self.choices]}  # type: ignore[call-overload]

    @staticmethod
    def from_json(kind: type[S], values: dict[str, Any]) -> ByRows[S]:
        """Inverse of to_json for schedules of type `kind`."""
        return ByRows(tuple(kind(**c) for c in values["choices"]), tuple(values["limits"]))

    def emit(self, rows: Any, body: Callable[[S, int], None]) -> None:
        """Emit the choice between the schedules; `body` gets each with the most rows that it must serve (0 = any)."""

        if len(self.limits) == len(self.choices):
            with T.Assert(rows <= e.i64(self.limits[-1]), "this kernel is for fewer rows"):
                pass

        def rest(i: int) -> None:
            if i == len(self.limits):
                body(self.choices[i], 0)
                return
            if i == len(self.choices) - 1:
                body(self.choices[i], self.limits[i])
                return
            with T.If(rows <= e.i64(self.limits[i])):
                with T.Then():
                    body(self.choices[i], self.limits[i])
                with T.Else():
                    rest(i + 1)

        rest(0)


class Scheduled(NamedTuple):
    """A kernel with schedules by rows.

    Attributes:
        config: of the kernel; its own schedule fields do not count.
        schedule: what counts.
    """

    config: Any
    schedule: ByRows[Any]

    def to_json(self) -> dict[str, Any]:
        return {**self.config.to_json(), "schedule": self.schedule.to_json()}


@dataclass(frozen=True)
class Segment(Generic[S]):
    """Numbers of rows from `least` up to `most` (0 = all above) that take a schedule, on tile registers or not."""

    least: int
    most: int
    choice: S
    tiled: bool


def segments(schedule: ByRows[S], tiles_from: Callable[[S], int]) -> list[Segment[S]]:
    """A schedule cut where choices go over to tile registers.

    tiles_from: the least number of rows for which a choice takes tiles; 0 = never.
    """
    out: list[Segment[S]] = []
    low = 1
    for i, choice in enumerate(schedule.choices):
        high = schedule.limits[i] if i < len(schedule.limits) else 0
        start = tiles_from(choice)
        if start > low and (not high or start <= high):
            out.append(Segment(low, start - 1, choice, False))
            low = start
        out.append(Segment(low, high, choice, 0 < start <= low))
        low = high + 1
    return out
