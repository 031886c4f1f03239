"""What a target folder exports, and the lazy table of targets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact import DeviceCode
from llmc.caps import Capabilities
from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.schedules.tunable import Tunable
    from llmc.targets.runner import Runner


@dataclass(frozen=True)
class Built:
    """What code generation made.

    Attributes:
        executable: tvm's compiled module, for model.so.
        files: further files of the artifact.
        device: what they are, for the manifest.
    """

    executable: Any
    files: dict[str, bytes] = field(default_factory=dict)
    device: DeviceCode | None = None


def build_host(module: Any, target: Any, caps: Capabilities) -> Built:
    """Everything in model.so."""
    from llmc.targets.codegen import build_executable

    return Built(build_executable(module, target))


def write_library(func: Any, target: Any, caps: Capabilities, path: Path) -> None:
    """One kernel as a shared library for the machine of `caps`."""
    from llmc.targets.codegen import build_kernel

    build_kernel(func, target, caps, path)


def always_fit(path: Path) -> str:
    """Nothing speaks against a candidate before it is measured."""
    return ""


@dataclass(frozen=True)
class Backend:
    """A target's manifest (STYLE 10).

    Attributes:
        name: the target's name, the part of ``--target`` before a slash.
        presets: preset names that ``--target NAME/PRESET`` accepts.
        capabilities: preset (or "" for what this machine has) -> Capabilities.
        tvm_target: Capabilities -> tvm.target.Target for host and device code.
        missing: Capabilities -> what this machine lacks to run such code; empty if it can.
        tunables: the kernel classes that its compiles use and the tuner searches, imported when called.
        runner: Capabilities -> what the tuner runs candidates with; None = this target cannot be tuned here.
        device: name of the device that the tuner would measure on.
        library: PrimFunc, TVM target, Capabilities, path -> writes the one file that the runner's `load` takes.
        unfit: such a file -> why it is not worth measuring; "" if it is.
        build: module in VM form, target, Capabilities -> code.
        several: presets may be joined with commas into one artifact, in any order.
        levels: each of several presets then is a level with code of its own, of which one is chosen when the artifact is
            loaded; else `capabilities` is what all of them have. The order of `presets` says which level is the better one.
        groups: short names for several presets.
        on_device: code runs on a device that the compiling machine need not have; what must be run is then left out.
    """

    name: str
    presets: tuple[str, ...]
    capabilities: Callable[[str], Capabilities]
    tvm_target: Callable[[Capabilities], Any]
    missing: Callable[[Capabilities], tuple[str, ...]]
    tunables: Callable[[], tuple[Tunable, ...]] = tuple
    runner: Callable[[Capabilities], Runner] | None = None
    device: Callable[[], str] = str
    library: Callable[[Any, Any, Capabilities, Path], None] = write_library
    unfit: Callable[[Path], str] = always_fit
    build: Callable[[Any, Any, Capabilities], Built] = build_host
    several: bool = False
    levels: bool = False
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    on_device: bool = False

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not self.presets:
            raise ValueError(f"a backend needs a name and presets, found {self.name!r}, {self.presets!r}")

    def require_host(self, caps: Capabilities) -> None:
        """Raise unless this machine can run what is compiled for `caps`.

        Raises:
            LlmcError: "cannot-run-here", with what is missing.
        """
        lacks = self.missing(caps)
        if lacks:
            raise LlmcError(
                "cannot-run-here",
                f"The check at the end of a compile runs the artifact, and this machine cannot run {caps.preset}: "
                f"it lacks {', '.join(lacks)}.",
                hint="Compile with --verify off here, or compile on such a machine.",
            )


# name -> module that exports BACKEND; imported on first use, so that a missing SDK fails only its own target
_TARGETS = {"cpu": "llmc.targets.cpu.backend", "cuda": "llmc.targets.cuda.backend"}
# targets on the road map, and what to say until they exist
_PLANNED = ("vulkan", "android")


def names() -> tuple[str, ...]:
    """Targets that this version can compile for."""
    return tuple(_TARGETS)


def get(target: str) -> tuple[Backend, Capabilities]:
    """Resolve ``cpu`` or ``cpu/x86-64-v4`` to its backend and capabilities; of several levels, the one that runs here.

    Raises:
        LlmcError: unknown target or preset, with the names that exist.
    """
    backend, levels = get_levels(target)
    return backend, level_here(backend, levels) or levels[0]


def level_here(backend: Backend, levels: tuple[Capabilities, ...]) -> Capabilities | None:
    """The best of some levels, ordered so, that this machine can run; None = it can run none of them."""
    return next((caps for caps in levels if not backend.missing(caps)), None)


def get_levels(target: str) -> tuple[Backend, tuple[Capabilities, ...]]:
    """Resolve ``cpu/x86-64-v3,x86-64-v4`` or ``cpu/x86-64`` to the backend and the capabilities of each level, best first.

    Raises:
        LlmcError: unknown target or preset, with the names that exist; levels of several processor architectures.
    """
    name, _, preset = target.partition("/")
    if name not in _TARGETS:
        later = " It is planned for a later version." if name in _PLANNED else ""
        raise LlmcError(
            "unknown-target",
            f"The target must be one of {', '.join(_TARGETS)}; found {target!r}.{later}",
            hint="Use --target cpu, or cpu/PRESET.",
        )
    backend: Backend = importlib.import_module(_TARGETS[name]).BACKEND
    parts = [part.removeprefix(f"{name}/") for part in preset.split(",")] if backend.several else [preset]
    if preset and not set(parts) <= {*backend.presets, *backend.groups}:
        raise LlmcError(
            "unknown-preset",
            f"Target {name} has the presets {', '.join([*backend.presets, *backend.groups])}; found {preset!r}.",
            hint=f"Use --target {name} for the machine at hand"
            + (f"; several are joined with commas: {name}/A,B." if backend.several else "."),
        )
    if not backend.levels or not preset:
        return backend, (backend.capabilities(",".join(parts)),)
    wanted = {one for part in parts for one in backend.groups.get(part, (part,))}
    levels = tuple(backend.capabilities(one) for one in backend.presets if one in wanted)
    triples = sorted({caps.triple.partition("-")[0] for caps in levels})
    if len(triples) > 1:
        raise LlmcError(
            "mixed-levels",
            f"The levels of one artifact must be of one processor architecture; {preset!r} names {' and '.join(triples)}.",
            hint="Compile an artifact for each.",
        )
    return backend, levels
