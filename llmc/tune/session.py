"""One run of the tuner on the kernels of a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.schedules.records import RecordFile
from llmc.schedules.tuned_choice import shipped_records
from llmc.targets.backend import Backend
from llmc.tune.extract import KernelUse, jobs_of
from llmc.tune.lab import ProcessLab
from llmc.tune.model import require_xgboost
from llmc.tune.sources import soft_mismatches, tvm_version
from llmc.tune.tuner import TuneProgress, Tuner, TuneResult


def check_tunable(backend: Backend, caps: Capabilities) -> None:
    """Raise unless candidates for the target can be made and run here.

    Raises:
        LlmcError: the target has no tuner, this machine lacks features, or xgboost is not installed.
    """
    if backend.runner is None:
        raise LlmcError(
            "target-not-tunable",
            f"Target {backend.name} has no tuner in this version.",
            hint="Compile without --tune.",
        )
    lacks = backend.missing(caps)
    if lacks:
        raise LlmcError(
            "cannot-tune-here",
            f"Tuning runs kernels, and this machine cannot run {caps.preset}: it lacks {', '.join(lacks)}.",
            hint="Tune on such a machine and bring its records: --records FILE.",
        )
    require_xgboost()


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
) -> TuneResult:
    """Tune the kernels of a model for `budget` seconds; measurements go to `database` as they are made.

    Args:
        uses: kernels and how often they are called (llmc.tune.extract).
        max_batch, max_step_tokens: bounds of the artifact.

    Raises:
        LlmcError: see check_tunable; the database is corrupt or cannot be written; nothing to tune.
    """
    check_tunable(backend, caps)
    progress = progress or TuneProgress()
    records = RecordFile(database)
    said = soft_mismatches(list(records), backend, caps)
    if said:
        progress.phase(said)
    jobs = jobs_of(uses, backend.tunables(), caps, max_batch=max_batch, max_step_tokens=max_step_tokens)
    if not jobs:
        raise LlmcError(
            "nothing-to-tune",
            "The model has no kernel whose schedule can be tuned.",
            hint="An artifact of an older llmc lists none: compile it again.",
        )
    with ProcessLab(caps.preset) as lab:
        tuner = Tuner(
            jobs,
            lab,
            records,
            caps,
            tvm_version(),
            backend.device(),
            more=shipped_records(),
            progress=progress,
        )
        return tuner.run(budget)
