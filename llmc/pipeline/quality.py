"""Stages that check the artifact: verify against the source model, evaluate on a text, gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmc.artifact import ParamEntry, QualityReport, StoredParams
from llmc.caps import Capabilities
from llmc.spec import CompileSpec, Verify
from llmc.stages import StageRunner
from llmc.targets.backend import Backend
from llmc.writer import ArtifactWriter

if TYPE_CHECKING:
    import numpy as np

    from llmc.frontend.graph import SourceModel
    from llmc.passes.step_module import StepModule
    from llmc.quant.orthogonal import Rotation

NO_CHECK = QualityReport(mode=Verify.OFF.value, note="not checked against the source model")


def not_checkable(backend: Backend, caps: Capabilities, spec: CompileSpec) -> QualityReport | None:
    """What the manifest says if the artifact cannot be run here and its target allows for that; None = it can."""
    if not backend.on_device or spec.verify is Verify.OFF:
        return None
    lacks = backend.missing(caps)
    if not lacks:
        return None
    note = f"NOT CHECKED against the source model: this machine cannot run {caps.preset} code; {', '.join(lacks)}"
    return QualityReport(mode=Verify.OFF.value, note=note)


def verify_artifact(
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


def evaluate_artifact(
    quality: QualityReport,
    writer: ArtifactWriter,
    source: SourceModel,
    made: SourceModel,
    stream: Rotation | None,
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

    def taps(ids: Sequence[int]) -> Mapping[str, np.ndarray]:
        found = run_taps(made, spec, ids, stored)
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
