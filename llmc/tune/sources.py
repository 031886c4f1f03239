"""Where tuning records come from: those shipped with llmc, the user's database, files named on the command line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llmc import knobs
from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.schedules.records import Record, RecordFile, read_records
from llmc.schedules.tunable import Tunable
from llmc.schedules.tuned_choice import Tuned, is_current
from llmc.targets.backend import Backend, get
from llmc.tune.job import schedule_text


def default_database() -> Path:
    """The user's database, where ``llmc tune`` writes unless told otherwise."""
    return knobs.cache_dir() / "tuning" / "records.jsonl"


def tuned_for(backend: Backend, caps: Capabilities, sources: Sequence[Sequence[Record]]) -> Tuned:
    """The schedules that records choose for a compile; later sources win over earlier ones."""
    return Tuned(sources, caps, tvm_version(), backend.device(), backend.tunables())


def records_for_compile(path: Path, backend: Backend, caps: Capabilities) -> list[Record]:
    """The records of a file that a compile is to use.

    Raises:
        LlmcError: the file is missing or corrupt, or nothing in it is for this target, TVM and kernel versions.
    """
    if not path.exists():
        raise LlmcError(
            "records-missing",
            f"There are no tuning records at {path}.",
            hint="llmc tune MODEL --records FILE",
        )
    records = read_records(path)
    here = [r for r in records if r.preset == caps.preset]
    if not here:
        found = ", ".join(sorted({r.preset for r in records})) or "no records"
        raise LlmcError(
            "records-other-machine",
            f"The tuning records must be for {caps.preset}; {path} has {found}.",
            hint="Compile for such a machine (--target), or tune on this one.",
        )
    version = tvm_version()
    kernels = {t.name: t for t in backend.tunables()}
    usable = [
        r for r in here if r.tvm == version and r.rule in kernels and is_current(r, kernels[r.rule], caps)
    ]
    if not usable:
        found = ", ".join(sorted({f"TVM {r.tvm}, {r.rule} {r.version}.{r.code}" for r in here}))
        raise LlmcError(
            "records-other-version",
            f"The tuning records must be of TVM {version} and this llmc's kernels; {path} has {found}.",
            hint=f"Tune again: llmc tune MODEL --records {path} starts from what they say.",
        )
    return usable


def merge(into: Path, files: Sequence[Path]) -> tuple[int, int]:
    """Add the records of `files` to the database `into`; of two measurements of the same, the one added last counts.

    Returns:
        (records added or replaced, records that were there already as they are).

    Raises:
        LlmcError: a file is missing or corrupt; then nothing is changed.
    """
    read = [record for path in files for record in read_records(path)]
    database = RecordFile(into)
    added = database.append(read)
    return added, len(read) - added


def soft_mismatches(
    records: Sequence[Record], backend: Backend, caps: Capabilities, device: str | None = None
) -> str:
    """What a database holds that is measured again, in a sentence; "" if nothing.

    Args:
        device: that measures; None = this machine's.
    """
    version, device = tvm_version(), backend.device() if device is None else device
    kernels = {t.name: t for t in backend.tunables()}
    others: Counter[str] = Counter()
    for record in records:
        if record.preset != caps.preset or record.rule not in kernels:
            continue
        if record.tvm != version:
            others[f"TVM {record.tvm}"] += 1
        elif record.device != device:
            others[record.device] += 1
        elif not is_current(record, kernels[record.rule], caps):
            others[f"another version of {record.rule}"] += 1
    if not others:
        return ""
    said = ", ".join(f"{count} of {name}" for name, count in sorted(others.items()))
    return f"Records that only seed the search, because they were made elsewhere or before a change: {said}."


def dropped_note(tuned: Tuned) -> str:
    """What a compile says about records that it left out because kernels have changed; "" if there are none."""
    if not tuned.dropped:
        return ""
    said = ", ".join(f"{count} of {rule}" for rule, count in sorted(tuned.dropped.items()))
    return f"Tuning records that are not used, because the kernels have changed since: {said}."


class Judge:
    """Says of single records what they are worth to a compile with this llmc and TVM."""

    def __init__(self) -> None:
        self._kernels: dict[str, tuple[Capabilities, dict[str, Tunable]] | None] = {}

    def _of(self, preset: str) -> tuple[Capabilities, dict[str, Tunable]] | None:
        if preset not in self._kernels:
            try:
                backend, caps = get(preset)
                self._kernels[preset] = caps, {t.name: t for t in backend.tunables()}
            except LlmcError:
                self._kernels[preset] = None
        return self._kernels[preset]

    def objection(self, record: Record) -> str:
        """Why the record would not count, whatever machine it is compiled for; "" = it would."""
        known = self._of(record.preset)
        if known is None or record.rule not in known[1]:
            return "unknown here"
        if record.tvm != tvm_version():
            return "other TVM"
        return "" if is_current(record, known[1][record.rule], known[0]) else "kernel has changed"

    def schedule_text(self, record: Record) -> str:
        """What the schedule does otherwise than the default; all its fields, if its kernel class is another by now."""
        known = self._of(record.preset)
        if known is not None and record.rule in known[1]:
            kind = known[1][record.rule].schedule_type
            with suppress(TypeError):
                return schedule_text(kind(**record.schedule), kind())
        return " ".join(f"{k}={v}" for k, v in record.schedule.items())


def tvm_version() -> str:
    """The TVM that generates code here."""
    import tvm

    return str(tvm.__version__)
