"""The choice that follows from tuning records: which schedule a kernel gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmc.caps import Capabilities
from llmc.schedules.choice import ByRows
from llmc.schedules.records import Record, Status, read_records, task_key
from llmc.schedules.tunable import BUCKETS, Bucket, Tunable, code_of

_WORTH = (
    0.02  # a schedule of its own must save a bucket this share of its time; else it takes its neighbour's
)
SHIPPED = Path(__file__).resolve().parent / "tuned"  # records that come with llmc, one file per machine


@dataclass(frozen=True)
class Choice:
    """What the records say about a task.

    Attributes:
        schedule: for every number of rows.
        records: that it rests on.
    """

    schedule: ByRows[Any]
    records: tuple[Record, ...]


class Tuned:
    """Tuning records for one machine and one version of TVM: the schedules that passes choose for kernels.

    Args:
        sources: records in order, e.g. of files; where two sources know a task, the later one decides.
        caps, tvm: what code is generated for and by; records for another preset or version do not count, nor do those
            of a kernel class that generates other code by now.
        device: records of this device are preferred; without any, those of the device that was recorded last.
        tunables: of the target.

    Attributes:
        used: records that choices were made from, in order of first use.
        dropped: kernel class -> how many records were left out because its code or its space has changed.
    """

    def __init__(
        self,
        sources: Sequence[Iterable[Record]] = (),
        caps: Capabilities | None = None,
        tvm: str = "",
        device: str = "",
        tunables: Sequence[Tunable] = (),
    ) -> None:
        self.tunables = tuple(tunables)
        self.used: dict[str, Record] = {}
        self.dropped: Counter[str] = Counter()
        self._caps, self._preset = caps, caps.preset if caps is not None else ""
        self._by_task: dict[str, list[Record]] = {}
        for source in sources:
            found: dict[str, dict[str, list[Record]]] = {}
            for record in source:
                if record.preset != self._preset or record.tvm != tvm or record.status is not Status.OK:
                    continue
                if self._is_of_another_kernel(record):
                    self.dropped[record.rule] += 1
                    continue
                found.setdefault(record.task_key, {}).setdefault(record.device, []).append(record)
            for key, devices in found.items():
                self._by_task[key] = devices.get(device) or list(devices.values())[-1]

    def _is_of_another_kernel(self, record: Record) -> bool:
        tunable = next((t for t in self.tunables if t.name == record.rule), None)
        return tunable is None or self._caps is None or not is_current(record, tunable, self._caps)

    def tunable_of(self, config: Any, name: str = "") -> Tunable | None:
        """The kernel class of a config; `name` decides where one config has several kernels."""
        for tunable in self.tunables:
            if tunable.takes(config) and name in ("", tunable.name):
                return tunable
        return None

    def apply(self, config: Any, name: str = "", shared: Mapping[str, int] | None = None) -> Any:
        """The config with tuned schedules where something is known that beats the default.

        Args:
            name: of the Tunable, where a config has several.
            shared: values of shared fields that are decided already (the weight is packed for another kernel).
        """
        tunable = self.tunable_of(config, name)
        if tunable is None or self._caps is None:
            return config
        task = tunable.task(config)
        code = code_of(tunable, self._caps) if self._by_task else ""
        key = task_key(tunable.name, tunable.version, code, tunable.to_values(task), self._preset)
        choice = choose(tunable, task, self._by_task.get(key, []), self._caps, shared)
        if choice is None:
            return config
        for record in choice.records:
            self.used.setdefault(record.identity, record)
        return tunable.scheduled(config, choice.schedule)

    def shared(self, config: Any) -> dict[str, int]:
        """What a config's schedules agree in."""
        tunable = self.tunable_of(config)
        if tunable is None:
            return {}
        first = tunable.schedules_of(config).choices[0]
        return {name: int(getattr(first, name)) for name in tunable.shared}


def is_current(record: Record, tunable: Tunable, caps: Capabilities) -> bool:
    """Whether a record is of the kernel class as it is now, its schedule still in the space."""
    if (record.version, record.code) != (tunable.version, code_of(tunable, caps)):
        return False
    try:
        task, schedule = tunable.from_values(record.task), tunable.schedule_type(**record.schedule)
    except (ValueError, TypeError):
        return False
    return record.bucket in tunable.buckets(task) and schedule in tunable.space(task, record.bucket, caps)


def shipped_records() -> list[Record]:
    """The records that come with llmc."""
    return [record for path in sorted(SHIPPED.glob("*.jsonl")) for record in read_records(path)]


def choose(
    tunable: Tunable,
    task: Any,
    records: Iterable[Record],
    caps: Capabilities,
    shared: Mapping[str, int] | None = None,
) -> Choice | None:
    """The best schedule of each bucket that agree in the shared fields; None if the default is as good.

    The shared fields take the values with the least time over all buckets, each weighted by its share of the step.
    Values that some bucket was not measured with do not compete, but for the default's, whose time is known. A threshold
    between two buckets is there only where it was measured to pay: a bucket takes the schedule of the bucket below, or
    the default, if that is as fast within measuring error.
    """
    groups: dict[tuple[int, ...], dict[Bucket, Record]] = {}
    measured: dict[tuple[Bucket, Any], Record] = {}
    shares: dict[Bucket, float] = {}
    for record in records:
        if record.bucket not in BUCKETS or record.status is not Status.OK or record.ratio <= 0:
            continue
        group = groups.setdefault(tuple(record.schedule.get(n, 0) for n in tunable.shared), {})
        shares[record.bucket] = max(shares.get(record.bucket, 0.0), record.share)
        best = group.get(record.bucket)
        if best is None or record.ratio < best.ratio:
            group[record.bucket] = record
        measured[record.bucket, tunable.schedule_type(**record.schedule)] = record
    plain = tunable.default(task, caps)
    usual = tuple(int(getattr(plain, name)) for name in tunable.shared)
    if shared:
        key: tuple[int, ...] | None = tuple(int(shared[name]) for name in tunable.shared)
    else:
        key = _best_group(groups, shares, usual)
    if key is None:
        return None
    group = groups.get(key, {})
    fallback = replace(plain, **dict(zip(tunable.shared, key, strict=True)))
    known: dict[Bucket, Any] = {}
    used: list[Record] = []
    for bucket in tunable.buckets(task):
        # what is in the code already, the least new first
        simple = [fallback, *list(known.values())[-1:]]
        known[bucket] = fallback
        if bucket not in group:
            continue
        enough = group[bucket].ratio * (1 + _WORTH)
        as_fast = [s for s in simple if (r := measured.get((bucket, s))) is not None and r.ratio <= enough]
        if key == usual and enough >= 1:
            as_fast.insert(0, fallback)
        known[bucket] = as_fast[0] if as_fast else tunable.schedule_type(**group[bucket].schedule)
        behind = measured.get((bucket, known[bucket]))
        if behind is not None and known[bucket] != plain:
            used.append(behind)
    if set(known.values()) == {plain}:
        return None
    # rows that no bucket of the kernel class covers go with the nearest that does
    order = list(known)
    near = lambda b: min(order, key=lambda o: abs(BUCKETS.index(o) - BUCKETS.index(b)))  # noqa: E731
    pairs = [(bucket.high, known[near(bucket)]) for bucket in BUCKETS]
    return Choice(ByRows.of(pairs), tuple(used))


def _best_group(
    groups: Mapping[tuple[int, ...], Mapping[Bucket, Record]],
    shares: Mapping[Bucket, float],
    usual: tuple[int, ...],
) -> tuple[int, ...] | None:
    """Values of the shared fields with the least time; None if nothing beats the default schedule."""
    best, least = None, 0.0
    for key, group in groups.items():
        if key != usual and set(group) != set(shares):
            continue
        gain = 0.0
        for bucket, share in shares.items():
            ratio = group[bucket].ratio if bucket in group else 1.0
            gain += max(share, 1e-9) * ((min(ratio, 1.0) if key == usual else ratio) - 1.0)
        if gain < least:
            best, least = key, gain
    return best
