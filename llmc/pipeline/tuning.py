"""Which schedules the kernels get: tuning records, shipped, given or found in this compile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmc.caps import Capabilities
from llmc.pipeline.lower import lower_graph
from llmc.pipeline.source import limits_of
from llmc.spec import CompileSpec
from llmc.stages import ProgressReporter, StageRunner
from llmc.targets.backend import Backend

if TYPE_CHECKING:
    from llmc.frontend.graph import ModelGraph, SourceModel
    from llmc.schedules.records import Record
    from llmc.schedules.tuned_choice import Tuned
    from llmc.tune.tuner import TuneProgress


def known_records(spec: CompileSpec, backend: Backend, caps: Capabilities) -> list[list[Record]]:
    """Tuning records to choose schedules by: those shipped, then the file of the spec; refused before the long work."""
    from llmc.schedules.tuned_choice import shipped_records
    from llmc.tune.session import check_tunable
    from llmc.tune.sources import records_for_compile

    if spec.tune is not None:
        check_tunable(backend, caps)
    elif spec.records is not None:
        return [shipped_records(), records_for_compile(Path(spec.records), backend, caps)]
    return [shipped_records()]


def tuned_choice(
    backend: Backend, caps: Capabilities, known: list[list[Record]], progress: ProgressReporter | None = None
) -> Tuned:
    """The schedules that the records choose; says which records do not count any more."""
    from llmc.tune.sources import dropped_note, tuned_for

    tuned = tuned_for(backend, caps, known)
    note = dropped_note(tuned)
    if note and progress is not None:
        progress.note(note)
    return tuned


def tune_graph(
    graph: ModelGraph,
    spec: CompileSpec,
    source: SourceModel,
    backend: Backend,
    caps: Capabilities,
    progress: TuneProgress | None,
) -> tuple[list[list[Record]], bool]:
    """Measure schedules for the kernels that the graph will call; the records to choose by, and whether by Ctrl-C."""
    from llmc.schedules.records import read_records
    from llmc.schedules.tuned_choice import shipped_records
    from llmc.tune.extract import kernel_uses
    from llmc.tune.session import tune_kernels
    from llmc.tune.sources import default_database

    assert spec.tune is not None
    step = lower_graph(graph, spec, source, caps, backend.tvm_target(caps), StageRunner(spec))
    limits = limits_of(spec, source)
    database = Path(spec.records) if spec.records else default_database()
    result = tune_kernels(
        kernel_uses(step.module),
        backend,
        caps,
        max_batch=limits.max_batch,
        max_step_tokens=limits.max_step_tokens,
        budget=spec.tune,
        database=database,
        progress=progress,
    )
    return [shipped_records(), read_records(database) if database.exists() else []], result.interrupted
