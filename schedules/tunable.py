"""What the tuner needs to know of a kernel class: its space of schedules, how to build, feed and check it.

A kernel class that can be tuned exports a Tunable (STYLE 11-13); a target's manifest lists those that it uses. Nothing here
knows how candidates are searched, built or timed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np

from llmc.caps import Capabilities
from llmc.schedules.choice import ByRows
from llmc.schedules.tune_data import Array


@dataclass(frozen=True)
class Bucket:
    """Numbers of rows that share a schedule: low <= rows <= high (0 = no upper bound)."""

    low: int
    high: int

    def rows(self, bound: int) -> int:
        """The number of rows that stands for the bucket where `bound` rows are the most."""
        return max(self.low, min(self.high or 2 * (self.low - 1), bound))

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        return f"{self.low}-{self.high}" if self.high else f"{self.low}+"


BUCKETS = tuple(
    Bucket(low, high) for low, high in ((1, 1), (2, 4), (5, 8), (9, 16), (17, 64), (65, 512), (513, 0))
)


def bucket_of(rows: int) -> Bucket:
    """The bucket that a number of rows is in."""
    return next(b for b in BUCKETS if b.low <= rows and (not b.high or rows <= b.high))


@dataclass(frozen=True)
class Knob:
    """A field of a schedule and the values that it may take, in an order in which neighbours behave alike."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """A finite, ordered space of schedules: the product of the knobs where `valid` holds.

    Attributes:
        default: the untuned schedule; always a member. Fields without a knob keep its values.
        other: a space of schedules of another kind, with knobs of its own; its members are members too.
    """

    default: Any
    knobs: tuple[Knob, ...]
    valid: Callable[[Any], bool] = lambda _: True
    other: Space | None = None

    def __iter__(self) -> Iterator[Any]:
        yield from self._own()
        yield from self.other or ()

    def _own(self) -> Iterator[Any]:
        names = [knob.name for knob in self.knobs]
        for values in itertools.product(*(knob.values for knob in self.knobs)):
            schedule = replace(self.default, **dict(zip(names, values, strict=True)))
            if schedule == self.default or self.valid(schedule):
                yield schedule

    def __contains__(self, schedule: Any) -> bool:
        return self._is_own(schedule) or (self.other is not None and schedule in self.other)

    def _is_own(self, schedule: Any) -> bool:
        knobs = {knob.name: knob.values for knob in self.knobs}
        for own in fields(self.default):
            value = getattr(schedule, own.name)
            if value not in knobs.get(own.name, (getattr(self.default, own.name),)):
                return False
        return bool(schedule == self.default or self.valid(schedule))

    def representatives(self) -> Iterator[Any]:
        """The default, and for each knob a member that differs from it in that knob (the default if there is none)."""
        yield self.default
        for knob in self.knobs:
            yield _differing(self, knob)

    def random(self, rng: np.random.Generator) -> Any:
        """A member, each about equally likely; of either kind."""
        if self.other is not None and rng.random() < 0.5:
            return self.other.random(rng)
        for _ in range(200):
            values = {knob.name: knob.values[rng.integers(len(knob.values))] for knob in self.knobs}
            schedule = replace(self.default, **values)
            if self.valid(schedule):
                return schedule
        return self.default

    def mutate(self, schedule: Any, rng: np.random.Generator) -> Any:
        """A member that differs in one knob, mostly by one step; the schedule itself if none is found."""
        if self.other is not None and schedule in self.other:
            return self.other.mutate(schedule, rng)
        movable = [knob for knob in self.knobs if len(knob.values) > 1]
        for _ in range(50 if movable else 0):
            knob = movable[rng.integers(len(movable))]
            now = getattr(schedule, knob.name)
            at = knob.values.index(now) if now in knob.values else 0
            step = int(rng.choice([-1, 1])) if rng.random() < 0.7 else int(rng.integers(1, len(knob.values)))
            made = replace(schedule, **{knob.name: knob.values[(at + step) % len(knob.values)]})
            if made != schedule and self.valid(made):
                return made
        return schedule

    def cross(self, a: Any, b: Any, rng: np.random.Generator) -> Any:
        """A member whose knobs come from either parent; `a` if none is found, or if they are of two kinds."""
        if self.other is not None and a in self.other:
            return self.other.cross(a, b, rng) if b in self.other else a
        if not self._is_own(b):
            return a
        for _ in range(20):
            values = {k.name: getattr(a if rng.random() < 0.5 else b, k.name) for k in self.knobs}
            made = replace(a, **values)
            if self.valid(made):
                return made
        return a

    def nearest(self, values: Mapping[str, int]) -> Any:
        """The member closest to values from another space (for seeds from similar shapes), or the default."""
        made = self.default
        for knob in self.knobs:
            if knob.name in values:
                close = min(knob.values, key=lambda v: abs(int(v) - int(values[knob.name])))
                made = replace(made, **{knob.name: close})
        made = made if self.valid(made) else self.default
        if self.other is None:
            return made
        differences = lambda s: sum(int(getattr(s, n)) != int(v) for n, v in values.items() if hasattr(s, n))  # noqa: E731
        return min(made, self.other.nearest(values), key=differences)


@dataclass(frozen=True)
class Work:
    """What a call cannot avoid: bytes of memory traffic, operations, and the dtype whose peak bounds them."""

    bytes: float
    operations: float
    dtype: str


@dataclass(frozen=True)
class Arguments:
    """A kernel's arguments in order: arrays (outputs filled with NaN) and integers.

    Attributes:
        cold: indices of arrays that a model reads from memory, not from a cache (weights, pages); the tuner cycles
            over copies of them.
        out: index of the result that is checked.
        others: index -> further arrays for this argument, which calls after the checked one take in turn.
    """

    values: tuple[Any, ...]
    cold: tuple[int, ...]
    out: int
    others: Mapping[int, tuple[Array, ...]] = field(default_factory=dict)


class Tunable(ABC):
    """A kernel class that can be tuned. A task is the kernel's own config without schedule and layout.

    Attributes:
        name: of the class in records.
        version: raised where the same schedule means other code in a way that code_of does not see.
        config_type, schedule_type: dataclasses of the kernel and of its schedule.
        shared: fields of the schedule in which all buckets of a task agree (layout of the weight, size of a scratch).
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    config_type: ClassVar[type]
    schedule_type: ClassVar[type]
    shared: ClassVar[tuple[str, ...]] = ()

    def takes(self, config: Any) -> bool:
        """Whether a config is of this kernel class; for classes that share one type of config."""
        return type(config) is self.config_type

    def samples(self, caps: Capabilities) -> tuple[Any, ...]:
        """Small tasks whose code stands for that of all tasks; see code_of."""
        return ()

    @abstractmethod
    def task(self, config: Any) -> Any:
        """The task of a kernel: fields that do not matter for speed are set to one value."""

    def to_values(self, task: Any) -> dict[str, Any]:
        """A task as JSON values; fields at their defaults are left out, so that later fields do not change the key."""
        plain = {f.name: f.default for f in fields(task) if f.default is not MISSING}
        held = task.to_json()
        return {k: v for k, v in held.items() if k not in plain or getattr(task, k) != plain[k]}

    def from_values(self, values: Mapping[str, Any]) -> Any:
        """Inverse of to_values.

        Raises:
            ValueError: not such a task.
        """
        try:
            return self.task(self.config_type(**self.parsed(dict(values))))
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{dict(values)} is no task of {self.name}: {e}") from None

    def parsed(self, values: dict[str, Any]) -> dict[str, Any]:
        """The config's fields from JSON values; for configs that hold more than numbers and texts."""
        return values

    @abstractmethod
    def buckets(self, task: Any) -> tuple[Bucket, ...]:
        """Buckets in which the choice of the schedule matters."""

    def sampled_buckets(self, task: Any) -> tuple[Bucket, ...]:
        """Buckets whose spaces together have all kinds of schedules, for code_of."""
        return self.buckets(task)[-1:]

    @abstractmethod
    def space(self, task: Any, bucket: Bucket, caps: Capabilities) -> Space:
        """Schedules to choose among; all are correct for every number of rows in the bucket."""

    def default(self, task: Any, caps: Capabilities) -> Any:
        """The untuned schedule, correct for every task and any number of rows."""
        return self.schedule_type()

    @abstractmethod
    def scheduled(self, config: Any, schedule: ByRows[Any]) -> Any:
        """The config with schedules."""

    @abstractmethod
    def schedules_of(self, config: Any) -> ByRows[Any]:
        """The schedules of a config."""

    @abstractmethod
    def build(self, config: Any, caps: Capabilities) -> Any:
        """The PrimFunc of a config with schedules."""

    def candidate(self, task: Any, schedule: Any, bucket: Bucket | None, caps: Capabilities) -> Any:
        """The PrimFunc of one schedule; with a bucket, only for its rows: less code, and the same in its loops."""
        limits = (bucket.high,) if bucket is not None and bucket.high else ()
        return self.build(self.scheduled(task, ByRows((schedule,), limits)), caps)

    def weights(self, task: Any, rng: np.random.Generator) -> dict[str, Array]:
        """Random weights by name, before any layout: what all numbers of rows share; {} = there are none."""
        return {}

    @abstractmethod
    def inputs(self, task: Any, rows: int, rng: np.random.Generator) -> dict[str, Array]:
        """The other random inputs by name; the same for all schedules."""

    def case(self, task: Any, rows: int, rng: np.random.Generator) -> dict[str, Array]:
        """weights and inputs."""
        return {**self.weights(task, rng), **self.inputs(task, rows, rng)}

    def pack(self, task: Any, schedule: Any, weights: dict[str, Array], caps: Capabilities) -> Array:
        """The weights in the layout of `schedule`, which its shared fields decide."""
        raise NotImplementedError(f"{self.name} has no weights")

    @abstractmethod
    def arguments(
        self,
        task: Any,
        schedule: Any,
        case: dict[str, Array],
        caps: Capabilities,
        packed: Array | None = None,
    ) -> Arguments:
        """The inputs as the kernel of `schedule` takes them; `packed` = what `pack` gave, where that is at hand."""

    @abstractmethod
    def reference(self, task: Any, case: dict[str, Array]) -> Array:
        """float32 result in numpy, in the shape of the kernel's."""

    def tolerance(self, task: Any) -> float:
        """Largest error allowed, as a share of the reference's magnitude (its own plus the root mean square)."""
        return {"float32": 2e-5, "float16": 4e-3, "bfloat16": 1.6e-2}[str(task.out_dtype)]

    @abstractmethod
    def work(self, task: Any, rows: int) -> Work:
        """Unavoidable memory traffic and operations of a call with so many rows."""

    @abstractmethod
    def terms(self, task: Any, schedule: Any, rows: int, caps: Capabilities) -> dict[str, float]:
        """What a schedule amounts to, for the cost model: tasks, cache footprints, registers."""


def code_of(tunable: Tunable, caps: Capabilities) -> str:
    """What the kernel class generates, in 16 hexadecimal digits: measurements of other code do not count.

    It stands for the TIR of the sample tasks with the default schedule and, since a template's other paths matter as well,
    of the first two of them with one schedule per knob that differs in that knob. Comments, names and the machine's number
    of threads leave it as it is; a change of loops, of a default or of a knob does not. "" for a class without samples,
    which has only its version.
    """
    return _code_of(type(tunable), replace(caps, threads=2))


_VARIED = 2  # sample tasks whose schedules are varied


@functools.cache
def _code_of(kind: type[Tunable], caps: Capabilities) -> str:
    import tvm_ffi

    tunable, hashes = kind(), []
    for number, task in enumerate(tunable.samples(caps)):
        for bucket in tunable.sampled_buckets(task):
            space = tunable.space(task, bucket, caps)
            for schedule in space.representatives() if number < _VARIED else [space.default]:
                func = tunable.candidate(task, schedule, None, caps)
                hashes.append(tvm_ffi.structural_hash(func, map_free_vars=True))
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16] if hashes else ""


def _differing(space: Space, knob: Knob) -> Any:
    """A member that differs from the default in one knob; the default if there is none."""
    for value in knob.values:
        made = replace(space.default, **{knob.name: value})
        if made != space.default and space.valid(made):
            return made
    return space.default


def key_of(values: Mapping[str, Any]) -> str:
    """A text that is equal for equal values."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def balance(tasks: float, threads: int) -> float:
    """How much longer the busiest thread works than the average one, with equal tasks."""
    per_thread = -(-tasks // threads)
    return per_thread * threads / tasks
