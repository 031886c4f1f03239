"""How good the tuner's cost model is: rank correlation on held-out tasks, and trials saved.

    python tools/tune_report.py collect FILE --trials 150     random candidates of a few tasks of a 1.2B Llama, measured
    python tools/tune_report.py report FILE                   figures from the records of any database
    python tools/tune_report.py steps UNTUNED TUNED           times of whole steps of two artifacts, step by step in turns

The report replays searches on the measured candidates only, so it needs no further measurement: a search that asks for a
candidate is told what was measured. "Trials" counts candidates until one is within 5 % of the best of all that were measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc.runtime.model import Model, load
from llmc.runtime.sequence import Sequence as Tokens
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.linear import LinearConfig
from llmc.schedules.records import Record, RecordFile, Status, read_records
from llmc.schedules.tunable import Bucket, bucket_of
from llmc.targets.backend import get
from llmc.tune.job import Job
from llmc.tune.lab import ProcessLab
from llmc.tune.model import CostModel, rank_correlation
from llmc.tune.sources import tvm_version

_LEAST = 30  # measured candidates of a task to be in the report
_BATCH = 8
_REPEATS = 20
_NEAR = 1.05


def tasks() -> list[tuple[str, Any, int]]:
    """(kernel class, config, rows) that `collect` measures."""
    bf16 = ("bfloat16", "bfloat16", "bfloat16")
    attention = AttentionConfig(32, 8, 64, 64, "bfloat16", "bfloat16", 32, 16, 0.125)
    return [
        ("linear", LinearConfig(2048, 2048, *bf16), 1),
        ("linear", LinearConfig(8192, 2048, *bf16, activation="silu", gated=True), 1),
        ("linear", LinearConfig(2048, 2048, *bf16), 8),
        ("linear", LinearConfig(3072, 2048, *bf16), 8),
        ("linear", LinearConfig(2048, 2048, *bf16), 64),
        ("linear", LinearConfig(3072, 2048, *bf16), 64),
        ("attention_decode", attention, 1),
        ("attention_decode", attention, 8),
    ]


def collect(path: Path, trials: int) -> None:
    """Measure random candidates of each task until `trials` are known; what is in the file already counts."""
    backend, caps = get("cpu")
    by_name = {tunable.name: tunable for tunable in backend.tunables()}
    records, rng = RecordFile(path), np.random.default_rng(0)
    with ProcessLab(caps.preset) as lab:
        limits = lab.limits()
        for name, config, rows in tasks():
            tunable = by_name[name]
            job = Job.of(tunable, tunable.task(config), bucket_of(rows), rows, caps)
            job.roofline = limits.least_seconds(tunable.work(job.task, rows))
            key = job.key(caps.preset)
            job.recall(r for r in records if r.task_key == key and r.bucket == job.bucket)
            if not job.default_seconds:
                outcome = lab.default(job)
                job.default_seconds = outcome.default
                job.add(job.space.default, outcome)
                records.append(
                    [job.record(job.space.default, outcome, caps.preset, tvm_version(), backend.device())]
                )
            while len(job.measured) < min(trials, job.size):
                wanted = {job.space.random(rng) for _ in range(_BATCH)} - set(job.measured)
                for schedule, outcome in lab.measure(job, list(wanted), seconds=0.15):
                    job.add(schedule, outcome)
                    records.append(
                        [job.record(schedule, outcome, caps.preset, tvm_version(), backend.device())]
                    )
            print(
                f"{job.name}: {len(job.measured)} of {job.size}, best {1 / job.best_ratio:.2f}x", flush=True
            )


def report(path: Path) -> None:
    """Print the figures for every task with enough records."""
    _, caps = get("cpu")
    by_name = {tunable.name: tunable for tunable in get("cpu")[0].tunables()}
    tables: dict[tuple[str, int], list[Record]] = {}
    for record in read_records(path):
        if record.status is Status.OK and record.rule in by_name and record.preset == caps.preset:
            tables.setdefault((record.task_key, record.low), []).append(record)
    tables = {key: table for key, table in tables.items() if len(table) >= _LEAST}
    print(
        f"{'task':62s} {'known':>5s} {'best':>6s} {'rank correlation':>22s} {'trials to 95 % of the best':>34s}"
    )
    print(
        f"{'':62s} {'':5s} {'':6s} {'other tasks':>11s} {'half':>10s} {'random':>10s} {'model':>11s} {'transfer':>11s}"
    )
    sums: list[list[float]] = []
    for key, table in tables.items():
        tunable = by_name[table[0].rule]
        others = [r for other, rows in tables.items() if other != key for r in rows]
        job = Job.of(
            tunable,
            tunable.from_values(table[0].task),
            Bucket(table[0].low, table[0].high),
            table[0].rows,
            caps,
        )
        truth = {tunable.schedule_type(**r.schedule): r.ratio for r in table}
        far = held_out(job, truth, others, caps)
        near = held_half(job, truth, others, caps)
        figures = [
            replay(job, truth, lambda: None),
            replay(job, truth, lambda job=job: _model(job, [], caps)),
            replay(job, truth, lambda job=job, others=others: _model(job, others, caps)),
        ]
        print(
            f"{job.name:62s} {len(table):5d} {1 / min(truth.values()):5.2f}x {far:11.2f} {near:10.2f}"
            f" {figures[0]:10.1f} {figures[1]:11.1f} {figures[2]:11.1f}"
        )
        sums.append([far, near, *figures])
    if sums:
        means = [statistics.fmean(v for v in column if v == v) for column in zip(*sums, strict=True)]
        print(
            f"{'mean':76s}{means[0]:10.2f} {means[1]:10.2f} {means[2]:10.1f} {means[3]:11.1f} {means[4]:11.1f}"
        )


def _model(job: Job, records: Sequence[Record], caps: Any) -> CostModel:
    model = CostModel(job.tunable, caps)
    model.learn_records(records)
    return model


def held_out(job: Job, truth: dict[Any, float], others: Sequence[Record], caps: Any) -> float:
    """Rank correlation of a model that has seen other tasks only."""
    model = _model(job, others, caps)
    known = list(truth)
    return rank_correlation(model.predict(job.task, job.rows, known), [-truth[s] for s in known])


def held_half(job: Job, truth: dict[Any, float], others: Sequence[Record], caps: Any) -> float:
    """Rank correlation on half of a task's candidates of a model that has seen the other half too."""
    model, known = _model(job, others, caps), list(truth)
    order = np.random.default_rng(0).permutation(len(known))
    half = len(known) // 2
    for i in order[:half]:
        model.learn(job.task, job.rows, known[i], truth[known[i]])
    rest = [known[i] for i in order[half:]]
    return rank_correlation(model.predict(job.task, job.rows, rest), [-truth[s] for s in rest])


def replay(job: Job, truth: dict[Any, float], make: Callable[[], CostModel | None]) -> float:
    """Mean trials until one is nearly the best, in batches; without a model in random order."""
    goal = _NEAR * min(truth.values())
    counts = []
    for repeat in range(_REPEATS):
        rng, model = np.random.default_rng(repeat), make()
        left = list(truth)
        rng.shuffle(left)
        tried = 0
        while left:
            if model is not None:
                scores = model.predict(job.task, job.rows, left)
                left = [left[i] for i in np.argsort(-np.asarray(scores), kind="stable")]
            batch, left = left[:_BATCH], left[_BATCH:]
            hit = [i for i, s in enumerate(batch) if truth[s] <= goal]
            if hit:
                tried += hit[0] + 1
                break
            tried += len(batch)
            for schedule in batch if model is not None else ():
                model.learn(job.task, job.rows, schedule, truth[schedule])
        counts.append(tried)
    return statistics.fmean(counts)


def steps(first: Path, second: Path, rounds: int) -> None:
    """Decode steps (1 and 8 sequences) and prompts of 512 tokens of two artifacts, step by step in turns.

    A step is compared with the other artifact's next to it: what else runs on the machine hits both alike.
    """
    models = [load(path) for path in (first, second)]
    print(f"{'':22s} {'median of each':>23s}   pairs: median and middle half of first over second")
    for label, batch, prompt, calls in (
        ("decode, 1 sequence", 1, 128, 24),
        ("decode, 8 sequences", 8, 128, 8),
        ("prompt of 512 tokens", 1, 512, 0),
    ):
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds):
            sides = [_Side(model, batch, prompt) for model in models]
            try:
                for i in range(calls or 2):
                    order = (0, 1) if (i + number) % 2 == 0 else (1, 0)
                    for side in order:
                        seconds = sides[side].decode() if calls else sides[side].prefill()
                        if i or number:  # the first touches code and pools
                            times[side].append(seconds)
            finally:
                for made in sides:
                    made.free()
        before, after = (statistics.median(kept) for kept in times)
        low, middle, high = np.quantile(np.divide(*times), (0.25, 0.5, 0.75))
        print(
            f"{label:22s} {before * 1e3:8.2f} ms {after * 1e3:8.2f} ms   {middle:.3f} ({low:.2f} - {high:.2f})"
            f" of {len(times[0])} pairs",
            flush=True,
        )


class _Side:
    """Sequences of one artifact.

    Args:
        batch: how many.
        prompt: tokens of each that `decode` begins with, or that `prefill` reads.
    """

    def __init__(self, model: Model, batch: int, prompt: int) -> None:
        vocabulary = model.manifest.model.vocab_size
        self._model = model
        self._live: list[Tokens] = []
        self._prompts = [
            [(7919 * (i + 1) + 104729 * b) % vocabulary for i in range(prompt)] for b in range(batch)
        ]

    def decode(self) -> float:
        """Seconds of the next step, with the likeliest tokens."""
        if not self._live:
            self._live = [self._model.new_sequence() for _ in self._prompts]
            self._logits = self._model.step(list(zip(self._live, self._prompts, strict=True)))
        tokens = np.argmax(np.asarray(self._logits), -1)
        begin = time.perf_counter()
        self._logits = self._model.step([(s, [int(t)]) for s, t in zip(self._live, tokens, strict=True)])
        return time.perf_counter() - begin

    def prefill(self) -> float:
        """Seconds of the prompts."""
        with self._model.new_sequence() as sequence:
            begin = time.perf_counter()
            self._model.step([(sequence, self._prompts[0])])
            return time.perf_counter() - begin

    def free(self) -> None:
        for sequence in self._live:
            sequence.free()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("collect", "report", "steps"))
    parser.add_argument("file", type=Path)
    parser.add_argument("tuned", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=150)
    options = parser.parse_args()
    if options.what == "collect":
        collect(options.file, options.trials)
    elif options.what == "steps":
        steps(options.file, options.tuned, options.rounds)
    else:
        report(options.file)


if __name__ == "__main__":
    main()
