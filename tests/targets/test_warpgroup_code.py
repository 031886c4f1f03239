"""The matmul on warpgroups' matrix units, assembled with no GPU: registers, shared memory, and no warning of the assembler."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import tvm

from llmc.errors import LlmcError
from llmc.quant.schemes import by_name
from llmc.schedules import emit as e
from llmc.schedules.gpu import warpgroup_block, warpgroup_gemm, warpgroup_qgemm
from llmc.schedules.gpu.gemv import Operands
from llmc.schedules.gpu.qoperands import QuantOperands
from llmc.schedules.linear import LinearConfig
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.targets import simt
from llmc.targets.cuda import compiler, resources
from llmc.targets.cuda.backend import capabilities, tvm_target
from llmc.targets.cuda.build import dynamic_shared_of, threads_of
from tests.targets.test_cuda import needs_compiler

PRESET = "sm_90a"


def source_of(tile: warpgroup_block.WarpgroupTile, **options: Any) -> str:
    """CUDA source of the kernel for 14336 x 4096."""
    cfg = LinearConfig(14336, 4096, "bfloat16", "bfloat16", "bfloat16", **options)
    caps = capabilities(PRESET)
    return generated(lambda t: Operands(cfg, caps, t), lambda ops: warpgroup_gemm.gemm(ops, caps, tile))


def quantized(scheme: str, **options: Any) -> str:
    """The same of the kernel for a quantized weight."""
    caps = capabilities(PRESET)
    layout = quant_layout(by_name(scheme), 14336, 4096, caps, gated=options.get("gated", False))
    cfg = QuantLinearConfig(14336, layout, "bfloat16", "bfloat16", **options)

    def body(ops: QuantOperands) -> None:
        ops.rounded, ops.row_scales = e.workspace(ops.t * 4096, "int8"), e.workspace(ops.t)
        if not layout.of.activation_bits:
            ops.rounded = ops.row_scales = None
        warpgroup_qgemm.gemm(ops, caps)

    return generated(lambda t: QuantOperands(cfg, t), body)


def generated(operands: Callable[[Any], Any], body: Callable[[Any], None]) -> str:
    built: list[Any] = []
    with e.kernel(built):
        ops = operands(e.dim("T"))
        with e.root():
            ops.view()
            body(ops)
    module = tvm.IRModule({"k": built[0].with_attr("global_symbol", "k")})
    library = tvm.tirx.build(module, tvm_target(capabilities(PRESET)), pipeline=simt.register())
    return str(library.imports[0].inspect_source())


def check(source: str) -> None:
    done = compiler.assemble(source, PRESET)
    (kernel,) = resources.parse(done.log)
    assert kernel.arch == PRESET and not kernel.spill_bytes and not kernel.stack_bytes
    # 384 threads with all registers of a multiprocessor; setmaxnreg shares them out anew
    assert kernel.registers == 168 and threads_of(source) == {kernel.name: 384}
    most = capabilities(PRESET).shared_bytes
    dynamic = dynamic_shared_of(source)
    assert 160 << 10 <= dynamic[kernel.name] <= most
    resources.check([kernel], threads_of(source), dynamic, most)
    with pytest.raises(LlmcError, match=r"bytes of shared memory; a block may have 102400"):
        resources.check([kernel], threads_of(source), dynamic, 100 << 10)
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
        (warpgroup_gemm.WIDE, {"gated": True, "activation": "gelu_tanh"}),
    ],
)
def test_every_epilogue_assembles_without_spills(tile: Any, options: dict[str, Any]) -> None:
    check(source_of(tile, **options))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("q4g32", {"has_residual": True}),
        ("q4g128", {"gated": True, "activation": "silu"}),
        ("q4g64a", {"has_bias": True}),
        ("q8", {"has_residual": True}),
        ("fp8", {}),
        ("w8a8", {"has_residual": True}),
        ("w4a8", {"gated": True, "activation": "silu"}),
    ],
)
def test_quantized_kernels_assemble_without_spills(scheme: str, options: dict[str, Any]) -> None:
    source = quantized(scheme, **options)
    kind = "k32.s32.s8.s8" if "a8" in scheme else "k16.f32.bf16.bf16"
    assert f"wgmma.mma_async.sync.aligned.m64n128{kind}" in source
    check(source)


def test_shared_memory_of_the_tiles_fits() -> None:
    most = capabilities(PRESET).shared_bytes
    assert warpgroup_gemm.WIDE.shared_bytes == 4 * (49152 + 16) <= most
    assert warpgroup_qgemm.TILE.shared_bytes <= most
    assert warpgroup_gemm.NARROW.shared_bytes == 6 * (32768 + 16) <= most
