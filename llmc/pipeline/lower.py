"""Stages from the opened model to machine code: capture, lower, build."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.caps import Capabilities
from llmc.pipeline.notes import fp8_note, unrounded_note
from llmc.pipeline.source import check_tokens, limits_of, open_source
from llmc.quant.schemes import rotates
from llmc.spec import CompileSpec
from llmc.stages import StageRunner, run_passes
from llmc.targets.backend import Backend, Built, get

if TYPE_CHECKING:
    from llmc.frontend.graph import ModelGraph, SourceModel
    from llmc.passes.step_module import LoweredGraph, StepModule
    from llmc.passes.weight_layouts import WeightLayouts
    from llmc.schedules.tuned_choice import Tuned


def capture_graph(model: Any, spec: CompileSpec, *, taps: bool = False) -> tuple[SourceModel, ModelGraph]:
    """Open the model and bring it into Relax."""
    from llmc.frontend.capture import capture
    from llmc.frontend.low_rank import low_rank
    from llmc.frontend.untie import untied

    source = open_source(model, spec)
    check_tokens(spec, source)
    if rotates(spec.quant_method):
        source = untied(source)
    rule = spec.rank_rule()
    shaped = source if rule is None else low_rank(source, rule)[0]
    return source, capture(shaped, taps=taps, max_seq_len=spec.max_seq_len)


def rewrite_graph(
    graph: ModelGraph, spec: CompileSpec, source: SourceModel, runner: StageRunner
) -> LoweredGraph:
    """Graph passes that are the same for all machines."""
    from llmc.passes import order
    from llmc.passes.quantize_weights import QuantizeWeights
    from llmc.passes.step_module import LoweredGraph
    from llmc.quant.stored import stored_schemes

    quantize = QuantizeWeights.of(spec, stored_schemes(source.weights), untied=bool(source.untied))
    phase = order.rewrite_phase(quantize, spec.disable_passes)
    rewritten = run_passes(runner, "rewrite", phase, LoweredGraph.from_model(graph))
    if note := unrounded_note(source.weights, rewritten.params):
        runner.progress.note(note)
    return rewritten


def lower_graph(
    rewritten: LoweredGraph,
    spec: CompileSpec,
    source: SourceModel,
    caps: Capabilities,
    target: Any,
    runner: StageRunner,
    tuned: Tuned | None = None,
    layouts: WeightLayouts | None = None,
) -> StepModule:
    """Kernels for a machine, KV plan, step functions, schedules; weights that are packed already lie by `layouts`."""
    from llmc.passes import order
    from llmc.passes.plan_kv_cache import PlanKVCache

    limits = limits_of(spec, source)
    plan_cache = PlanKVCache(
        page_size=spec.page_size,
        kv_dtype=spec.kv_dtype.value if spec.kv_dtype else None,
        max_seq_len=limits.max_seq_len,
    )
    phase = order.kernel_phase(caps, tuned, spec.disable_passes, layouts)
    lowered = run_passes(runner, "lower", phase, rewritten)
    plan = plan_cache(lowered)
    if note := fp8_note(lowered.params, caps):
        runner.progress.note(note)
    step = runner.run_pass("lower", "MakeStepFunction", order.make_step(caps, plan, tuned), lowered)
    bounds = {"T": limits.max_step_tokens, "B": limits.max_batch, "R": limits.max_step_tokens}
    return run_passes(runner, "lower", order.step_phase(caps, target, bounds, spec.disable_passes), step)


def build_module(
    step: StepModule, backend: Backend, caps: Capabilities, target: Any, runner: StageRunner
) -> Built:
    """Relax VM bytecode and machine code."""
    from llmc.passes import order

    module = step.module
    with target:
        module = run_passes(runner, "build", order.build_phase(), module)
    return runner.run_pass("build", "codegen", lambda m: backend.build(m, target, caps), module)


def lower_model(model: Any, spec: CompileSpec) -> tuple[SourceModel, StepModule, Capabilities]:
    """The scheduled step functions of a model, before code generation, for debugging tools.

    Raises:
        LlmcError: as compile_model does up to that stage.
    """
    backend, caps = get(spec.target)
    runner = StageRunner(spec, stages=("capture", "rewrite", "lower"))
    source, graph = capture_graph(model, spec)
    rewritten = rewrite_graph(graph, spec, source, runner)
    return source, lower_graph(rewritten, spec, source, caps, backend.tvm_target(caps), runner), caps
