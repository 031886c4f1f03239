"""The compile pipeline: one CompileSpec in, one artifact out. Reads top to bottom, one line per stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmc
from llmc.artifact import (
    SCHEMA,
    FunctionEntry,
    Limits,
    Manifest,
    ModelInfo,
    ParamEntry,
    QualityReport,
    StoredParams,
    TargetInfo,
)
from llmc.caps import Capabilities
from llmc.errors import LlmcError
from llmc.evaluate_text import check_text
from llmc.quant.schemes import NONE, RTN
from llmc.spec import AUTO, CompileSpec, Verify
from llmc.stages import STAGES, ProgressReporter, StageRunner, run_passes
from llmc.targets.backend import get
from llmc.writer import ArtifactWriter, PackedTensor, check_output, created

if TYPE_CHECKING:
    import numpy as np

    from llmc.frontend.graph import ModelGraph, SourceModel
    from llmc.passes.step_module import StepModule
    from llmc.quant.choose import QuantSearch

NO_CHECK = QualityReport(mode=Verify.OFF.value, note="not checked against the source model")


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
    **fields: Any,
) -> CompileResult:
    """Compile `model` into an artifact folder.

    Args:
        model: Hugging Face folder or hub id, ``.pt2`` file, ``torch.nn.Module`` or ``torch.export.ExportedProgram``.
        output: folder to write; an artifact that is there is replaced when the new one is whole.
        spec: everything else; or give its fields by name (``target="cpu", dtype="bf16"``).
        dump_ir, time_passes, stop_after, progress: see llmc.stages.StageRunner.

    Raises:
        LlmcError: bad input, or the artifact does not compute what the model does; nothing is left behind.
    """
    spec = _spec_of(model, spec, fields)
    output = Path(output).expanduser()
    check_output(output)
    backend, caps = get(spec.target)
    if (spec.verify is not Verify.OFF and not spec.meta_weights) or spec.eval_text:
        backend.require_host(caps)
    for text in filter(None, (spec.calib_text, spec.eval_text)):
        check_text(Path(text))
    left_out = {
        "search": spec.quant != AUTO,
        "calibrate": spec.quant_method == RTN,
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
            search = runner.run("search", _search, model, spec, runner)
            spec = spec.with_(quant=NONE, quant_rules=search.rules())
        source, graph = runner.run("capture", _capture, model, spec)
        step = runner.run("lower", _lower, graph, spec, source, caps, target, runner)
        del graph
        executable = runner.run("build", _build, step, target, runner)
        made = source
        if spec.quant_method != RTN:
            made = runner.run("calibrate", _calibrate, step, source, spec, runner)
        params = runner.run("pack", _pack, step, made, writer, runner)
        manifest = _manifest(spec, source, caps, step, params)
        manifest = runner.run("write", _write, writer, executable, manifest, source)
        quality = runner.run("verify", _verify, writer, source, made, spec, step, params)
        if spec.eval_text:
            quality = runner.run("evaluate", _evaluate, quality, writer, source, made, spec, params, runner)
        manifest = writer.finish(executable, dataclasses.replace(manifest, quality=quality, files={}))
        writer.commit()
        done = output
    return CompileResult(done, manifest if done else None, runner, search)


def run_taps(
    source: SourceModel, spec: CompileSpec, token_ids: Sequence[int], stored: StoredParams | None = None
) -> Mapping[str, np.ndarray]:
    """Hidden states after each decoder layer, computed by a debug variant of the compiled graph.

    Args:
        source: the opened model, with weights.
        spec: target and dtypes of the artifact under suspicion.
        token_ids: n tokens of one sequence.
        stored: the artifact's weights, which are then mapped instead of packed once more.

    Returns:
        module path of each layer -> float32 [n, d].
    """
    from llmc.debug_taps import run

    return run(source, spec, token_ids, stored)


def _spec_of(model: Any, spec: CompileSpec | None, fields: Mapping[str, Any]) -> CompileSpec:
    name = str(model) if isinstance(model, (str, Path)) else "<python object>"
    if spec is None:
        return CompileSpec.from_json({"model": name, **fields})
    return spec.with_(model=name, **fields) if fields or spec.model != name else spec


def _open(model: Any, spec: CompileSpec) -> SourceModel:
    """Open the model: its structure only; weights are read when they are needed."""
    from llmc.frontend.checkpoint import open_model

    return open_model(
        model if not isinstance(model, Path) else str(model),
        dtype=spec.dtype,
        revision=spec.revision,
        meta_weights=spec.meta_weights,
    )


def _search(model: Any, spec: CompileSpec, runner: StageRunner) -> QuantSearch:
    """Choose a scheme for each weight by measuring with torch."""
    from llmc.evaluate_text import FolderTokenizer, cut_text
    from llmc.quant.choose import choose

    assert spec.eval_text is not None and spec.max_ppl_increase is not None
    source = _open(model, spec)
    tokenizer = FolderTokenizer(source.folder, source.name)
    limit = _limits(spec, source).max_seq_len
    windows = cut_text(tokenizer, Path(spec.eval_text), limit, max_tokens=spec.eval_tokens)
    probe = None
    if spec.calib_text:
        probe = cut_text(tokenizer, Path(spec.calib_text), limit, max_tokens=len(windows[0].ids))[0]
    return choose(
        source,
        windows,
        max_increase_percent=spec.max_ppl_increase,
        fixed=spec.rules(),
        probe=probe,
        dtype=spec.dtype.value if spec.dtype else None,
        uniform=True,
        progress=runner.progress.advance,
    )


def _capture(model: Any, spec: CompileSpec, *, taps: bool = False) -> tuple[SourceModel, ModelGraph]:
    """Open the model and bring it into Relax."""
    from llmc.frontend.capture import capture

    source = _open(model, spec)
    _check_tokens(spec, source)
    return source, capture(source, taps=taps, max_seq_len=spec.max_seq_len)


def _check_tokens(spec: CompileSpec, source: SourceModel) -> None:
    """Refuse texts that have too few tokens before the long work."""
    if spec.calib_text and spec.quant_method != RTN:
        from llmc.quant.corpus import calibration_sequences
        from llmc.quant.methods import Calibration

        c = Calibration(spec.quant_method, Path(spec.calib_text))
        length = min(c.length, source.max_seq_len)
        calibration_sequences(source, c.text, sequences=c.sequences, length=length, seed=c.seed)
    if spec.eval_text:
        from llmc.evaluate_text import FolderTokenizer, cut_text

        limit = _limits(spec, source).max_seq_len
        tokenizer = FolderTokenizer(source.folder, source.name)
        cut_text(tokenizer, Path(spec.eval_text), limit, max_tokens=spec.eval_tokens)


def _lower(
    graph: ModelGraph,
    spec: CompileSpec,
    source: SourceModel,
    caps: Capabilities,
    target: Any,
    runner: StageRunner,
) -> StepModule:
    """Graph passes, KV plan, step functions, schedules."""
    from llmc.passes import order
    from llmc.passes.plan_kv_cache import PlanKVCache
    from llmc.passes.quantize_weights import QuantizeWeights
    from llmc.passes.step_module import LoweredGraph
    from llmc.quant.stored import stored_schemes

    limits = _limits(spec, source)
    plan_cache = PlanKVCache(
        page_size=spec.page_size,
        kv_dtype=spec.kv_dtype.value if spec.kv_dtype else None,
        max_seq_len=limits.max_seq_len,
    )
    start = LoweredGraph.from_model(graph)
    quantize = QuantizeWeights.of(spec, stored_schemes(source.weights))
    lowered = run_passes(runner, "lower", order.graph_phase(caps, quantize), start)
    plan = plan_cache(lowered)
    step = runner.run_pass("lower", "MakeStepFunction", order.make_step(caps, plan), lowered)
    bounds = {"T": limits.max_step_tokens, "B": limits.max_batch, "R": limits.max_step_tokens}
    return run_passes(runner, "lower", order.step_phase(caps, target, bounds), step)


def _build(step: StepModule, target: Any, runner: StageRunner) -> Any:
    """Relax VM bytecode and machine code."""
    from llmc.passes import order
    from llmc.targets.codegen import build_executable

    module = step.module
    with target:
        module = run_passes(runner, "build", order.build_phase(), module)
    return runner.run_pass("build", "codegen", lambda m: build_executable(m, target), module)


def _calibrate(step: StepModule, source: SourceModel, spec: CompileSpec, runner: StageRunner) -> SourceModel:
    """The source with the weights that the graph wants quantized, quantized by a calibrated method."""
    from llmc.quant.methods import Calibration, calibrated
    from llmc.schedules.qlayout import QuantLayout

    assert spec.calib_text is not None
    plan = {
        name: QuantLayout.parse(param.layout).of
        for param in step.params
        if QuantLayout.is_layout(param.layout)
        for name in param.sources
    }
    made, found = calibrated(
        source,
        plan,
        Calibration(spec.quant_method, Path(spec.calib_text)),
        progress=lambda done, total: runner.progress.advance(done, total, "layers"),
    )
    for note in found.notes:
        runner.progress.note(note)
    return made


def _pack(
    step: StepModule, source: SourceModel, writer: ArtifactWriter, runner: StageRunner
) -> tuple[ParamEntry, ...]:
    """Stream the weights into the artifact's shards."""
    from llmc.packing import packed_tensors
    from llmc.quant.stored import SourceQuantizer

    tensors = [PackedTensor(p.name, p.shape, p.dtype, p.layout_text, p.sources) for p in step.params]
    if source.weights is None:  # --meta-weights: the graph alone
        return ()
    total = sum(t.nbytes for t in tensors)
    done = 0
    with writer.shards(tensors) as shards:
        for param, data in packed_tensors(step.params, source.weights, SourceQuantizer(source.weights)):
            shards.write(param.name, data)
            done += data.nbytes
            runner.progress.advance(done, total, param.name)
    return tuple(shards.entries)


def _write(writer: ArtifactWriter, executable: Any, manifest: Manifest, source: SourceModel) -> Manifest:
    """Tokenizer files, model.so and manifest, into the temporary folder."""
    writer.copy_tokenizer(source.folder)
    return writer.finish(executable, manifest)


def _verify(
    writer: ArtifactWriter,
    source: SourceModel,
    made: SourceModel,
    spec: CompileSpec,
    step: StepModule,
    params: tuple[ParamEntry, ...],
) -> QualityReport:
    """Compare the artifact with the source model in float32; raises if it is off.

    A quantized artifact is compared with the source model that has the artifact's weights: a kernel's error is not
    hidden by that of quantization. How far it is from the source itself is reported.
    """
    if spec.verify is Verify.OFF:
        return NO_CHECK
    if source.weights is None:
        return dataclasses.replace(NO_CHECK, note="no weights, nothing to check")
    from llmc.quantized_source import quantized_source
    from llmc.runtime.model import load
    from llmc.verify import verify

    stored = StoredParams(writer.folder, params)
    # the files were hashed while they were written
    model = load(writer.folder, check_hashes=False)
    same = quantized_source(made, step.params, params, writer.folder)
    report = verify(
        model,
        same,
        unquantized=None if same is source else source,
        mode=spec.verify,
        dtype=spec.dtype.value if spec.dtype else source.dtype,
        taps_runner=lambda ids: run_taps(made, spec, ids, stored),
    )
    # how long it took differs from run to run, and the artifact's bytes may not
    return dataclasses.replace(report, seconds=None)


def _evaluate(
    quality: QualityReport,
    writer: ArtifactWriter,
    source: SourceModel,
    made: SourceModel,
    spec: CompileSpec,
    params: tuple[ParamEntry, ...],
    runner: StageRunner,
) -> QualityReport:
    """Compare the artifact with the source model on a text; raises if it is worse than the spec allows."""
    from llmc.gate import check_gate, text_quality
    from llmc.runtime.model import load

    # the files were hashed while they were written
    model = load(writer.folder, check_hashes=False)
    stored = StoredParams(writer.folder, params)
    text = text_quality(
        model,
        source,
        spec,
        taps_runner=lambda ids: run_taps(made, spec, ids, stored),
        progress=runner.progress.advance,
    )
    check_gate(text, max_kl=spec.max_kl, max_ppl_increase=spec.max_ppl_increase)
    return dataclasses.replace(quality, text=text)


def _limits(spec: CompileSpec, source: SourceModel) -> Limits:
    """Bounds of the symbolic sizes; a sequence may not be longer than the model was made for."""
    longest = spec.max_seq_len or source.max_seq_len
    if longest > source.max_seq_len:
        raise LlmcError(
            "max-seq-len",
            f"{source.name} handles at most {source.max_seq_len} tokens; max_seq_len is {longest}.",
            hint=f"Use --max-seq-len {source.max_seq_len} or less.",
        )
    return Limits(longest, spec.max_batch, min(spec.max_step_tokens, max(longest, spec.max_batch)))


def _manifest(
    spec: CompileSpec,
    source: SourceModel,
    caps: Capabilities,
    step: StepModule,
    params: tuple[ParamEntry, ...],
) -> Manifest:
    import tvm

    def versions() -> dict[str, str]:
        import torch
        import transformers

        return {"torch": torch.__version__, "transformers": transformers.__version__}

    functions = tuple(FunctionEntry(name, step.inputs, (step.output,)) for name in ("step", "decode"))
    return Manifest(
        schema=SCHEMA,
        llmc_version=llmc.__version__,
        tvm_version=tvm.__version__,
        created=created(),
        spec=spec.to_json(),
        model=_model_info(source, step),
        target=TargetInfo(caps.target, caps.preset, caps.triple, caps.mcpu, caps.features),
        limits=_limits(spec, source),
        kv_plan=step.kv_plan,
        functions=functions,
        params=params,
        quality=NO_CHECK,
        versions=versions(),
    )


def _model_info(source: SourceModel, step: StepModule) -> ModelInfo:
    config = source.config
    eos = config.get("eos_token_id")
    bos = config.get("bos_token_id")
    architectures = config.get("architectures")
    name = (
        architectures[0]
        if isinstance(architectures, list) and architectures
        else type(source.module).__name__
    )
    return ModelInfo(
        source=source.name,
        architecture=str(name),
        model_type=source.model_type,
        vocab_size=int(step.output.shape[-1]),
        layers=sum(len(g.layers) for g in step.kv_plan.groups) + len(step.kv_plan.shared),
        parameters=_count(source),
        dtype=source.dtype,
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,) if isinstance(eos, int) else (),
    )


def _count(source: SourceModel) -> int:
    """Number of weights of the source, tied ones once."""
    return sum(p.numel() for p in dict.fromkeys(source.module.parameters()))
