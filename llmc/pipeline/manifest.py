"""What the artifact says about itself."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import llmc
from llmc.artifact import LIBRARY, SCHEMA, Level, Manifest, ModelInfo, ParamEntry, QualityReport
from llmc.pipeline.levels import CompiledLevel
from llmc.pipeline.source import limits_of
from llmc.spec import CompileSpec
from llmc.writer import created

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel
    from llmc.passes.step_module import StepModule


def manifest_of(
    spec: CompileSpec,
    source: SourceModel,
    best: CompiledLevel,
    lower: tuple[Level, ...],
    params: tuple[ParamEntry, ...],
) -> Manifest:
    """The manifest of an artifact with these levels, not checked yet."""
    import tvm

    def versions() -> dict[str, str]:
        import torch
        import transformers

        return {"torch": torch.__version__, "transformers": transformers.__version__}

    step, level = best.step, best.entry(LIBRARY)
    return Manifest(
        schema=SCHEMA,
        llmc_version=llmc.__version__,
        tvm_version=tvm.__version__,
        created=created(),
        spec=spec.to_json(),
        model=_model_info(source, step),
        target=level.target,
        limits=limits_of(spec, source),
        kv_plan=step.kv_plan,
        functions=level.functions,
        params=params,
        quality=level.quality,
        tuning_records=level.tuning_records,
        tasks=level.tasks,
        versions=versions(),
        device=best.built.device,
        lower_levels=lower,
    )


def with_quality(manifest: Manifest, reports: tuple[QualityReport, ...]) -> Manifest:
    """The manifest with what the check said of each of its levels."""
    lower = zip(manifest.lower_levels, reports[1:], strict=True)
    return dataclasses.replace(
        manifest,
        quality=reports[0],
        lower_levels=tuple(dataclasses.replace(level, quality=report) for level, report in lower),
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
