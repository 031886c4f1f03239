"""The compile pipeline: one CompileSpec in, one artifact out. Reads top to bottom, one line per stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact import TUNING, Manifest
from llmc.evaluate_text import check_text
from llmc.link import require_cxx
from llmc.pipeline.levels import LevelCompiler
from llmc.pipeline.lower import capture_graph, rewrite_graph
from llmc.pipeline.manifest import manifest_of, with_quality
from llmc.pipeline.quality import evaluate_artifact, not_checkable, verify_artifact
from llmc.pipeline.source import spec_of
from llmc.pipeline.tuning import known_records, tune_graph
from llmc.pipeline.weights import calibrate_source, pack_weights, search_schemes
from llmc.quant.schemes import NONE
from llmc.spec import CompileSpec
from llmc.stages import STAGES, ProgressReporter, StageRunner
from llmc.targets.backend import Built, get_levels, level_here
from llmc.writer import ArtifactWriter, check_output

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel
    from llmc.quant.choose import QuantSearch
    from llmc.schedules.records import Record
    from llmc.tune.result import TuneProgress


@dataclass(frozen=True)
class CompileResult:
    """What a compile made.

    Attributes:
        output: the artifact's folder; None if the compile stopped before writing it.
        manifest: as written.
        runner: timings of the stages.
        search: what ``quant = auto`` found.
    """

    output: Path | None
    manifest: Manifest | None
    runner: StageRunner
    search: QuantSearch | None = None


def compile_model(
    model: Any,
    output: str | Path,
    *,
    spec: CompileSpec | None = None,
    dump_ir: str | Path | None = None,
    time_passes: bool = False,
    stop_after: str | None = None,
    progress: ProgressReporter | None = None,
    tune_progress: TuneProgress | None = None,
    **fields: Any,
) -> CompileResult:
    """Compile `model` into an artifact folder.

    Args:
        model: Hugging Face folder or hub id, ``.pt2`` file, ``torch.nn.Module`` or ``torch.export.ExportedProgram``.
        output: folder to write; an artifact that is there is replaced when the new one is whole.
        spec: everything else; or give its fields by name (``target="cpu", dtype="bf16"``).
        dump_ir, time_passes, stop_after, progress: see llmc.stages.StageRunner.
        tune_progress: is told what the tuner does (``tune="10m"``).

    Raises:
        LlmcError: bad input, or the artifact does not compute what the model does; nothing is left behind.
    """
    spec = spec_of(model, spec, fields)
    output = Path(output).expanduser()
    check_output(output)
    backend, levels = get_levels(spec.target)
    unchecked = not_checkable(backend, levels, spec)
    if stop_after is None:  # before the long work
        require_cxx(levels[0].triple)
    for text in filter(None, (spec.calib_text, spec.eval_text)):
        check_text(Path(text))
    known = known_records(spec, backend, levels)
    left_out = {
        "tune": spec.tune is None,
        "search": not spec.searches,
        "calibrate": not spec.calibrates(),
        "evaluate": not spec.eval_text,
    }
    runner = StageRunner(
        spec,
        stages=tuple(stage for stage in STAGES if not left_out.get(stage)),
        dump_ir=Path(dump_ir) if dump_ir else None,
        time_passes=time_passes,
        stop_after=stop_after,
        progress=progress,
    )
    manifest: Manifest | None = None
    done: Path | None = None
    search: QuantSearch | None = None
    with runner, ArtifactWriter(output) as writer:
        if spec.searches:
            search = runner.run("search", search_schemes, model, spec, runner)
            spec = spec.with_(quant=NONE, quant_rules=search.rules())
        source, graph = runner.run("capture", capture_graph, model, spec)
        rewritten = runner.run("rewrite", rewrite_graph, graph, spec, source, runner)
        del graph
        if spec.tune is not None:
            args = (rewritten, spec, source, backend, levels, known, tune_progress)
            known, interrupted = runner.run("tune", tune_graph, *args)
            if interrupted:  # what was found is in the database
                raise KeyboardInterrupt
        compiler = LevelCompiler(rewritten, spec, source, backend, known, runner)
        best = compiler.compile(levels[0])
        lower, used = compiler.compile_lower(levels[1:], best, writer)
        del rewritten, compiler
        made, stream = source, None
        if spec.calibrates():
            made, stream = runner.run("calibrate", calibrate_source, best.step, source, spec, runner)
        params = runner.run("pack", pack_weights, best.step, made, writer, runner)
        manifest = manifest_of(spec, source, best, lower, params)
        manifest = runner.run("write", write_files, writer, best.built, manifest, source, used)
        check = (writer, source, made, spec, best.step, manifest, unchecked)
        reports = runner.run("verify", verify_artifact, *check)
        if spec.eval_text:
            ran = level_here(backend, levels) or levels[0]
            at = levels.index(ran)
            on_text = (writer, source, made, stream, spec, params, runner, manifest.levels[at].name)
            report = runner.run("evaluate", evaluate_artifact, reports[at], *on_text)
            reports = (*reports[:at], report, *reports[at + 1 :])
        manifest = dataclasses.replace(with_quality(manifest, reports), files={})
        manifest = writer.finish(best.built.executable, manifest)
        writer.commit()
        done = output
    return CompileResult(done, manifest if done else None, runner, search)


def write_files(
    writer: ArtifactWriter, built: Built, manifest: Manifest, source: SourceModel, used: Mapping[str, Record]
) -> Manifest:
    """Tokenizer files, tuning records, device code, model.so and manifest, into the temporary folder."""
    from llmc.schedules.records import header_line, record_line

    writer.copy_tokenizer(source.folder)
    writer.add_files(built.files)
    if used:
        text = header_line() + "".join(map(record_line, used.values()))
        writer.add_files({TUNING: text.encode()})
    return writer.finish(built.executable, manifest)
