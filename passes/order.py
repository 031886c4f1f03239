"""The order of all passes, by phase. Nowhere else is a pass put before or after another."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import tvm
from tvm import relax

from llmc.caps import Capabilities
from llmc.kv_plan import KVPlan
from llmc.passes.absorb_latent import AbsorbLatent
from llmc.passes.cancel_transposes import CancelTransposes
from llmc.passes.estimate_costs import EstimateCosts
from llmc.passes.fold_weights import FoldWeights
from llmc.passes.fuse_add_norm import FuseAddNorm
from llmc.passes.fuse_gate_up import FuseGateUp
from llmc.passes.fuse_latent_heads import FuseLatentHeads
from llmc.passes.fuse_linear_epilogue import FuseLinearEpilogue
from llmc.passes.fuse_norm import FuseNorm
from llmc.passes.fuse_qkv import FuseQKV
from llmc.passes.fuse_rope import FuseRoPE
from llmc.passes.lower_embedding import LowerEmbedding
from llmc.passes.lower_experts import LowerExperts
from llmc.passes.lower_head_linear import LowerHeadLinear
from llmc.passes.lower_linear import LowerLinear
from llmc.passes.lower_norm import LowerNorm
from llmc.passes.lower_top_k import LowerTopK
from llmc.passes.make_step_function import MakeStepFunction
from llmc.passes.quantize_weights import QuantizeWeights
from llmc.passes.raise_activations import RaiseActivations
from llmc.passes.share_coefficients import ShareCoefficients
from llmc.passes.share_tensors import ShareTensors
from llmc.passes.specialize_decode import SpecializeDecode
from llmc.passes.step_module import LoweredGraph, StepModule
from llmc.passes.view_reshapes import ViewReshapes
from llmc.passes.weight_layouts import WeightLayouts
from llmc.passes.widen_logits import WidenLogits
from llmc.schedules.generic import DefaultSchedule
from llmc.schedules.tuned_choice import Tuned

GraphPass = tuple[str, Callable[[LoweredGraph], LoweredGraph]]
StepPass = tuple[str, Callable[[StepModule], StepModule]]


def graph_phase(
    caps: Capabilities,
    quantize: QuantizeWeights | None = None,
    tuned: Tuned | None = None,
    disabled: Collection[str] = (),
    layouts: WeightLayouts | None = None,
) -> list[GraphPass]:
    """On the graph of one sequence, while operators are still recognisable; without the passes in `disabled`."""
    return [*rewrite_phase(quantize, disabled), *kernel_phase(caps, tuned, disabled, layouts)]


def rewrite_phase(quantize: QuantizeWeights | None = None, disabled: Collection[str] = ()) -> list[GraphPass]:
    """The part of graph_phase that is the same for all machines."""
    passes: list[GraphPass] = [
        # before QuantizeWeights: what is absorbed is no linear layer any more
        ("AbsorbLatent", AbsorbLatent()),
        # before the fusions, which join weights of one scheme only
        *([("QuantizeWeights", quantize)] if quantize else []),
        ("CancelTransposes", CancelTransposes()),
        ("ShareCoefficients", ShareCoefficients()),
        # before the fusions that take activations
        ("RaiseActivations", RaiseActivations()),
        # before LowerLinear, which takes the cast of the logits into the head's kernel
        ("WidenLogits", WidenLogits()),
        # gates before q, k, v: in parallel blocks both read one input
        ("FuseGateUp", FuseGateUp()),
        ("FuseQKV", FuseQKV()),
        # residual additions go to a matmul where there is one, else to the norm behind them
        ("FuseLinearEpilogue", FuseLinearEpilogue()),
        ("FuseNorm", FuseNorm()),
        ("FuseAddNorm", FuseAddNorm()),
        # after FuseQKV: heads are read where its matmul wrote them
        ("FuseRoPE", FuseRoPE()),
        ("FuseLatentHeads", FuseLatentHeads()),
    ]
    return [named for named in passes if named[0] not in disabled]


def kernel_phase(
    caps: Capabilities,
    tuned: Tuned | None = None,
    disabled: Collection[str] = (),
    layouts: WeightLayouts | None = None,
) -> list[GraphPass]:
    """The rest of graph_phase: operators become kernels for a machine.

    `tuned` has measured schedules, `layouts` how weights lie that are packed already.
    """
    passes: list[GraphPass] = [
        ("LowerNorm", LowerNorm(caps, tuned)),
        ("LowerLinear", LowerLinear(caps, tuned, layouts)),
        ("LowerExperts", LowerExperts(caps, tuned, layouts)),
        ("LowerHeadLinear", LowerHeadLinear(caps, layouts)),
        ("LowerTopK", LowerTopK(caps)),
        # after LowerLinear: a tied embedding reads the head's packed weight
        ("LowerEmbedding", LowerEmbedding(caps, layouts)),
        # last: what the passes above take of a weight is no arithmetic any more
        ("FoldWeights", FoldWeights()),
    ]
    return [named for named in passes if named[0] not in disabled]


def step_phase(
    caps: Capabilities, target: Any, bounds: dict[str, int], disabled: Collection[str] = ()
) -> list[StepPass]:
    """From ``step`` in Relax operators to ``step`` and ``decode`` calling scheduled kernels.

    SpecializeDecode always runs: it makes ``decode``. Disabled, it leaves the rotation a kernel of its own.
    """
    transform = relax.transform
    passes: list[StepPass] = [
        ("DeadCodeElimination", on_module(transform.DeadCodeElimination(["step"]))),
        # sort and scan have library kernels; they must be taken before LegalizeOps gives them loops
        ("DispatchSortScan", on_module(relax.backend.DispatchSortScan(), target)),
        ("LegalizeOps", on_module(transform.LegalizeOps(), target)),
        ("AnnotateTIROpPattern", on_module(transform.AnnotateTIROpPattern())),
        ("FuseOps", on_module(transform.FuseOps())),
        ("FuseTIR", on_module(transform.FuseTIR())),
        # a scheduled function is not recognised as a reshape any more, and has no blocks to count
        ("ViewReshapes", ViewReshapes()),
        ("EstimateCosts", EstimateCosts()),
        ("DefaultSchedule", on_module(DefaultSchedule(caps), target)),
        # after scheduling, so that both functions share every kernel but attention
        ("SpecializeDecode", SpecializeDecode(caps, fuse="SpecializeDecode" not in disabled)),
        ("BoundSymbols", BoundSymbols(bounds)),
    ]
    always = ("SpecializeDecode",)
    return [named for named in passes if named[0] not in disabled or named[0] in always]


def build_phase() -> list[tuple[str, Any]]:
    """Relax to VM: memory, registers, shapes."""
    transform = relax.transform
    return [
        ("ToNonDataflow", transform.ToNonDataflow()),
        ("RemovePurityChecking", transform.RemovePurityChecking()),
        ("CallTIRRewrite", transform.CallTIRRewrite()),
        ("StaticPlanBlockMemory", transform.StaticPlanBlockMemory()),
        ("LowerAllocTensor", transform.LowerAllocTensor()),
        # what the plan put into one place is one tensor; before its last use is looked for
        ("ShareTensors", ShareTensors()),
        ("KillAfterLastUse", transform.KillAfterLastUse()),
        ("LowerRuntimeBuiltin", transform.LowerRuntimeBuiltin()),
        ("ComputePrimValue", transform.ComputePrimValue()),
        ("TrustWeights", TrustWeights()),
        ("VMShapeLower", transform.VMShapeLower()),
        ("AttachGlobalSymbol", transform.AttachGlobalSymbol()),
    ]


def make_step(
    caps: Capabilities, plan: KVPlan, tuned: Tuned | None = None
) -> Callable[[LoweredGraph], StepModule]:
    """The pass between the two phases."""
    return MakeStepFunction(caps, plan, tuned)


def on_module(fn: Any, target: Any = None) -> Callable[[StepModule], StepModule]:
    """A tvm pass as a pass on StepModule, run under `target` if it asks for one."""

    def run(step: StepModule) -> StepModule:
        if target is None:
            return replace(step, module=fn(step.module))
        with target:
            return replace(step, module=fn(step.module))

    return run


class BoundSymbols:
    """Annotate the step functions with upper bounds of T, B, R, so that memory is planned statically.

    before: step(...)                     after: step(...) {tir_var_upper_bound: {T: 512, B: 16, R: 512}}

    Runs before StaticPlanBlockMemory, which reads the attribute.
    """

    def __init__(self, bounds: dict[str, int]) -> None:
        self.bounds = bounds

    def __call__(self, step: StepModule) -> StepModule:
        module = tvm.IRModule(dict(step.module.functions.items()), attrs=step.module.attrs)
        present = {gvar.name_hint for gvar in module.get_global_vars()}
        for name in [n for n in ("step", "decode") if n in present]:
            func = module[name]
            names = {v.name for v in relax.analysis.defined_symbolic_vars(func)}
            bounds = dict(self.bounds)
            if name == "decode":  # one row and one token per sequence
                bounds.update({k: self.bounds["B"] for k in ("T", "R")})
            bounds = {k: v for k, v in bounds.items() if k in names}
            module.update_func(module.get_global_var(name), func.with_attr("tir_var_upper_bound", bounds))
        return replace(step, module=module)


class TrustWeights:
    """Have a step function check its arguments, but not each of its weights at every step.

    before: step(input_ids, ..., pools, params)           after: step(...) {num_input: 8}

    The runtime checks the weights once, when it loads them: their shapes and types are those of the manifest that this
    very function came with. Two checks per weight and step were a third of all calls of the virtual machine. Runs before
    VMShapeLower, which writes the checks.
    """

    def __call__(self, module: Any) -> Any:
        out = tvm.IRModule(dict(module.functions.items()), attrs=module.attrs)
        for gvar, func in module.functions.items():
            if isinstance(func, relax.Function) and func.params and func.params[-1].name == "params":
                out.update_func(gvar, func.with_attr("num_input", len(func.params) - 1))
        return out
