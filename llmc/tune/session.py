"""One run of the tuner on the kernels of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.schedules.records import RecordFile
from llmc.schedules.tuned_choice import shipped_records
from llmc.targets.backend import Backend, get
from llmc.tune.archive import Archive, ArchiveLab
from llmc.tune.exporting import Exported, Told, export_candidates
from llmc.tune.extract import KernelUse, jobs_of
from llmc.tune.job import Job
from llmc.tune.lab import ProcessLab
from llmc.tune.model import has_xgboost, require_xgboost
from llmc.tune.remote import RemoteWorker
from llmc.tune.result import TuneProgress, TuneResult
from llmc.tune.sources import soft_mismatches, tvm_version
from llmc.tune.tuner import Tuner


def check_tunable(backend: Backend, caps: Capabilities, *, elsewhere: bool = False) -> None:
    """Raise unless candidates for the target can be made and run here.

    Args:
        elsewhere: another machine runs them.

    Raises:
        LlmcError: the target has no tuner, this machine lacks features, or xgboost is not installed.
    """
    _check_runnable(backend, caps, elsewhere)
    require_xgboost()


def _check_runnable(backend: Backend, caps: Capabilities, elsewhere: bool = False) -> None:
    if backend.runner is None:
        raise LlmcError(
            "target-not-tunable",
            f"Target {backend.name} has no tuner in this version.",
            hint="Compile without --tune.",
        )
    lacks = () if elsewhere else backend.missing(caps)
    if lacks:
        why = ", ".join(lacks) if backend.on_device else f"it lacks {', '.join(lacks)}"
        raise LlmcError(
            "cannot-tune-here",
            f"Tuning runs kernels, and this machine cannot run {caps.preset}: {why}.",
            hint="Tune on such a machine and bring its records (--records FILE), or build candidates for it here: "
            "llmc tune MODEL --export-candidates FILE (or measure there from here: --rpc HOST:PORT).",
        )


def tune_kernels(
    uses: Iterable[KernelUse],
    backend: Backend,
    caps: Capabilities,
    *,
    max_batch: int,
    max_step_tokens: int,
    budget: float,
    database: Path,
    progress: TuneProgress | None = None,
    rpc: str | None = None,
) -> TuneResult:
    """Tune the kernels of a model for `budget` seconds; measurements go to `database` as they are made.

    Args:
        uses: kernels and how often they are called (llmc.tune.extract).
        max_batch, max_step_tokens: bounds of the artifact.
        rpc: HOST:PORT of the machine that measures (llmc.tune.rpc_server); None = this one.

    Raises:
        LlmcError: see check_tunable; the database is corrupt or cannot be written; nothing to tune.
    """
    check_tunable(backend, caps, elsewhere=rpc is not None)
    jobs = _jobs(uses, backend, caps, max_batch, max_step_tokens)
    return tune_jobs(jobs, backend, caps, budget=budget, database=database, progress=progress, rpc=rpc)


def tune_jobs(
    jobs: Sequence[Job],
    backend: Backend,
    caps: Capabilities,
    *,
    budget: float,
    database: Path,
    progress: TuneProgress | None = None,
    rpc: str | None = None,
) -> TuneResult:
    """tune_kernels on jobs that are made already."""
    progress = progress or TuneProgress()
    records = RecordFile(database)
    remote = RemoteWorker(rpc, caps.preset) if rpc is not None else None
    device = remote.device() if remote is not None else backend.device()
    said = soft_mismatches(list(records), backend, caps, device)
    if said:
        progress.note(said)
    with ProcessLab(caps.preset, measurer=remote) as lab:
        tuner = Tuner(
            jobs,
            lab,
            records,
            caps,
            tvm_version(),
            device,
            more=shipped_records(),
            progress=progress,
        )
        return tuner.run(budget)


def export_kernels(
    uses: Iterable[KernelUse],
    backend: Backend,
    caps: Capabilities,
    *,
    max_batch: int,
    max_step_tokens: int,
    path: Path,
    each: int,
    budget: float | None = None,
    database: Path | None = None,
    told: Told = lambda text: None,
) -> Exported:
    """Build candidates for the kernels of a model into the file `path`; the target's machine need not be at hand.

    Args:
        each, budget, told: see llmc.tune.exporting.
        database: records that guide the choice of candidates, beside those shipped.

    Raises:
        LlmcError: nothing to tune, or the file cannot be written.
    """
    records = list(shipped_records())
    if database is not None and database.exists():
        records += list(RecordFile(database))
        require_xgboost()
    jobs = _jobs(uses, backend, caps, max_batch, max_step_tokens)
    records = [record for record in records if record.preset == caps.preset]
    return export_candidates(
        jobs, caps, tvm_version(), path, each=each, budget=budget, records=records, told=told
    )


def measure_candidates(
    path: Path, *, budget: float, database: Path, progress: TuneProgress | None = None
) -> TuneResult:
    """Measure the candidates of a file on this machine; measurements go to `database` as they are made.

    The same rules as for tuning: each is checked before it is timed, and what is known is not measured again.

    Raises:
        LlmcError: the file is missing, corrupt or of another version; this machine cannot run what is in it.
    """
    archive = Archive(path)
    try:
        backend, caps = get(archive.preset)
        _check_runnable(backend, caps)
        archive.open(backend.tunables(), caps, tvm_version())
        records = RecordFile(database)
        with ArchiveLab(archive) as lab:
            tuner = Tuner(
                archive.jobs,
                lab,
                records,
                caps,
                tvm_version(),
                backend.device(),
                progress=progress or TuneProgress(),
                use_model=has_xgboost(),
            )
            return tuner.run(budget)
    finally:
        archive.close()


def _jobs(
    uses: Iterable[KernelUse], backend: Backend, caps: Capabilities, max_batch: int, max_step_tokens: int
) -> list[Job]:
    jobs = jobs_of(uses, backend.tunables(), caps, max_batch=max_batch, max_step_tokens=max_step_tokens)
    if not jobs:
        raise LlmcError(
            "nothing-to-tune",
            "The model has no kernel whose schedule can be tuned.",
            hint="An artifact of an older llmc lists none: compile it again.",
        )
    return jobs
