"""The cuda target with no GPU: presets, assembly of real kernels, artifacts, and sentences for what is missing."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tvm
from typer.testing import CliRunner

import llmc
from llmc import cuda_driver
from llmc.artifact import MANIFEST, DeviceKernel, Manifest
from llmc.cli.app import app
from llmc.cli.compile import summary_table
from llmc.cli.format import human_bytes
from llmc.cuda_driver import CudaDevice, CudaDriver
from llmc.errors import LlmcError
from llmc.ops import NormAttrs
from llmc.pipeline import compile_model
from llmc.quant.schemes import by_name
from llmc.runtime.cuda import choose_image
from llmc.sample_layout import SampleConfig
from llmc.schedules.gpu.linear import linear
from llmc.schedules.gpu.norm import norm
from llmc.schedules.gpu.qlinear import quant_linear
from llmc.schedules.gpu.sample import sample
from llmc.schedules.linear import LinearConfig
from llmc.schedules.norm import NormConfig
from llmc.schedules.qlayout import quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.targets.backend import get
from llmc.targets.cuda import compiler, resources
from llmc.targets.cuda.backend import BACKEND, capabilities, tvm_target
from llmc.targets.cuda.build import ptx_of, source_only
from llmc.targets.cuda.library import FEW_SPILLED
from tools.tiny_configs import tiny_model

H100 = CudaDevice(0, "NVIDIA H100", 90, 132, 80 << 30)


def has_compiler() -> bool:
    try:
        compiler.which()
    except LlmcError:
        return False
    return True


needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="needs NVRTC (pip install 'llmc-compiler[cuda]') or nvcc to assemble kernels"
)


def assembled(preset: str, **funcs: Any) -> tuple[DeviceKernel, ...]:
    """Build kernels for an architecture and return what the assembler says of each."""
    from llmc.targets import simt

    caps = capabilities(preset)
    named = {name: f.with_attr("global_symbol", name) for name, f in funcs.items()}
    with source_only():
        library = tvm.tirx.build(tvm.IRModule(named), tvm_target(caps), pipeline=simt.register())
    kernels = resources.parse(compiler.assemble(str(library.imports[0].inspect_source()), preset).log)
    assert kernels and {k.arch for k in kernels} == {preset}
    return kernels


@needs_compiler
@pytest.mark.parametrize(
    "preset", [p if p == "sm_90" else pytest.param(p, marks=pytest.mark.slow) for p in BACKEND.presets]
)
def test_kernels_assemble_without_spills(preset: str) -> None:
    caps = capabilities(preset)
    kernels = assembled(
        preset,
        norm=norm(NormConfig((1, -1, 4096), "bfloat16", "bfloat16", NormAttrs(1e-5, has_weight=True)), caps),
        linear=linear(LinearConfig(4096, 4096, "bfloat16", "bfloat16", "bfloat16", lead=1), caps),
        **{
            name: quant_linear(QuantLinearConfig(4096, layout, "bfloat16", "bfloat16", lead=1), caps)
            for name, layout in ((s, quant_layout(by_name(s), 4096, 4096, caps)) for s in ("q4g32", "w4a8"))
        },
    )
    # the assembler spares registers of large blocks; what it spills for that is bounded as for candidates of the tuner
    assert not [k for k in kernels if k.spill_bytes > FEW_SPILLED * k.name.startswith(("q4g32", "linear"))]
    resources.check(kernels, {k.name: 256 for k in kernels})


@needs_compiler
@pytest.mark.parametrize(
    "preset", [p if p == "sm_90" else pytest.param(p, marks=pytest.mark.slow) for p in BACKEND.presets]
)
def test_sampling_kernels_assemble(preset: str) -> None:
    kernels = assembled(preset, sample=sample(SampleConfig(128256), capabilities(preset)))
    assert not [k for k in kernels if k.spill_bytes > FEW_SPILLED]
    resources.check(kernels, {k.name: 256 for k in kernels})


def test_ptx_is_for_the_newest_architecture_without_features_of_its_own() -> None:
    assert ptx_of(("sm_80", "sm_90")) == ptx_of(("sm_80", "sm_90", "sm_90a")) == ("compute_90",)
    assert ptx_of(("sm_90a",)) == ()


def test_presets() -> None:
    _, caps = get("cuda/sm_75,sm_90")
    assert caps.simt and not caps.has_mma_bf16 and caps.preset == "cuda/sm_75,sm_90"
    assert get("cuda/sm_90")[1].has_mma_bf16
    with pytest.raises(LlmcError, match=r"presets sm_75, .*found 'sm_90,sm_42'"):
        get("cuda/sm_90,sm_42")


def test_cuda_means_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "query", lambda: CudaDriver(13000, (H100,)))
    assert get("cuda")[1].preset == "cuda/sm_90a" and get("cuda")[1].has_wgmma
    assert not get("cuda/sm_90")[1].has_wgmma and not get("cuda/sm_90,sm_90a")[1].has_wgmma
    monkeypatch.setattr(cuda_driver, "query", lambda: CudaDriver(0, (), "there is no NVIDIA driver"))
    with pytest.raises(
        LlmcError, match=r"there is no NVIDIA driver.*--target cuda/sm_90.*\[no-cuda-device\]"
    ):
        get("cuda")


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_nvrtc_library", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LlmcError, match=r"needs NVRTC or nvcc.*llmc-compiler\[cuda\].*\[no-cuda-compiler\]"):
        compiler.which()


def test_a_kernel_over_its_limits_fails() -> None:
    def entry(**changes: int) -> DeviceKernel:
        sizes = {"registers": 32, "shared_bytes": 0, "stack_bytes": 0, "spill_stores": 0, "spill_loads": 0}
        return DeviceKernel("k", "sm_90", **{**sizes, **changes})

    resources.check([entry()], {"k": 1024})
    for changes, words in (
        ({"registers": 128}, "128 registers in 1024 threads"),
        ({"shared_bytes": 50000}, "50000 bytes of shared memory"),
        ({"spill_loads": 2000}, "2000 bytes of spilled registers"),
    ):
        with pytest.raises(LlmcError, match=words):
            resources.check([entry(**changes)], {"k": 1024})


def test_a_source_that_the_compiler_refuses() -> None:
    if not has_compiler():
        pytest.skip("needs NVRTC or nvcc")
    with pytest.raises(LlmcError, match=r"refuses the generated source for sm_90: .*error"):
        compiler.assemble('extern "C" __global__ void f() { undefined(); }', "sm_90")


@needs_compiler
@pytest.mark.e2e
@pytest.mark.parametrize(
    "presets",
    ["sm_90", pytest.param("sm_80,sm_90", marks=pytest.mark.slow(reason="assembles every kernel twice"))],
)
def test_a_tiny_model_becomes_an_artifact(
    presets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled with no GPU: machine code per architecture, a clear word on the check, and a refusal to load."""
    monkeypatch.setattr(cuda_driver, "query", lambda: CudaDriver(0, (), "there is no NVIDIA driver"))
    out = tmp_path / "artifact"
    spec = dict(target=f"cuda/{presets}", dtype="bf16", quant="q4g32", max_seq_len=64)
    compile_model(tiny_model("llama"), out, **spec)
    manifest = Manifest.from_text((out / MANIFEST).read_text(), "")
    assert manifest.device is not None
    newest = presets.split(",")[-1].removeprefix("sm_")
    assert [i.arch for i in manifest.device.images] == [*presets.split(","), f"compute_{newest}"]
    assert [i.format for i in manifest.device.images][-2:] == ["cubin", "ptx"]
    ptx = (out / manifest.device.images[-1].file).read_bytes()
    assert f".target sm_{newest}".encode() in ptx and b".entry sample_tokens_kernel(" in ptx
    assert {k.arch for k in manifest.device.kernels} == set(presets.split(","))
    assert any("attention_decode" in k.name for k in manifest.device.kernels)
    assert all(
        (out / i.file).stat().st_size > 1000 and i.file in manifest.files for i in manifest.device.images
    )
    assert manifest.quality.mode == "off" and "NOT CHECKED" in manifest.quality.note
    code = sum(p.stat().st_size for p in out.iterdir() if p.suffix in (".so", ".bin"))
    size = next(cell for cell in summary_table(out, []).columns[1].cells if "code" in str(cell))
    assert f"code {human_bytes(code)}" in str(size)  # the kernels are code too
    shown = CliRunner().invoke(app, ["inspect", str(out), "--kernels"]).output
    for k in manifest.device.kernels:
        assert re.search(rf"^{k.name} +{k.arch} +{k.registers} ", shown, re.MULTILINE)
    with pytest.raises(
        LlmcError, match=rf"is for cuda/{presets}, and there is no NVIDIA driver.*\[no-cuda-device\]"
    ):
        llmc.load(out)
    _refusals(manifest)


def _refusals(manifest: Manifest) -> None:
    """What other machines say to it, and which of several images they take."""
    assert manifest.device is not None
    newer = CudaDevice(0, "B200", 100, 148, 1)
    large = dataclasses.replace(manifest.device.kernels[0], shared_bytes=200 << 10, arch="sm_90")
    wide = dataclasses.replace(manifest, device=dataclasses.replace(manifest.device, kernels=(large,)))
    later = dataclasses.replace(manifest, device=dataclasses.replace(manifest.device, compiler="nvrtc 13.1"))
    found = [
        (manifest, CudaDriver(12080, (H100,)), "cuda-driver-too-old", "implements CUDA 12.8"),
        (
            manifest,
            CudaDriver(13000, (CudaDevice(0, "T4", 75, 40, 1),)),
            "wrong-gpu",
            "machine's T4 is sm_75",
        ),
        (later, CudaDriver(13000, (newer,)), "cuda-driver-too-old", r"its PTX needs a driver for CUDA 13\.1"),
        (
            wide,
            CudaDriver(13000, (dataclasses.replace(H100, shared=99 << 10),)),
            "wrong-gpu",
            "takes 204800 bytes of shared memory; .* has 101376 for a block",
        ),
        (
            wide,
            CudaDriver(13000, (CudaDevice(0, "RTX 5090", 120, 170, 1, 99 << 10),)),
            "wrong-gpu",
            "for compute_90 takes 204800 bytes",
        ),
    ]
    for artifact, driver, ref, words in found:
        with pytest.raises(LlmcError, match=words) as caught:
            choose_image(artifact, driver)
        assert caught.value.ref == ref
    # machine code before PTX, and of several images the newest that the GPU can run
    image, ptx = manifest.device.images[0], manifest.device.images[-1]
    both = (*(dataclasses.replace(image, arch=arch) for arch in ("sm_80", "sm_90")), ptx)
    several = dataclasses.replace(manifest, device=dataclasses.replace(manifest.device, images=both))
    for arch, expected in ((90, "sm_90"), (86, "sm_80"), (120, ptx.arch)):
        chosen = choose_image(several, CudaDriver(13000, (CudaDevice(0, "x", arch, 1, 1),)))
        assert chosen is not None and chosen.arch == expected
