"""Build candidates for a machine that is not at hand; see llmc.tune.archive."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.schedules.records import Record
from llmc.tune.archive import ArchiveWriter
from llmc.tune.building import BuildPool
from llmc.tune.job import Job, Outcome
from llmc.tune.model import CostModel

_POOL = 512  # random schedules that a cost model chooses from
Told = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What an export wrote: jobs, candidates beside the defaults, and how many could not be built, by reason."""

    jobs: int
    candidates: int
    failures: dict[str, int]


def export_candidates(
    jobs: Sequence[Job],
    caps: Capabilities,
    tvm: str,
    path: Path,
    *,
    each: int,
    budget: float | None = None,
    records: Iterable[Record] = (),
    builders: int | None = None,
    told: Told = lambda text: None,
) -> Exported:
    """Build the default and up to `each` candidates of every job into an archive.

    Args:
        budget: seconds after which the jobs that are left get their defaults only; None = no limit.
        records: what seeds the choice and what a cost model learns from; without any, candidates are random.
        told: hears of each job.

    Raises:
        LlmcError: the file cannot be written, or no default can be built.
    """
    chosen = choose_candidates(jobs, caps, each, list(records))
    failures: Counter[str] = Counter()
    count = written = 0
    end = time.monotonic() + budget if budget is not None else float("inf")
    pool, writer = BuildPool(caps.preset, builders), ArchiveWriter(path, caps.preset, tvm)
    try:
        for job, schedules in zip(jobs, chosen, strict=True):
            if not writer.has_default(job):
                default = pool.build_defaults([job])[0]
                if isinstance(default, Outcome):
                    failures[default.note] += 1
                    continue
                writer.add_default(job, default)
            built = pool.build(job, schedules) if time.monotonic() < end else {}
            good = {s: p for s, p in built.items() if isinstance(p, Path)}
            failures.update(o.note for o in built.values() if isinstance(o, Outcome))
            writer.add(job, good)
            for library in good.values():
                library.unlink()
            count, written = count + len(good), written + 1
            told(f"{job.name}: {len(good)} candidates")
        if not written:
            reason = failures.most_common(1)[0][0] if failures else "there are no tasks"
            raise LlmcError("nothing-exported", f"No kernel could be built for {caps.preset}: {reason}.")
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    finally:
        pool.close()
    return Exported(written, count, dict(failures))


def choose_candidates(
    jobs: Sequence[Job], caps: Capabilities, each: int, records: Sequence[Record], seed: int = 0
) -> list[list[Any]]:
    """Schedules to build per job: seeds from records, what a cost model expects most of, and random ones.

    Values of shared fields that one bucket of a task has are in its other buckets too: else they could not be chosen.
    """
    rng = np.random.default_rng(seed)
    models: dict[str, CostModel] = {}
    chosen: list[dict[Any, None]] = []
    for job in jobs:
        model = models.get(job.tunable.name)
        if model is None and records:
            model = models[job.tunable.name] = CostModel(job.tunable, caps)
            model.learn_records(records)
        known = [r for r in records if r.rule == job.tunable.name and r.low == job.bucket.low]
        known.sort(key=lambda r: r.ratio or 1e9)
        picked = dict.fromkeys(job.space.nearest(r.schedule) for r in known[: each // 4])
        drawn = list(dict.fromkeys(job.space.random(rng) for _ in range(_POOL)))
        if model is not None:
            order = np.argsort(-model.predict(job.task, job.rows, drawn), kind="stable")
            picked.update(dict.fromkeys(drawn[i] for i in order[: each // 2]))
        for schedule in drawn:
            if len(picked) >= each:
                break
            picked.setdefault(schedule)
        picked.pop(job.space.default, None)
        chosen.append(dict.fromkeys(list(picked)[:each]))
    for job, own in zip(jobs, chosen, strict=True):
        names = job.tunable.shared
        if not names:
            continue
        values = lambda s, names=names: tuple(getattr(s, n) for n in names)  # noqa: E731
        kind = job.key(caps.preset)
        task = [c for j, c in zip(jobs, chosen, strict=True) if j.key(caps.preset) == kind]
        for key in sorted({values(s) for c in task for s in c} - {values(s) for s in own}):
            near = job.space.nearest({**asdict(job.space.default), **dict(zip(names, key, strict=True))})
            if near != job.space.default:
                own.setdefault(near)
    return [list(own) for own in chosen]
