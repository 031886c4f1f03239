"""Lowering of kernels that have blocks and threads, up to what the device's source is generated from.

TVM's own pipeline inserts barriers where its analysis sees conflicts in shared memory. Ours does not: kernels write
their barriers, and the simulator (llmc/simulate), which runs the result of `lower`, proves that none is missing.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx import compilation_pipeline

PIPELINE = "llmc_simt"


def _lowering() -> list[Any]:
    """Blocks to flat buffers and vectors; the thread bindings stay."""
    s, t = s_tir.transform, tirx.transform
    return [
        s.CanonicalizeLoop(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.LiftThreadBinding(),
        # without CompactBufferAllocation: it takes an address of an element for the use of that element alone, and
        # makes buffers that copies and ldmatrix go to by address too small
        s.UnifyThreadBinding(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.BF16ComputeLegalize(),
        t.NarrowDataType(32),
        t.VectorizeLoop(True),
        t.UnrollLoop(),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        t.CommonSubexprElim(),
        t.FP8ComputeLegalize(),
        t.VerifyMemory(),
        t.AnnotateEntryFunc(),
    ]


def _splitting() -> list[Any]:
    """Kernels apart from the host code that launches them."""
    t = tirx.transform
    return [t.SplitHostDevice(), t.MakePackedAPI(), t.FP8StorageLegalize(), t.BF16StorageLegalize()]


def lower(module: Any, target: Any) -> Any:
    """The module's PrimFuncs as the code generator sees them, before kernels are split from their launches.

    Args:
        module: IRModule of scheduled PrimFuncs.
        target: a target with threads, and with a host.
    """
    module = tirx.transform.BindTarget(target)(module)
    return tvm.ir.transform.Sequential(_lowering())(module)


def register() -> str:
    """Make the pipeline known to tvm's build under the returned name."""

    def pipeline() -> tuple[Any, Any, Any]:
        whole = tvm.ir.transform.Sequential([*_lowering(), *_splitting()])
        return (
            whole,
            compilation_pipeline.finalize_host_passes,
            compilation_pipeline.finalize_device_passes,
        )

    compilation_pipeline.register_tir_pipeline(PIPELINE, pipeline)
    return PIPELINE
