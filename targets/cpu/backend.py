"""The cpu target's manifest: presets, detection of the machine at hand, and the LLVM target."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

from llmc import knobs
from llmc.caps import ByteDot, Capabilities, TileUnit
from llmc.errors import LlmcError
from llmc.host import architecture, default_threads, features, processor_name
from llmc.targets.backend import Backend

if TYPE_CHECKING:
    from llmc.schedules.tunable import Tunable
    from llmc.targets.runner import Runner

# psABI micro-architecture levels in /proc/cpuinfo's names (https://gitlab.com/x86-psABIs/x86-64-ABI)
_V3 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_V4_VNNI = (*_V4, "avx512_vnni")
_V4_BF16 = (*_V4, "avx512_bf16", "avx512_vnni")
_V4_AMX = (*_V4_BF16, "amx_bf16", "amx_int8", "amx_tile")

_PRESETS: dict[str, dict[str, Any]] = {
    # best first: detection takes the first one whose features the machine has
    "x86-64-v4-amx": dict(
        machine="x86_64",
        mcpu="x86-64-v4",
        mattr=(
            "+avx512bf16",
            "+avx512vnni",
            "+amx-tile",
            "+amx-bf16",
            "+amx-int8",
            "-prefer-256-bit",
        ),
        features=_V4_AMX,
        vector_bytes=64,
        vector_registers=32,
        has_bf16_dot=True,
        has_lookup=True,
        byte_dot=ByteDot.UNSIGNED_SIGNED,
        tiles=TileUnit.AMX,
    ),
    "x86-64-v4-bf16": dict(
        machine="x86_64",
        mcpu="x86-64-v4",
        mattr=("+avx512bf16", "+avx512vnni", "-prefer-256-bit"),
        features=_V4_BF16,
        vector_bytes=64,
        vector_registers=32,
        has_bf16_dot=True,
        has_lookup=True,
        byte_dot=ByteDot.UNSIGNED_SIGNED,
    ),
    "x86-64-v4-vnni": dict(
        machine="x86_64",
        mcpu="x86-64-v4",
        mattr=("+avx512vnni", "-prefer-256-bit"),
        features=_V4_VNNI,
        vector_bytes=64,
        vector_registers=32,
        has_lookup=True,
        byte_dot=ByteDot.UNSIGNED_SIGNED,
    ),
    "x86-64-v4": dict(
        machine="x86_64",
        mcpu="x86-64-v4",
        mattr=("-prefer-256-bit",),
        features=_V4,
        vector_bytes=64,
        vector_registers=32,
        has_lookup=True,
        byte_dot=ByteDot.WORDS,
    ),
    "x86-64-v3": dict(
        machine="x86_64",
        mcpu="x86-64-v3",
        features=_V3,
        vector_bytes=32,
        vector_registers=16,
        has_lookup=True,
        byte_dot=ByteDot.WORDS,
    ),
    # Armv8.6 with fp16, or Armv9: Neoverse V1, N2 and later, Cortex-X2, A510 and A710 and later, Apple M2 and later
    "aarch64-i8mm": dict(
        machine="aarch64",
        mcpu="generic",
        mattr=("+neon", "+dotprod", "+fullfp16", "+fp16fml", "+i8mm", "+bf16"),
        features=("asimddp", "asimdhp", "asimdfhm", "i8mm", "bf16"),
        vector_bytes=16,
        vector_registers=32,
        has_bf16_dot=True,
        has_bf16_mma=True,
        has_f16_fma=True,
        has_byte_mma=True,
        has_lane_operands=True,
        has_lookup=True,
        byte_dot=ByteDot.SIGNED,
    ),
    # Armv8.2 with its two optional extensions: Neoverse N1, Cortex-A55, A75, A76 and later, Apple M1
    "aarch64-dotprod": dict(
        machine="aarch64",
        mcpu="generic",
        mattr=("+neon", "+dotprod", "+fullfp16"),
        features=("asimddp", "asimdhp"),
        vector_bytes=16,
        vector_registers=32,
        has_lane_operands=True,
        has_lookup=True,
        byte_dot=ByteDot.SIGNED,
    ),
    "aarch64": dict(
        machine="aarch64",
        mcpu="generic",
        mattr=("+neon",),
        features=(),
        vector_bytes=16,
        vector_registers=32,
        has_lane_operands=True,
        has_lookup=True,
    ),
}


def missing(caps: Capabilities) -> tuple[str, ...]:
    """What this machine lacks to run code for `caps`."""
    machine = _PRESETS[caps.preset.partition("/")[2]]["machine"]
    if machine != architecture():
        return (f"an {machine} processor",)
    flags = features() or frozenset()
    return tuple(f for f in caps.features if f not in flags)


def detect() -> str:
    """The best preset that this machine can run."""
    machine = architecture()
    flags = features() or frozenset()
    for name, preset in _PRESETS.items():
        if preset["machine"] == machine and set(preset["features"]) <= flags:
            return name
    raise LlmcError(
        "cpu-too-old",
        f"The cpu target needs x86-64-v3 (AVX2, FMA) or aarch64; this machine is {machine} "
        f"and lacks {', '.join(f for f in _V3 if f not in flags) or 'a preset'}.",
        hint="Name a preset with --target cpu/PRESET to compile for another machine.",
    )


def capabilities(preset: str) -> Capabilities:
    """Capabilities of a preset; "" = of this machine."""
    name = preset or detect()
    facts = _PRESETS[name]
    system = "apple-darwin" if platform.system() == "Darwin" else "unknown-linux-gnu"
    machine = "arm64" if system.startswith("apple") and facts["machine"] == "aarch64" else facts["machine"]
    return Capabilities(
        target="cpu",
        preset=f"cpu/{name}",
        triple=f"{machine}-{system}",
        mcpu=facts["mcpu"],
        mattr=facts.get("mattr", ()),
        features=facts["features"],
        vector_bytes=facts["vector_bytes"],
        vector_registers=facts["vector_registers"],
        has_bf16_dot=facts.get("has_bf16_dot", False),
        has_bf16_mma=facts.get("has_bf16_mma", False),
        has_f16_fma=facts.get("has_f16_fma", False),
        has_byte_mma=facts.get("has_byte_mma", False),
        has_lane_operands=facts.get("has_lane_operands", False),
        has_lookup=facts.get("has_lookup", False),
        byte_dot=facts.get("byte_dot", ByteDot.NONE),
        tiles=facts.get("tiles", TileUnit.NONE),
        threads=os.cpu_count() or 1,
    )


def tvm_target(caps: Capabilities) -> Any:
    """The LLVM target for these capabilities."""
    import tvm

    return tvm.target.Target(
        {
            "kind": "llvm",
            "mtriple": caps.triple,
            "mcpu": caps.mcpu,
            "mattr": list(caps.mattr),
            "num-cores": caps.threads,
        }
    )


def tunables() -> tuple[Tunable, ...]:
    """The kernel classes that a compile for a CPU uses."""
    from llmc.schedules.tune_attention import TunableDecode, TunablePrefill
    from llmc.schedules.tune_experts import TunableExperts
    from llmc.schedules.tune_linear import TunableLinear
    from llmc.schedules.tune_qexperts import TunableIntExperts, TunableQuantExperts
    from llmc.schedules.tune_qlinear import TunableIntLinear, TunableQuantLinear

    linears = (TunableLinear(), TunableQuantLinear(), TunableIntLinear())
    experts = (TunableExperts(), TunableQuantExperts(), TunableIntExperts())
    return (*linears, *experts, TunablePrefill(), TunableDecode())


def runner(caps: Capabilities) -> Runner:
    """Runs candidates in this process."""
    from llmc.targets.cpu.runner import CpuRunner

    return CpuRunner(caps, tvm_target(caps))


def device() -> str:
    """Processor and worker threads."""
    return f"{processor_name()}, {knobs.threads() or default_threads()} threads"


BACKEND = Backend(
    name="cpu",
    presets=tuple(_PRESETS),
    capabilities=capabilities,
    tvm_target=tvm_target,
    missing=missing,
    tunables=tunables,
    runner=runner,
    device=device,
    several=True,
    levels=True,
    groups={"x86-64": tuple(name for name, facts in _PRESETS.items() if facts["machine"] == "x86_64")},
)
