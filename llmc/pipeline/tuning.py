"""Which schedules the kernels get: tuning records, shipped, given or found in this compile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.pipeline.lower import lower_graph
from llmc.pipeline.source import limits_of
from llmc.spec import CompileSpec
from llmc.stages import ProgressReporter, StageRunner
from llmc.targets.backend import Backend, level_here

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel
    from llmc.passes.step_module import LoweredGraph, StepModule
    from llmc.passes.weight_layouts import WeightLayouts
    from llmc.schedules.records import Record
    from llmc.schedules.tuned_choice import Tuned
    from llmc.tune.result import TuneProgress


def known_records(
    spec: CompileSpec, backend: Backend, levels: tuple[Capabilities, ...]
) -> list[list[Record]]:
    """Tuning records to choose schedules by: those shipped, then the file of the spec; refused before the long work.

    Raises:
        LlmcError: there can be no tuning here; the file is corrupt, or has nothing for any of the levels.
    """
    from llmc.schedules.records import RecordFile
    from llmc.schedules.tuned_choice import shipped_records
    from llmc.tune.session import check_tunable
    from llmc.tune.sources import records_for_compile

    if spec.tune is not None:
        check_tunable(backend, level_here(backend, levels) or levels[0])
        RecordFile(_database(spec))
    if spec.tune is not None or spec.records is None:
        return [shipped_records()]
    found: list[Record] = []
    refused: LlmcError | None = None
    for caps in levels:
        try:
            found += records_for_compile(Path(spec.records), backend, caps)
        except LlmcError as e:
            if e.ref != "records-other-machine":
                raise
            refused = refused or e
    if refused is not None and not found:
        raise refused
    return [shipped_records(), found]


def _database(spec: CompileSpec) -> Path:
    """Where the tuner reads and writes."""
    from llmc.tune.sources import default_database

    return Path(spec.records) if spec.records else default_database()


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
    rewritten: LoweredGraph,
    spec: CompileSpec,
    source: SourceModel,
    backend: Backend,
    levels: tuple[Capabilities, ...],
    known: list[list[Record]],
    progress: TuneProgress | None,
) -> tuple[list[list[Record]], bool]:
    """Measure schedules for the kernels that the graph will call; the records to choose by, and whether by Ctrl-C.

    Of several levels it is the one that this machine takes; if that is not the best, weights lie as the best has them.
    """
    from llmc.passes.weight_layouts import WeightLayouts
    from llmc.schedules.records import read_records
    from llmc.schedules.tuned_choice import shipped_records
    from llmc.tune.extract import kernel_uses
    from llmc.tune.session import tune_kernels

    assert spec.tune is not None
    caps = level_here(backend, levels) or levels[0]
    silent = StageRunner(spec)

    def lowered(caps: Capabilities, tuned: Tuned | None, layouts: WeightLayouts | None) -> StepModule:
        target = backend.tvm_target(caps)
        return lower_graph(rewritten, spec, source, caps, target, silent, tuned, layouts)

    layouts = None
    if caps is not levels[0]:
        best = lowered(levels[0], tuned_choice(backend, levels[0], known), None)
        layouts = WeightLayouts((param, param.layout_text) for param in best.params)
    step = lowered(caps, None, layouts)
    limits = limits_of(spec, source)
    database = _database(spec)
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
