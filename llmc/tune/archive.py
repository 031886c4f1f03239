"""Candidates that one machine builds and another one measures, as one file.

A zip file: ``candidates.json`` names the jobs and their candidates, ``libraries/N.so`` is what the target's runner loads. The
machine with the device needs no compiler for it; its measurements are ordinary records.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.schedules.records import Status
from llmc.schedules.tunable import BUCKETS, Space, Tunable, code_of, key_of
from llmc.tune.job import Job, Outcome
from llmc.tune.lab import MeasuringLab

FORMAT = 1
_HEADER = "llmc-candidates"
_INDEX = "candidates.json"
_LIBRARY = re.compile(r"libraries/\d+(\.\w+)?")


@dataclass(frozen=True)
class Listed(Space):
    """A space whose members are listed: the candidates of an archive."""

    members: tuple[Any, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.members)

    def __contains__(self, schedule: Any) -> bool:
        return schedule in self.members

    def random(self, rng: np.random.Generator) -> Any:
        return self.members[int(rng.integers(len(self.members)))]

    def mutate(self, schedule: Any, rng: np.random.Generator) -> Any:
        """Another member; which ones are alike is the cost model's to say."""
        return self.random(rng)

    def cross(self, a: Any, b: Any, rng: np.random.Generator) -> Any:
        return a

    def nearest(self, values: Mapping[str, int]) -> Any:
        """The member that differs in the fewest fields."""
        return min(
            self.members,
            key=lambda s: sum(int(values[k]) != int(v) for k, v in asdict(s).items() if k in values),
        )


class ArchiveWriter:
    """Writes an archive; nothing is left of one that is not finished.

    Args:
        path: of the file, written when `finish` is called.
        preset, tvm: what the candidates are built for and by.
    """

    def __init__(self, path: Path, preset: str, tvm: str) -> None:
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        self._head = {_HEADER: FORMAT, "preset": preset, "tvm": tvm}
        self._jobs: list[dict[str, Any]] = []
        self._count = 0
        self._defaults: dict[str, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._zip = zipfile.ZipFile(self._part, "w", zipfile.ZIP_DEFLATED)
        except OSError as e:
            raise LlmcError(
                "candidates-unwritable", f"The candidates {path} cannot be written: {e.strerror}."
            ) from None

    def has_default(self, job: Job) -> bool:
        """Whether the default schedule of the job's task is there already; one library serves all buckets."""
        return _task_of(job) in self._defaults

    def add_default(self, job: Job, library: Path) -> None:
        self._defaults[_task_of(job)] = self._add(library)

    def add(self, job: Job, candidates: Mapping[Any, Path]) -> None:
        """A job whose default is there, and libraries of further schedules for its bucket."""
        entry: dict[str, Any] = {
            "rule": job.tunable.name,
            "version": job.tunable.version,
            "code": job.code,
            "task": job.values,
            "low": job.bucket.low,
            "rows": job.rows,
            "calls": [list(pair) for pair in job.calls],
            "default": self._defaults[_task_of(job)],
            "candidates": [
                {"schedule": asdict(schedule), "library": self._add(path)}
                for schedule, path in candidates.items()
            ],
        }
        self._jobs.append(entry)

    def finish(self) -> None:
        """Complete the file."""
        self._zip.writestr(_INDEX, json.dumps({**self._head, "jobs": self._jobs}))
        self._zip.close()
        self._part.replace(self._path)

    def abandon(self) -> None:
        """Remove what was written; nothing after finish."""
        self._zip.close()
        self._part.unlink(missing_ok=True)

    def _add(self, library: Path) -> str:
        # with its suffix, by which loaders know what it is
        name = f"{self._count}{library.suffix}"
        self._zip.write(library, f"libraries/{name}")
        self._count += 1
        return name


def _task_of(job: Job) -> str:
    return key_of({"rule": job.tunable.name, "task": job.values})


class Archive:
    """An archive that is open for measuring.

    Attributes:
        preset: what its candidates are built for.
        jobs: with the candidates as their spaces.

    Raises:
        LlmcError: missing or corrupt, of another format, another TVM or other kernels than this llmc's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._work = tempfile.TemporaryDirectory(prefix="llmc-tune-")
        try:
            with zipfile.ZipFile(path) as held:
                self._index = _checked(path, json.loads(held.read(_INDEX)))
                for name in held.namelist():
                    if _LIBRARY.fullmatch(name):
                        held.extract(name, self._work.name)
        except FileNotFoundError:
            raise LlmcError("candidates-missing", f"There are no candidates at {path}.") from None
        except (OSError, zipfile.BadZipFile, KeyError, ValueError) as e:
            raise LlmcError(
                "candidates-corrupt",
                f"{path} is no file of candidates: {e}.",
                hint="Write it with llmc tune MODEL --export-candidates FILE.",
            ) from None
        self.preset = str(self._index["preset"])
        self.jobs: list[Job] = []
        self._libraries: dict[tuple[str, int, Any], Path] = {}
        self._default_libraries: dict[str, Path] = {}

    def open(self, tunables: Sequence[Tunable], caps: Capabilities, tvm: str) -> None:
        """Make the jobs.

        Raises:
            LlmcError: the candidates are of another TVM or of other kernels.
        """
        found = f"TVM {self._index['tvm']}"
        if self._index["tvm"] != tvm:
            raise self._of_another_version(f"TVM {tvm}", found)
        named = {tunable.name: tunable for tunable in tunables}
        for entry in self._index["jobs"]:
            tunable = named.get(entry["rule"])
            if tunable is None or (entry["version"], entry["code"]) != (
                tunable.version,
                code_of(tunable, caps),
            ):
                raise self._of_another_version("this llmc's kernels", f"other kernels ({entry['rule']})")
            self._add(tunable, entry, caps)

    def library(self, job: Job, schedule: Any) -> Path | None:
        """Of a candidate; None = it is not in the archive."""
        if schedule == job.space.default and (_task_of(job), job.bucket.low, schedule) not in self._libraries:
            return self.default_library(job)
        return self._libraries.get((_task_of(job), job.bucket.low, schedule))

    def default_library(self, job: Job) -> Path:
        return self._default_libraries[_task_of(job)]

    def close(self) -> None:
        self._work.cleanup()

    def _add(self, tunable: Tunable, entry: dict[str, Any], caps: Capabilities) -> None:
        task = tunable.from_values(entry["task"])
        bucket = next(b for b in BUCKETS if b.low == entry["low"])
        default = tunable.default(task, caps)
        listed = {tunable.schedule_type(**c["schedule"]): c["library"] for c in entry["candidates"]}
        space = Listed(default, (), members=tuple(dict.fromkeys([default, *listed])))
        calls = tuple((int(number), float(count)) for number, count in entry["calls"])
        job = Job(tunable, task, bucket, int(entry["rows"]), space, str(entry["code"]), calls)
        self.jobs.append(job)
        self._default_libraries[_task_of(job)] = self._path(entry["default"])
        for schedule, name in listed.items():
            self._libraries[_task_of(job), bucket.low, schedule] = self._path(name)

    def _path(self, name: str) -> Path:
        return Path(self._work.name) / "libraries" / Path(name).name

    def _of_another_version(self, required: str, found: str) -> LlmcError:
        return LlmcError(
            "candidates-other-version",
            f"The candidates must be of {required}; {self.path} has {found}.",
            hint="Use the same llmc and TVM on both machines, and export again.",
        )


def _checked(path: Path, index: Any) -> dict[str, Any]:
    if not isinstance(index, dict) or _HEADER not in index:
        raise ValueError(f"{_INDEX} has no {_HEADER}")
    if index[_HEADER] != FORMAT:
        raise LlmcError(
            "candidates-version",
            f"{path} has candidates of format {index[_HEADER]}; this llmc reads format {FORMAT}.",
            hint="Export them again with this llmc.",
        )
    return index


class ArchiveLab(MeasuringLab):
    """Measures what an archive holds; nothing is built."""

    def __init__(self, archive: Archive, command: list[str] | None = None) -> None:
        super().__init__(archive.preset, command)
        self._archive = archive

    def _libraries(self, job: Job, schedules: Sequence[Any]) -> dict[Any, Path | Outcome]:
        missing = Outcome(Status.UNBUILT, note="not in the archive")
        return {s: self._archive.library(job, s) or missing for s in schedules}

    def _default_library(self, job: Job) -> Path | Outcome:
        return self._archive.default_library(job)
