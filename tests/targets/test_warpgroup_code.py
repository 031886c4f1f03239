"""The matmul on warpgroups' matrix units, assembled with no GPU: registers, shared memory, and no warning of the assembler."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tvm

from llmc.schedules import emit as e
from llmc.schedules.gpu import warpgroup_gemm
from llmc.schedules.gpu.gemv import Operands
from llmc.schedules.linear import LinearConfig
from llmc.targets import simt
from llmc.targets.cuda import compiler, resources
from llmc.targets.cuda.backend import capabilities, tvm_target
from llmc.targets.cuda.build import threads_of
from tests.targets.test_cuda import needs_compiler

PRESET = "sm_90a"


def source_of(tile: warpgroup_gemm.WarpgroupTile, **options: Any) -> str:
    """CUDA source of the kernel for 14336 x 4096."""
    caps = capabilities(PRESET)
    cfg = LinearConfig(14336, 4096, "bfloat16", "bfloat16", "bfloat16", **options)
    built: list[Any] = []
    with e.kernel(built):
        ops = Operands(cfg, caps, e.dim("T"))
        with e.root():
            ops.view()
            warpgroup_gemm.gemm(ops, caps, tile)
    module = tvm.IRModule({"k": built[0].with_attr("global_symbol", "k")})
    library = tvm.tirx.build(module, tvm_target(caps), pipeline=simt.register())
    return str(library.imports[0].inspect_source())


def check(source: str) -> None:
    done = compiler.assemble(source, PRESET)
    (kernel,) = resources.parse(done.log)
    assert kernel.arch == PRESET and not kernel.spill_bytes and not kernel.stack_bytes
    # 384 threads with all registers of a multiprocessor; setmaxnreg shares them out anew
    assert kernel.registers == 168 and threads_of(source) == {kernel.name: 384}
    resources.check([kernel], threads_of(source))
    # ptxas says so when it makes products wait for each other (C7510), and when it ignores setmaxnreg (C7508)
    assert not re.findall(r"serializ\w+|setmaxnreg|C75\d\d", done.log)


@needs_compiler
def test_it_assembles_without_spills() -> None:
    source = source_of(warpgroup_gemm.WIDE)
    assert (
        "__launch_bounds__(384, 1)" in source
        and "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16" in source
    )
    assert source.count("__syncwarp();") == 1  # TVM's own barrier of a warp becomes nothing
    check(source)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tile", "options"),
    [
        (warpgroup_gemm.NARROW, {"has_bias": True, "has_residual": True}),
        (warpgroup_gemm.WIDE, {"has_bias": True, "has_residual": True}),
        (warpgroup_gemm.WIDE, {"gated": True, "activation": "silu"}),
        (warpgroup_gemm.WIDE, {"gated": True, "activation": "gelu_tanh", "has_bias": True}),
    ],
)
def test_every_epilogue_assembles_without_spills(tile: Any, options: dict[str, Any]) -> None:
    check(source_of(tile, **options))


def test_shared_memory_of_the_tiles_fits() -> None:
    most = capabilities(PRESET).shared_bytes
    assert warpgroup_gemm.WIDE.shared_bytes == 4 * (49152 + 16) <= most
    assert warpgroup_gemm.NARROW.shared_bytes == 6 * (32768 + 16) <= most
