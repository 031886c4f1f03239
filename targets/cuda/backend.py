"""The cuda target's manifest: presets, the device at hand, and building."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

from llmc import cuda_driver
from llmc.caps import Capabilities, Fp8Mma
from llmc.errors import LlmcError
from llmc.host import architecture
from llmc.targets.backend import Backend, Built
from llmc.targets.cuda import library, tuning


@dataclass(frozen=True)
class _Arch:
    """Facts of an architecture (CUDA programming guide, table of compute capabilities).

    Attributes:
        shared: bytes of shared memory that a block may take when it asks for them.
        multiprocessors: of a typical device; default schedules spread work over so many.
    """

    number: int
    shared: int
    multiprocessors: int


_ARCHS = {
    "sm_75": _Arch(75, 64 << 10, 40),
    "sm_80": _Arch(80, 163 << 10, 108),
    "sm_86": _Arch(86, 99 << 10, 84),
    "sm_89": _Arch(89, 99 << 10, 128),
    "sm_90": _Arch(90, 227 << 10, 132),
    "sm_90a": _Arch(90, 227 << 10, 132),
    "sm_100": _Arch(100, 227 << 10, 148),
    "sm_120": _Arch(120, 99 << 10, 170),
}


def archs_of(preset: str) -> tuple[str, ...]:
    """The architectures that a preset such as ``cuda/sm_80,sm_90`` names."""
    return tuple(preset.partition("/")[2].split(","))


def detect() -> str:
    """The preset of this machine's first GPU.

    Raises:
        LlmcError: there is none, with what to write instead.
    """
    driver = cuda_driver.query()
    if not driver.devices:
        raise LlmcError(
            "no-cuda-device",
            f"--target cuda compiles for the GPU at hand, and {driver.problem}.",
            hint=f"Name an architecture, e.g. --target cuda/sm_90 (of {', '.join(_ARCHS)}).",
        )
    arch = driver.devices[0].arch
    # binary code runs on later minor versions of the same major one, with features of its own only there; PTX on all newer ones
    older = [name for name, a in _ARCHS.items() if a.number <= arch and (name[-1] != "a" or a.number == arch)]
    fits = [name for name in older if _ARCHS[name].number // 10 == arch // 10] or older
    if not fits:
        raise LlmcError(
            "cuda-arch-unknown",
            f"This machine's {driver.devices[0].name} has compute capability {arch // 10}.{arch % 10}; "
            f"llmc knows {', '.join(_ARCHS)}.",
        )
    return fits[-1]


def capabilities(preset: str) -> Capabilities:
    """Capabilities of a preset, of several at a time (what all of them have), or of this machine ("")."""
    names = tuple(dict.fromkeys((preset or detect()).split(",")))
    archs = [_ARCHS[name] for name in names]
    least = min(a.number for a in archs)
    system = "apple-darwin" if platform.system() == "Darwin" else "unknown-linux-gnu"
    machine = architecture()
    return Capabilities(
        target="cuda",
        preset=f"cuda/{','.join(names)}",
        triple=f"{machine}-{system}",
        mcpu="x86-64" if machine == "x86_64" else "generic",
        vector_bytes=16,
        simt=True,
        shared_bytes=min(a.shared for a in archs),
        multiprocessors=min(a.multiprocessors for a in archs),
        has_mma_f16=least >= 80,
        has_mma_bf16=least >= 80,
        has_mma_bytes=least >= 80,
        has_async_copy=least >= 80,
        has_wgmma=set(names) == {"sm_90a"},
        fp8_mma=min((_fp8_mma(a.number) for a in archs), key=list(Fp8Mma).index),
    )


def _fp8_mma(number: int) -> Fp8Mma:
    """What ptxas 13.0 makes of mma.m16n8k32 with e4m3: QMMA for sm_89 and sm_120, conversions and HMMA for sm_90 and sm_100."""
    if number < 89:
        return Fp8Mma.NONE
    return Fp8Mma.EXPANDED if number // 10 in (9, 10) else Fp8Mma.UNITS


def missing(caps: Capabilities) -> tuple[str, ...]:
    """What this machine lacks to run code for `caps`."""
    driver = cuda_driver.query()
    if not driver.devices:
        return (driver.problem,)
    arch = driver.devices[0].arch
    for name in archs_of(caps.preset):
        number = _ARCHS[name].number
        # machine code with features of its own runs there only; else PTX runs on whatever is newer
        if number == arch or (number <= arch and name[-1] != "a"):
            return ()
    return (f"its GPU is an sm_{arch}, the code is for {caps.preset}",)


def tvm_target(caps: Capabilities) -> Any:
    """The CUDA target for these capabilities; its host is the compiling machine's kind of processor."""
    import tvm

    host = {"kind": "llvm", "mtriple": caps.triple, "mcpu": caps.mcpu}
    lowest = min(archs_of(caps.preset), key=lambda a: _ARCHS[a].number)
    return tvm.target.Target({"kind": "cuda", "arch": lowest.rstrip("a")}, host=host)


def build(module: Any, target: Any, caps: Capabilities) -> Built:
    """Host code for model.so, and a file of kernels per architecture."""
    from llmc.targets.cuda.build import build as run

    return run(module, target, caps, archs_of(caps.preset))


BACKEND = Backend(
    name="cuda",
    presets=tuple(_ARCHS),
    capabilities=capabilities,
    tvm_target=tvm_target,
    missing=missing,
    tunables=tuning.tunables,
    runner=tuning.runner,
    device=tuning.device,
    library=library.write_library,
    unfit=library.unfit,
    build=build,
    several=True,
    on_device=True,
)
