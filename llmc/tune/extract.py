"""The tuning jobs of a compiled model: which kernels its step functions call, how often, and for how many rows.

How a model will be used decides what is worth tuning. TRAFFIC says how a server's time is assumed to be spread over steps
of different sizes; within a step, a kernel counts by its share of the time that default schedules take.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.caps import Capabilities
from llmc.schedules.tunable import Bucket, Tunable, bucket_of
from llmc.tune.job import Job


@dataclass(frozen=True)
class StepShape:
    """A kind of step: which function, with how many tokens, and the share of all step time that goes to such steps."""

    function: str
    tokens: int
    share: float


# one user reading along is the case to serve best; then long prompts, then batches
TRAFFIC = (
    StepShape("decode", 1, 0.45),
    StepShape("decode", 4, 0.04),
    StepShape("decode", 8, 0.10),
    StepShape("decode", 16, 0.04),
    StepShape("step", 64, 0.05),
    StepShape("step", 512, 0.27),
    StepShape("step", 1024, 0.05),
)


@dataclass(frozen=True)
class KernelUse:
    """A kernel of a step function.

    Attributes:
        name: of the kernel.
        kind: name of its config's class.
        config: as JSON values.
        function: ``step`` or ``decode``.
        rows: what its number of rows is: ``T`` (tokens) or ``R`` (rows that need logits).
        per: rows of the kernel per such row (experts per token).
        calls: per run of the function.
    """

    name: str
    kind: str
    config: dict[str, Any]
    function: str
    rows: str
    per: int
    calls: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def from_json(values: dict[str, Any]) -> KernelUse:
        return KernelUse(**values)


def kernel_uses(module: Any) -> tuple[KernelUse, ...]:
    """Kernels with a config that the step functions of a lowered module call."""
    from tvm import relax

    from llmc.passes.rewrite import KERNEL_ATTR, bindings_of

    found: dict[tuple[Any, ...], int] = {}
    for function in ("step", "decode"):
        if function not in {gvar.name_hint for gvar in module.get_global_vars()}:
            continue
        for binding in bindings_of(module[function]):
            value = binding.value
            if not isinstance(value, relax.Call) or not getattr(value.op, "name", "").startswith(
                "relax.call_tir"
            ):
                continue
            kernel = module[value.args[0]]
            text = kernel.attrs.get(KERNEL_ATTR) if kernel.attrs else None
            rows = _rows_of(binding.var.ty)
            if text is None or rows is None:
                continue
            key = (value.args[0].name_hint, str(text), function, *rows)
            found[key] = found.get(key, 0) + 1
    uses = []
    for (name, text, function, rows, per), calls in found.items():
        described = json.loads(text)
        uses.append(KernelUse(name, described["kind"], described["config"], function, rows, per, calls))
    return tuple(uses)


def _rows_of(ty: Any) -> tuple[str, int] | None:
    """(T or R, rows per such row) of a result's type: its first symbolic dimension."""
    from tvm import relax

    if isinstance(ty, relax.TupleType):
        return next((rows for field in ty.fields if (rows := _rows_of(field)) is not None), None)
    for dim in getattr(ty, "shape", None) or ():
        name, per = _factors(dim)
        if name:
            return ("R" if name == "R" else "T"), per
    return None


def _factors(dim: Any) -> tuple[str, int]:
    """(name of the variable, constant factor) of a product; ("", value) of a constant."""
    from tvm import tirx

    if isinstance(dim, tirx.Var):
        return str(dim.name), 1
    if isinstance(dim, tirx.Mul):
        (a, m), (b, n) = _factors(dim.a), _factors(dim.b)
        return a or b, m * n
    return "", int(dim) if isinstance(dim, tirx.IntImm) else 1


def jobs_of(
    uses: Iterable[KernelUse],
    tunables: Sequence[Tunable],
    caps: Capabilities,
    *,
    max_batch: int,
    max_step_tokens: int,
) -> list[Job]:
    """Jobs for the traffic that a model may get, each distinct task and bucket once.

    Args:
        max_batch, max_step_tokens: bounds of the artifact; larger steps do not occur.
    """
    return jobs_of_models([uses], tunables, caps, max_batch=max_batch, max_step_tokens=max_step_tokens)


def jobs_of_models(
    models: Iterable[Iterable[KernelUse]],
    tunables: Sequence[Tunable],
    caps: Capabilities,
    *,
    max_batch: int,
    max_step_tokens: int,
    steps: Container[int] = range(len(TRAFFIC)),
) -> list[Job]:
    """jobs_of for several models at a time: each has the same part of the traffic, whatever its size.

    Args:
        steps: indices of TRAFFIC that count.
    """
    calls: dict[tuple[int, Any, Bucket], dict[int, float]] = {}
    rows_of: dict[tuple[int, Any, Bucket], int] = {}
    for place, uses in enumerate(models):
        for use in uses:
            found = tunable_for(use, tunables)
            if found is None:
                continue
            tunable, config = found
            task = tunable.task(config)
            for number, shape in enumerate(TRAFFIC):
                tokens = shape.tokens
                most = max_batch if use.function == "decode" else max_step_tokens
                if number not in steps or shape.function != use.function or tokens > most:
                    continue
                # a prompt asks for the logits of its last token only
                rows = (1 if use.rows == "R" and shape.function == "step" else tokens) * use.per
                bucket = bucket_of(rows)
                if bucket not in tunable.buckets(task):
                    continue
                key = (tunables.index(tunable), task, bucket)
                per_shape = calls.setdefault(key, {})
                numbered = place * len(TRAFFIC) + number
                per_shape[numbered] = per_shape.get(numbered, 0.0) + use.calls
                rows_of[key] = max(rows_of.get(key, 0), rows)
    jobs = []
    for (index, task, bucket), per_shape in calls.items():
        rows = rows_of[index, task, bucket]
        jobs.append(Job.of(tunables[index], task, bucket, rows, caps, tuple(sorted(per_shape.items()))))
    return jobs


def tunable_for(use: KernelUse, tunables: Sequence[Tunable]) -> tuple[Tunable, Any] | None:
    """The kernel class of a use, and its config; classes that share a config differ in the kernels' names."""
    fits = []
    for tunable in tunables:
        if tunable.config_type.__name__ == use.kind:
            config = tunable.config_type.from_json(use.config)  # type: ignore[attr-defined]
            if tunable.takes(config):
                fits.append((tunable, config))
    if len(fits) > 1:
        fits = [fit for fit in fits if use.name.startswith(fit[0].name)]
    return fits[0] if fits else None


def shares(jobs: Sequence[Job]) -> None:
    """Set every job's share of the step time under TRAFFIC, from the measured default times.

    Jobs that are not measured yet count with their least possible time.
    """
    totals: dict[int, float] = {}
    for job in jobs:
        for number, calls in job.calls:
            totals[number] = totals.get(number, 0.0) + calls * _seconds(job)
    present = sum(_traffic(number) for number in totals) or 1.0
    for job in jobs:
        job.share = sum(
            _traffic(number) / present * calls * _seconds(job) / totals[number]
            for number, calls in job.calls
            if totals[number]
        )


def _traffic(number: int) -> float:
    """Share of the time of a kind of step; those of further models are numbered on."""
    return TRAFFIC[number % len(TRAFFIC)].share


def _seconds(job: Job) -> float:
    return job.default_seconds or job.roofline
