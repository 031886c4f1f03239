"""The compile pipeline: one CompileSpec in, one artifact out. Reads top to bottom, one line per stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact import TUNING, Manifest
from llmc.evaluate_text import check_text
from llmc.link import require_cxx
from llmc.pipeline.lower import build_module, capture_graph, lower_graph
from llmc.pipeline.manifest import manifest_of
from llmc.pipeline.quality import evaluate_artifact, not_checkable, require_runnable, verify_artifact
from llmc.pipeline.source import spec_of
from llmc.pipeline.tuning import known_records, tune_graph, tuned_choice
from llmc.pipeline.weights import calibrate_source, pack_weights, search_schemes
from llmc.quant.schemes import NONE
from llmc.spec import AUTO, CompileSpec, Verify
from llmc.stages import STAGES, ProgressReporter, StageRunner
from llmc.targets.backend import Built, get
from llmc.writer import ArtifactWriter, check_output

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel
    from llmc.quant.choose import QuantSearch
    from llmc.schedules.tuned_choice import Tuned
    from llmc.tune.tuner import TuneProgress


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
    backend, caps = get(spec.target)
    unchecked = not_checkable(backend, caps, spec)
    if spec.verify is not Verify.OFF and not spec.meta_weights and not unchecked:
        require_runnable(backend, caps)
    if spec.eval_text:
        backend.require_host(caps)
    if stop_after is None:  # before the long work
        require_cxx(caps.triple)
    for text in filter(None, (spec.calib_text, spec.eval_text)):
        check_text(Path(text))
    known = known_records(spec, backend, caps)
    left_out = {
        "tune": spec.tune is None,
        "search": spec.quant != AUTO,
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
        target = backend.tvm_target(caps)
        if spec.quant == AUTO:
            search = runner.run("search", search_schemes, model, spec, runner)
            spec = spec.with_(quant=NONE, quant_rules=search.rules())
        source, graph = runner.run("capture", capture_graph, model, spec)
        if spec.tune is not None:
            known, interrupted = runner.run(
                "tune", tune_graph, graph, spec, source, backend, caps, tune_progress
            )
            if interrupted:  # what was found is in the database
                raise KeyboardInterrupt
        tuned = tuned_choice(backend, caps, known)
        step = runner.run("lower", lower_graph, graph, spec, source, caps, target, runner, tuned)
        del graph
        built = runner.run("build", build_module, step, backend, caps, target, runner)
        made, stream = source, None
        if spec.calibrates():
            made, stream = runner.run("calibrate", calibrate_source, step, source, spec, runner)
        params = runner.run("pack", pack_weights, step, made, writer, runner)
        manifest = manifest_of(spec, source, caps, step, params, built, tuned)
        manifest = runner.run("write", write_files, writer, built, manifest, source, tuned)
        quality = unchecked or runner.run(
            "verify", verify_artifact, writer, source, made, spec, step, params, caps
        )
        if spec.eval_text:
            args = (quality, writer, source, made, stream, spec, params, runner)
            quality = runner.run("evaluate", evaluate_artifact, *args)
        manifest = writer.finish(built.executable, dataclasses.replace(manifest, quality=quality, files={}))
        writer.commit()
        done = output
    return CompileResult(done, manifest if done else None, runner, search)


def write_files(
    writer: ArtifactWriter, built: Built, manifest: Manifest, source: SourceModel, tuned: Tuned
) -> Manifest:
    """Tokenizer files, tuning records, device code, model.so and manifest, into the temporary folder."""
    from llmc.schedules.records import header_line, record_line

    writer.copy_tokenizer(source.folder)
    writer.add_files(built.files)
    if tuned.used:
        text = header_line() + "".join(map(record_line, tuned.used.values()))
        writer.add_files({TUNING: text.encode()})
    return writer.finish(built.executable, manifest)
