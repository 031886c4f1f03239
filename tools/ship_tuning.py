"""Write what a tuning database chooses as defaults that ship with llmc: python tools/ship_tuning.py FILE [--target cpu].

Only the records that choices rest on are written, to schedules/tuned/PRESET.jsonl; a file that is there keeps its records of
other tasks.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from llmc.schedules.records import Record, RecordFile, read_records
from llmc.schedules.tuned_choice import SHIPPED, choose
from llmc.targets.backend import get
from llmc.tune.sources import tvm_version


def chosen(records: list[Record], target: str) -> list[Record]:
    """The records behind the choice of every task that was measured for the target by this TVM."""
    backend, caps = get(target)
    tunables = {tunable.name: tunable for tunable in backend.tunables()}
    tasks: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.preset == caps.preset and record.tvm == tvm_version() and record.rule in tunables:
            tasks[record.task_key, record.device].append(record)
    kept = []
    for group in tasks.values():
        tunable = tunables[group[0].rule]
        choice = choose(tunable, tunable.from_values(group[0].task), group)
        kept += [replace(record, note="") for record in (choice.records if choice else ())]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--target", default="cpu")
    options = parser.parse_args()
    caps = get(options.target)[1]
    kept = chosen(read_records(options.file), options.target)
    path = SHIPPED / f"{caps.preset.replace('/', '-')}.jsonl"
    tasks = {record.task_key for record in kept}
    old = [record for record in (read_records(path) if path.exists() else []) if record.task_key not in tasks]
    path.unlink(missing_ok=True)
    RecordFile(path).append([*old, *kept])
    print(f"{path}: {len(kept)} records of {len(tasks)} tasks, {len(old)} kept")


if __name__ == "__main__":
    main()
