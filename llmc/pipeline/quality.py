"""Stages that check the artifact: verify against the source model, evaluate on a text, gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import knobs
from llmc.artifact import ParamEntry, QualityReport, StoredParams
from llmc.caps import Capabilities
from llmc.emulated import EmulatedModel
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

NO_CHECK = QualityReport(mode=Verify.OFF.value, note="not checked against the source model")


def not_checkable(backend: Backend, caps: Capabilities, spec: CompileSpec) -> QualityReport | None:
    """What the manifest says if the artifact cannot be run here and was not meant to; None = it can, or it must.

    Code for a device or for another processor is not meant to run here. An emulator may run the latter all the same.
    """
    crossed = architecture(caps.triple.partition("-")[0]) != architecture()
    if spec.verify is Verify.OFF or not (backend.on_device or (crossed and not knobs.emulator())):
        return None
    lacks = backend.missing(caps)
    if not lacks:
        return None
    note = f"NOT CHECKED against the source model: this machine cannot run {caps.preset} code; {', '.join(lacks)}"
    return QualityReport(mode=Verify.OFF.value, note=note)


def require_runnable(backend: Backend, caps: Capabilities) -> None:
    """Raise unless artifacts for `caps` can be run, here or in an emulator.

    Raises:
        LlmcError: "cannot-run-here".
    """
    if not knobs.emulator():
        backend.require_host(caps)


@contextmanager
def opened(folder: Path, caps: Capabilities) -> Iterator[Model | EmulatedModel]:
    """The artifact, loaded; in the emulator if it is for another processor."""
    from llmc.runtime.model import load

    if knobs.emulator() and architecture(caps.triple.partition("-")[0]) != architecture():
        with EmulatedModel(folder, knobs.emulator()) as model:
            yield model
    else:
        # the files were hashed while they were written
        yield load(folder, check_hashes=False)


def verify_artifact(
    writer: ArtifactWriter,
    source: SourceModel,
    made: SourceModel,
    spec: CompileSpec,
    step: StepModule,
    params: tuple[ParamEntry, ...],
    caps: Capabilities,
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
    from llmc.verify import verify

    stored = StoredParams(writer.folder, params)
    same = quantized_source(made, step.params, params, writer.folder)
    with opened(writer.folder, caps) as model:
        report = verify(
            model,
            same,
            unquantized=None if same is source else source,
            mode=spec.verify,
            dtype=spec.dtype.value if spec.dtype else source.dtype,
            # a debug variant of the graph has no artifact that an emulator could load
            taps_runner=None
            if isinstance(model, EmulatedModel)
            else lambda ids: run_taps(made, spec, ids, stored),
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
