"""Which level of an artifact runs on this machine: the best one whose processor features are all there."""

from __future__ import annotations

from llmc import host
from llmc.artifact import Level, Manifest, TargetInfo
from llmc.errors import LlmcError


def missing_features(target: TargetInfo) -> tuple[str, ...] | None:
    """Processor features that a level needs and this machine lacks; None = the system does not tell what it has."""
    here = host.features()
    return None if here is None else tuple(sorted(set(target.features) - here))


def choose_level(manifest: Manifest, wanted: str = "") -> Level:
    """The level to run.

    Args:
        wanted: name of a level (or its preset) that is to run instead of the best one; "" = choose.

    Raises:
        LlmcError: the artifact is for another kind of machine, has no such level, this machine lacks features, or the
            system does not permit their use.
    """
    check_machine(manifest.target)
    levels = manifest.levels
    if wanted:
        levels = tuple(level for level in levels if wanted in (level.name, level.target.preset))
        if not levels:
            names = ", ".join(level.name for level in manifest.levels)
            raise LlmcError(
                "unknown-level",
                f"The artifact has code for {names}; the level that is asked for is {wanted!r}.",
                hint="Name one of these (load(level=...), --level or LLMC_LEVEL), or none for the best that runs here.",
            )
    lacking = [(level, missing_features(level.target)) for level in levels]
    for level, missing in lacking:
        if missing == ():
            host.require_permission(level.target.features)
            return level
    if lacking[-1][1] is None:  # the least that there is: what cannot be checked is not assumed
        return lacking[-1][0]
    raise _lacks([(level, missing or ()) for level, missing in lacking])


def check_machine(target: TargetInfo) -> None:
    """Processor architecture and operating system.

    Raises:
        LlmcError: the artifact is for another machine.
    """
    wanted, found = host.architecture(target.triple.split("-")[0]), host.architecture()
    if wanted != found:
        raise LlmcError(
            "wrong-architecture",
            f"The artifact is for {wanted} ({target.preset}); this machine is {found}.",
            hint=f"Compile the model with a --target for {found}.",
        )
    wanted, found = host.system_of(target.triple), host.system()
    if wanted != found:
        raise LlmcError(
            "wrong-system",
            f"The artifact is for {wanted} ({target.triple}); this machine runs {found}.",
            hint=f"Compile the model on or for {found}.",
        )


def _lacks(lacking: list[tuple[Level, tuple[str, ...]]]) -> LlmcError:
    if len(lacking) == 1:
        level, missing = lacking[0]
        return LlmcError(
            "cpu-features",
            f"The artifact ({level.target.preset}) needs the processor features {', '.join(level.target.features)}; "
            f"this processor lacks {', '.join(missing)}.",
            hint="Compile the model on this machine, or with a lower --target preset.",
        )
    each = "; ".join(f"for {level.name} {', '.join(missing)}" for level, missing in lacking)
    return LlmcError(
        "cpu-features",
        f"This processor runs none of the artifact's {len(lacking)} levels: it lacks {each}.",
        hint="Compile the model on this machine, or with a lower --target preset added.",
    )
