"""Tune the shapes that llmc ships schedules for, and write what was found to schedules/tuned/PRESET.jsonl.

    python tools/ship_tuning.py tune FILE --budget 10m --model PATH:none,w4a8,q4g32 --model ...    measures into FILE
    python tools/ship_tuning.py ship FILE                                                        FILE -> schedules/tuned

`tune` is one run over the kernels of all models and schemes: what they share is measured once, and the budget goes where it
pays. It tunes the steps that matter most: one sequence, a batch of 8, and a prompt of 512 tokens. A later run goes on from
the file. `ship` writes only the records that choices rest on, and drops those of kernels that have changed since.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from llmc.cli.tune_view import TuneView, conclusions, result_table
from llmc.pipeline.lower import lower_model
from llmc.schedules.records import Record, RecordFile, read_records
from llmc.schedules.tuned_choice import SHIPPED, choose, is_current
from llmc.spec import CompileSpec, parse_budget
from llmc.targets.backend import get
from llmc.tune.extract import TRAFFIC, KernelUse, jobs_of_models, kernel_uses
from llmc.tune.session import check_tunable, tune_jobs
from llmc.tune.sources import tvm_version

_STEPS = [
    i
    for i, s in enumerate(TRAFFIC)
    if (s.function, s.tokens) in (("decode", 1), ("decode", 8), ("step", 512))
]
_BATCH, _TOKENS = 8, 512
_SLOWER = 1.01  # nobody's prompts pay for another's decode: a layout that makes some number of rows slower does not ship


def uses_of(text: str, target: str) -> list[list[KernelUse]]:
    """Kernels of ``PATH:scheme,scheme`` per scheme."""
    path, _, schemes = text.rpartition(":")
    found = []
    for scheme in schemes.split(","):
        spec = CompileSpec(
            path, target=target, quant=scheme, meta_weights=True, max_batch=16, max_step_tokens=_TOKENS
        )
        found.append(list(kernel_uses(lower_model(path, spec)[1].module)))
    return found


def tune(options: argparse.Namespace) -> None:
    """Measure into the file until the budget is used, lowering of the models included."""
    end = time.monotonic() + parse_budget(options.budget)
    backend, caps = get(options.target)
    check_tunable(backend, caps)
    models = [uses for text in options.model for uses in uses_of(text, options.target)]
    jobs = jobs_of_models(
        models, backend.tunables(), caps, max_batch=_BATCH, max_step_tokens=_TOKENS, steps=_STEPS
    )
    view = TuneView(Console(), live=sys.stdout.isatty(), quiet=False)
    print(f"{len(models)} models, {len(jobs)} tasks, {end - time.monotonic():.0f} s left", flush=True)
    result = tune_jobs(
        jobs, backend, caps, budget=end - time.monotonic(), database=options.file, progress=view
    )
    Console(width=180).print(result_table(result))
    for line in conclusions(result):
        print(line)


def chosen(records: list[Record], target: str) -> list[Record]:
    """The records behind the choice of every task that was measured for the target by this TVM, of kernels as they are."""
    backend, caps = get(target)
    tunables = {tunable.name: tunable for tunable in backend.tunables()}
    tasks: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        current = record.rule in tunables and is_current(record, tunables[record.rule], caps)
        if current and record.preset == caps.preset and record.tvm == tvm_version():
            tasks[record.task_key, record.device].append(record)
    kept = []
    for group in tasks.values():
        tunable = tunables[group[0].rule]
        task = tunable.from_values(group[0].task)
        choice = choose(tunable, task, group, caps)
        if choice is not None and any(record.ratio > _SLOWER for record in choice.records):
            usual = tunable.default(task, caps)
            choice = choose(tunable, task, group, caps, {n: getattr(usual, n) for n in tunable.shared})
        kept += [
            replace(record, note="", seconds=_short(record.seconds), roofline=_short(record.roofline))
            for record in (choice.records if choice else ())
        ]
    return kept


def _short(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def ship(options: argparse.Namespace) -> None:
    """The file's choices replace those that ship for the same tasks."""
    backend, caps = get(options.target)
    tunables = {tunable.name: tunable for tunable in backend.tunables()}
    kept = chosen(read_records(options.file), options.target)
    path = SHIPPED / f"{caps.preset.replace('/', '-')}.jsonl"
    tasks = {record.task_key for record in kept}
    old = [
        record
        for record in (read_records(path) if path.exists() else [])
        if record.task_key not in tasks
        and record.rule in tunables
        and is_current(record, tunables[record.rule], caps)
    ]
    path.unlink(missing_ok=True)
    RecordFile(path).append([*old, *kept])
    print(
        f"{path}: {len(kept)} records of {len(tasks)} tasks, {len(old)} kept, {path.stat().st_size / 1e3:.0f} kB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tune", "ship"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", action="append", default=[], help="PATH:scheme,scheme; may be given often")
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--target", default="cpu")
    options = parser.parse_args()
    (tune if options.what == "tune" else ship)(options)


if __name__ == "__main__":
    main()
