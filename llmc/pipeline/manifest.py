"""What the artifact says about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import llmc
from llmc.artifact import SCHEMA, FunctionEntry, Manifest, ModelInfo, ParamEntry, TargetInfo
from llmc.caps import Capabilities
from llmc.pipeline.quality import NO_CHECK
from llmc.pipeline.source import limits_of
from llmc.spec import CompileSpec
from llmc.targets.backend import Built
from llmc.writer import created

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel
    from llmc.passes.step_module import StepModule
    from llmc.schedules.tuned_choice import Tuned


def manifest_of(
    spec: CompileSpec,
    source: SourceModel,
    caps: Capabilities,
    step: StepModule,
    params: tuple[ParamEntry, ...],
    built: Built,
    tuned: Tuned,
) -> Manifest:
    import tvm

    from llmc.passes.count_kernels import CountKernels
    from llmc.tune.extract import kernel_uses

    def versions() -> dict[str, str]:
        import torch
        import transformers

        return {"torch": torch.__version__, "transformers": transformers.__version__}

    kernels = CountKernels()(step)
    functions = tuple(FunctionEntry(n, step.inputs, (step.output,), kernels[n]) for n in ("step", "decode"))
    return Manifest(
        schema=SCHEMA,
        llmc_version=llmc.__version__,
        tvm_version=tvm.__version__,
        created=created(),
        spec=spec.to_json(),
        model=_model_info(source, step),
        target=TargetInfo(caps.target, caps.preset, caps.triple, caps.mcpu, caps.features),
        limits=limits_of(spec, source),
        kv_plan=step.kv_plan,
        functions=functions,
        params=params,
        quality=NO_CHECK,
        tuning_records=tuple(record.to_json() for record in tuned.used.values()),
        tasks=tuple(use.to_json() for use in kernel_uses(step.module)),
        versions=versions(),
        device=built.device,
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
