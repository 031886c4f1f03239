"""Tuning records: what was measured for a kernel task, as JSON lines.

A file begins with the line ``{"llmc-records": 1}``; every other line is one measurement of one schedule. Lines are only
ever appended, each by a single write, so a run that is interrupted leaves a file that the next one continues.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError
from llmc.schedules.tunable import Bucket, key_of

FORMAT = 1
_HEADER = "llmc-records"


class Status(str, Enum):
    """How a candidate ended."""

    OK = "ok"
    WRONG = "wrong"  # ran, but its result is not the reference's
    CRASHED = "crashed"  # took the measuring process with it
    HUNG = "hung"  # did not return in time
    UNBUILT = "unbuilt"  # the compiler refused it


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        rule, version: of the Tunable.
        task: its config without schedule, as JSON values.
        low, high, rows: the bucket, and the number of rows that was measured.
        schedule: what was measured.
        code: what the kernel class generated then (llmc.schedules.tunable.code_of).
        preset: capabilities that the code was generated for.
        tvm: version.
        device: processor and threads.
        status: how it ended; the figures below are 0 unless ok.
        seconds: median time of a call on cold weights.
        ratio: the same over that of the default schedule, measured in turns with it: 1 for the default itself.
        share: share of the model's step time that the task had when it was measured, with default schedules.
        roofline: least possible time on the device (memory traffic or operations), in seconds.
        error: largest error, as a share of what is allowed.
        note: why it failed.
    """

    rule: str
    version: int
    task: Mapping[str, Any]
    low: int
    high: int
    rows: int
    schedule: Mapping[str, int]
    preset: str
    tvm: str
    device: str
    code: str = ""
    status: Status = Status.OK
    seconds: float = 0.0
    ratio: float = 0.0
    share: float = 0.0
    roofline: float = 0.0
    error: float = 0.0
    note: str = ""

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.low, self.high)

    @property
    def task_key(self) -> str:
        """Equal for measurements of one task in any bucket."""
        return task_key(self.rule, self.version, self.code, self.task, self.preset)

    @property
    def identity(self) -> str:
        """Equal for two measurements of the same schedule for the same rows with the same versions and device."""
        rest = [self.low, self.high, self.tvm, self.device, key_of(self.schedule)]
        return self.task_key + key_of({"rest": rest})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "status": self.status.value}

    @staticmethod
    def from_json(values: Any) -> Record:
        """Inverse of to_json.

        Raises:
            ValueError: a field is missing, unknown or of a wrong kind.
        """
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        names = {field.name: field for field in fields(Record)}
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"it has unknown fields {', '.join(unknown)}")
        required = ("rule", "version", "task", "low", "high", "rows", "schedule", "preset", "tvm", "device")
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        for name, kinds in _KINDS.items():
            if name in values and (not isinstance(values[name], kinds) or isinstance(values[name], bool)):
                raise ValueError(f"{name} is {values[name]!r}")
        if not all(isinstance(v, int) for v in values["schedule"].values()):
            raise ValueError("its schedule holds something that is no int or bool")
        if values["low"] < 1 or values["rows"] < values["low"] or 0 < values["high"] < values["low"]:
            raise ValueError(f"{values['rows']} rows do not lie in {values['low']}-{values['high']}")
        return Record(**{**values, "status": Status(values.get("status", "ok"))})


def task_key(rule: str, version: int, code: str, task: Mapping[str, Any], preset: str) -> str:
    """The text that records of one task have in common, whatever bucket, device and version of TVM."""
    return key_of({"rule": rule, "version": version, "code": code, "task": task, "preset": preset})


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("rule", "preset", "tvm", "device", "code", "note"), str),
    **dict.fromkeys(("version", "low", "high", "rows"), int),
    **dict.fromkeys(("seconds", "ratio", "share", "roofline", "error"), (int, float)),
    **dict.fromkeys(("task", "schedule"), dict),
}


def read_records(path: Path) -> list[Record]:
    """All records of a file, the last measurement of each identity.

    A last line without an end is what an interrupted run left; it is passed over.

    Raises:
        LlmcError: unreadable, no records file, of another format, or a line that is no record.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as e:
        raise LlmcError(
            "records-unreadable", f"The tuning records {path} cannot be read: {e.strerror}."
        ) from None
    except UnicodeDecodeError:
        raise LlmcError("records-corrupt", f"{path} is no file of tuning records: it is not text.") from None
    lines = text.split("\n")
    if lines == [""]:
        return []
    _check_header(path, lines[0])
    kept: dict[str, Record] = {}
    for number, line in enumerate(lines[1:], 2):
        if number == len(lines):  # behind the last end of line
            break
        if not line.strip():
            continue
        try:
            record = Record.from_json(json.loads(line))
        except (ValueError, TypeError, KeyError) as e:
            raise LlmcError(
                "records-corrupt",
                f"Line {number} of {path} is no tuning record: {e}.",
                hint="Delete the line; the others stay valid.",
            ) from None
        kept.pop(record.identity, None)  # a later measurement also takes the later place
        kept[record.identity] = record
    return list(kept.values())


def _check_header(path: Path, line: str) -> None:
    try:
        found = json.loads(line).get(_HEADER)
    except (ValueError, AttributeError):
        found = None
    if found is None:
        raise LlmcError(
            "records-corrupt",
            f"{path} is no file of tuning records: its first line is not {header_line().strip()}.",
            hint="Give a file that llmc tune wrote.",
        )
    if found != FORMAT:
        raise LlmcError(
            "records-version",
            f"{path} has tuning records of format {found}; this llmc reads format {FORMAT}.",
            hint="Tune again into a new file, or use the llmc that wrote it.",
        )


def header_line() -> str:
    """What a file begins with."""
    return json.dumps({_HEADER: FORMAT}) + "\n"


def record_line(record: Record) -> str:
    return json.dumps(record.to_json(), sort_keys=True, separators=(",", ":")) + "\n"


class RecordFile:
    """A file of records that is appended to.

    Attributes:
        records: what it holds, by identity.

    Raises:
        LlmcError: see read_records; or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        if path.exists():
            self.records = {record.identity: record for record in read_records(path)}

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self.records.values()))

    def append(self, records: Iterable[Record]) -> int:
        """Write records; returns how many were not in the file as they are."""
        wanted = {record.identity: record for record in records}
        new = [record for identity, record in wanted.items() if self.records.get(identity) != record]
        if not new:
            return 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._mend(descriptor)
                os.write(descriptor, "".join(map(record_line, new)).encode())
            finally:
                os.close(descriptor)
        except OSError as e:
            raise LlmcError(
                "records-unwritable", f"The tuning records {self.path} cannot be written: {e.strerror}."
            ) from None
        for record in new:
            self.records.pop(record.identity, None)
            self.records[record.identity] = record
        return len(new)

    def _mend(self, descriptor: int) -> None:
        """The header of a new file; and cut off a line that an interrupted write left without an end."""
        size = os.fstat(descriptor).st_size
        if size == 0:
            os.write(descriptor, header_line().encode())
            return
        tail = os.pread(descriptor, min(size, 1 << 20), max(0, size - (1 << 20)))
        if not tail.endswith(b"\n"):
            os.ftruncate(descriptor, size - len(tail) + tail.rfind(b"\n") + 1)
