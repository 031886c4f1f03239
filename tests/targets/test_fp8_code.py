"""Kernels with e4m3 activations, assembled with no GPU: next to no spills, and the products that each architecture has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tvm

from llmc.caps import Fp8Mma
from llmc.passes.step_module import PackedParam
from llmc.pipeline.notes import fp8_note
from llmc.quant.schemes import by_name
from llmc.schedules.gpu.experts import quant_expert_linear
from llmc.schedules.gpu.qlinear import quant_linear
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.targets import simt
from llmc.targets.cuda import compiler, resources
from llmc.targets.cuda.backend import BACKEND, capabilities, tvm_target
from llmc.targets.cuda.build import source_only
from llmc.targets.cuda.library import FEW_SPILLED
from tests.targets.test_cuda import needs_compiler

# what the machine code multiplies with, beside wgmma
PRODUCTS = {
    "sm_75": r"FFMA",
    "sm_80": r"HMMA\.16816\.F32\.BF16",
    "sm_86": r"HMMA\.16816\.F32\.BF16",
    "sm_89": r"QMMA\.16832\.F32\.E4M3\.E4M3",
    "sm_90": r"HMMA\.16816\.F32\b",
    "sm_90a": r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3",
    "sm_100": r"HMMA\.16816\.F32\b",
    "sm_120": r"QMMA\.16832\.F32\.E4M3\.E4M3",
}


def source_of(preset: str, scheme: str, *, whole: bool) -> str:
    """CUDA source of kernels for 4096 x 4096."""
    caps = capabilities(preset)
    layout = quant_layout(by_name(scheme), 4096, 4096, caps)
    plain = QuantLinearConfig(4096, layout, "bfloat16", "bfloat16", has_residual=True)
    funcs = {"linear": quant_linear(plain, caps)}
    if whole:
        layout = quant_layout(by_name(scheme), 4096, 4096, caps, gated=True)
        gated = QuantLinearConfig(4096, layout, "bfloat16", "bfloat16", gated=True, activation="silu")
        experts = QuantExpertConfig(8, plain.layout, "bfloat16", "bfloat16")
        funcs |= {"gated": quant_linear(gated, caps), "experts": quant_expert_linear(experts, caps)}
    named: dict[Any, Any] = {name: f.with_attr("global_symbol", name) for name, f in funcs.items()}
    with source_only():
        library = tvm.tirx.build(tvm.IRModule(named), tvm_target(caps), pipeline=simt.register())
    return str(library.imports[0].inspect_source())


def check(source: str, preset: str) -> bytes:
    done = compiler.assemble(source, preset)
    kernels = resources.parse(done.log)
    # the assembler spares registers of large blocks (512 threads with 64 each), where no units for e4m3 keep the count low
    spared = 0 if capabilities(preset).fp8_mma is Fp8Mma.UNITS else FEW_SPILLED
    assert kernels and not [k for k in kernels if k.spill_bytes > spared]
    assert not re.findall(r"serializ\w+|setmaxnreg|C75\d\d", done.log)
    return done.code


@needs_compiler
def test_it_assembles_without_spills() -> None:
    source = source_of("sm_89", "fp8a8", whole=False)
    assert "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32" in source
    assert "cvt.rn.satfinite.e4m3x2.f32" in source
    check(source, "sm_89")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp8a8", "fp8a8g128"])
@pytest.mark.parametrize("preset", BACKEND.presets)
def test_every_architecture(preset: str, scheme: str, tmp_path: Path) -> None:
    source = source_of(preset, scheme, whole=True)
    assert ("e4m3.e4m3.f32" in source) == (capabilities(preset).fp8_mma is not Fp8Mma.NONE)
    assert ("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in source) == (preset == "sm_90a")
    code = check(source, preset)
    if shutil.which("nvdisasm") is None:
        pytest.skip("nvdisasm is needed to see which instructions the assembler chose")
    (tmp_path / "k.cubin").write_bytes(code)
    shown = subprocess.run(["nvdisasm", tmp_path / "k.cubin"], capture_output=True, text=True, check=True)
    assert re.search(PRODUCTS[preset], shown.stdout)


def test_a_compile_says_what_multiplies() -> None:
    params = [PackedParam("w", "w", "uint8", (1,), scheme="fp8a8")]
    said = {p: str(fp8_note(params, capabilities(p))) for p in BACKEND.presets}
    assert all(text.startswith(f"fp8 activations on cuda/{p}: ") for p, text in said.items())
    assert (
        "on fp8 matrix units" in said["sm_89"] and "more than 64 rows on fp8 matrix units" in said["sm_90a"]
    )
    assert "no fp8 matrix units" in said["sm_80"] and "are not used" in said["sm_90"]
    assert fp8_note([PackedParam("w", "w", "uint8", (1,), scheme="fp8")], capabilities("sm_80")) is None
