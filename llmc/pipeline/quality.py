"""Stages that check the artifact: verify against the source model, evaluate on a text, gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import knobs
from llmc.artifact import Level, Manifest, ParamEntry, QualityReport, StoredParams
from llmc.caps import Capabilities
from llmc.emulated import EmulatedModel
from llmc.errors import LlmcError
from llmc.host import architecture
from llmc.spec import CompileSpec, Verify
from llmc.stages import StageRunner
from llmc.targets.backend import Backend
from llmc.writer import ArtifactWriter

if TYPE_CHECKING:
    import numpy as np

    from llmc.frontend.graph import SourceModel
    from llmc.passes.step_module import StepModule
    from llmc.quant.orthogonal import Rotation
    from llmc.runtime.model import Model
    from llmc.verify import Reference

NO_CHECK = QualityReport(mode=Verify.OFF.value, note="not checked against the source model")


def not_checkable(
    backend: Backend, levels: tuple[Capabilities, ...], spec: CompileSpec
) -> dict[str, QualityReport]:
    """Preset -> what the manifest says of a level that can be run neither here nor in an emulator.

    Code for a device or for another processor is not meant to run here.

    Raises:
        LlmcError: none of the levels can be run, and they are meant to, or a text is to be evaluated; with what the
            lowest one needs.
    """
    needed = spec.verify is not Verify.OFF and not spec.meta_weights
    elsewhere = backend.on_device or all(_crossed(caps.triple) for caps in levels)
    lacking = {caps.preset: backend.missing(caps) for caps in levels}
    if all(lacking.values()) and spec.eval_text:
        backend.require_host(levels[-1])
    found = {}
    for caps in levels:
        if lacking[caps.preset] and not _emulated(caps.triple):
            note = (
                f"NOT CHECKED against the source model: this machine cannot run {caps.preset} code; "
                + ("" if backend.on_device else "it lacks ")
                + ", ".join(lacking[caps.preset])
            )
            found[caps.preset] = QualityReport(mode=Verify.OFF.value, note=note)
    if len(found) == len(levels) and needed and not elsewhere:
        backend.require_host(levels[-1])
    return found if needed else {}


def _crossed(triple: str) -> bool:
    """Whether code is for another kind of processor than this machine's."""
    return architecture(triple.partition("-")[0]) != architecture()


def _emulated(triple: str) -> bool:
    return bool(knobs.emulator()) and _crossed(triple)


@contextmanager
def opened(folder: Path, triple: str, level: str) -> Iterator[Model | EmulatedModel]:
    """A level of the artifact, loaded; in the emulator if it is for another processor."""
    from llmc.runtime.model import load

    if _emulated(triple):
        with EmulatedModel(folder, knobs.emulator()) as model:
            yield model
    else:
        # the files were hashed while they were written
        yield load(folder, check_hashes=False, level=level)


def require_runnable(backend: Backend, caps: Capabilities) -> None:
    """Raise unless artifacts for `caps` can be run, here or in an emulator.

    Raises:
        LlmcError: "cannot-run-here".
    """
    if not knobs.emulator():
        backend.require_host(caps)


def verify_artifact(
    writer: ArtifactWriter,
    source: SourceModel,
    made: SourceModel,
    spec: CompileSpec,
    step: StepModule,
    manifest: Manifest,
    skipped: Mapping[str, QualityReport],
) -> tuple[QualityReport, ...]:
    """Compare each level of the artifact with the source model in float32; raises if one is off.

    A quantized artifact is compared with the source model that has the artifact's weights: a kernel's error is not
    hidden by that of quantization. How far it is from the source itself is reported.

    Args:
        skipped: preset -> report of a level that cannot be run.
    """
    if spec.verify is Verify.OFF:
        return (NO_CHECK,) * len(manifest.levels)
    if source.weights is None:
        return (dataclasses.replace(NO_CHECK, note="no weights, nothing to check"),) * len(manifest.levels)
    from llmc.quantized_source import quantized_source

    same = quantized_source(made, step.params, manifest.params, writer.folder)
    reference = _remembering_reference()
    return tuple(
        skipped.get(level.target.preset)
        or _verify_level(writer, source, made, same, spec, manifest, level, reference)
        for level in manifest.levels
    )


def _verify_level(
    writer: ArtifactWriter,
    source: SourceModel,
    made: SourceModel,
    same: SourceModel,
    spec: CompileSpec,
    manifest: Manifest,
    level: Level,
    reference: Reference,
) -> QualityReport:
    from llmc.verify import verify

    stored = StoredParams(writer.folder, manifest.params)
    of_level = spec.with_(target=level.target.preset)
    try:
        with opened(writer.folder, level.target.triple, level.name) as model:
            # a debug variant of the graph has no artifact that an emulator could load
            taps = None
            if not isinstance(model, EmulatedModel):
                taps = lambda ids: run_taps(made, of_level, ids, stored)  # noqa: E731
            report = verify(
                model,
                same,
                unquantized=None if same is source else source,
                mode=spec.verify,
                dtype=spec.dtype.value if spec.dtype else source.dtype,
                taps_runner=taps,
                reference=reference,
            )
    except LlmcError as e:
        if not manifest.lower_levels:
            raise
        message = f"The level {level.name} failed its check: {e.message}"
        raise LlmcError(e.ref, message, hint=e.hint, context=e.context) from None
    # how long it took differs from run to run, and the artifact's bytes may not
    return dataclasses.replace(report, seconds=None)


def _remembering_reference() -> Reference:
    """reference_logits that runs the source once for all levels: they are asked the same."""
    from llmc.reference import ReferenceResult, reference_logits

    found: dict[object, ReferenceResult] = {}

    def run(source: SourceModel, ids: Sequence[int], dtype: str, **options: Any) -> ReferenceResult:
        key = (id(source), tuple(ids), dtype, tuple(sorted(options.items())))
        if key not in found:
            found[key] = reference_logits(source, ids, dtype, **options)
        return found[key]

    return run


def evaluate_artifact(
    quality: QualityReport,
    writer: ArtifactWriter,
    source: SourceModel,
    made: SourceModel,
    stream: Rotation | None,
    spec: CompileSpec,
    params: tuple[ParamEntry, ...],
    runner: StageRunner,
    level: str,
) -> QualityReport:
    """Compare a level of the artifact with the source model on a text; raises if it is worse than the spec allows."""
    from llmc.gate import check_gate, text_quality
    from llmc.runtime.model import load

    # the files were hashed while they were written
    model = load(writer.folder, check_hashes=False, level=level)
    stored = StoredParams(writer.folder, params)

    of_level = spec.with_(target=f"{spec.target.partition('/')[0]}/{level}")

    def taps(ids: Sequence[int]) -> Mapping[str, np.ndarray]:
        found = run_taps(made, of_level, ids, stored)
        return found if stream is None else {path: stream.undone(x) for path, x in found.items()}

    text = text_quality(
        model,
        source,
        spec,
        taps_runner=taps,
        progress=runner.progress.advance,
    )
    check_gate(text, max_kl=spec.max_kl, max_ppl_increase=spec.max_ppl_increase)
    return dataclasses.replace(quality, text=text)


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
