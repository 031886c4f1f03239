"""A kernel class whose candidates are right, wrong, never return, write to where nothing is, or do not build: real kernels.

``python -m tests.tune.awkward build|measure TARGET SOCKET`` is llmc.tune.serve for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.choice import ByRows
from llmc.schedules.tunable import BUCKETS, Arguments, Bucket, Knob, Space, Tunable, Work
from llmc.schedules.tune_data import Array
from llmc.targets.backend import get
from llmc.targets.cpu.runner import CpuRunner
from llmc.targets.runner import Limits
from llmc.tune import serve

RIGHT, ALSO_RIGHT, WRONG, HANGS, CRASHES, NOT_BUILT = range(6)


@dataclass(frozen=True)
class AwkwardSchedule:
    kind: int = RIGHT


@dataclass(frozen=True)
class AwkwardConfig:
    n: int
    out_dtype: str = "float32"
    schedule: ByRows[AwkwardSchedule] = ByRows((AwkwardSchedule(),))  # noqa: RUF009

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "schedule": self.schedule.to_json()}


class Awkward(Tunable):
    """y[T, n] = 2 x."""

    name = "awkward"
    config_type = AwkwardConfig
    schedule_type = AwkwardSchedule

    def task(self, config: AwkwardConfig) -> AwkwardConfig:
        return replace(config, schedule=ByRows((AwkwardSchedule(),)))

    def samples(self, caps: Capabilities) -> tuple[AwkwardConfig, ...]:
        return ()

    def buckets(self, task: AwkwardConfig) -> tuple[Bucket, ...]:
        return BUCKETS[:1]

    def space(self, task: AwkwardConfig, bucket: Bucket, caps: Capabilities) -> Space:
        return Space(AwkwardSchedule(), (Knob("kind", tuple(range(6))),))

    def scheduled(self, config: AwkwardConfig, schedule: ByRows[Any]) -> AwkwardConfig:
        return replace(config, schedule=schedule)

    def schedules_of(self, config: AwkwardConfig) -> ByRows[Any]:
        return config.schedule

    def build(self, config: AwkwardConfig, caps: Capabilities) -> Any:
        kind, n = config.schedule.choices[0].kind, config.n
        if kind == NOT_BUILT:
            raise ValueError("there is no such kernel")
        built: list[Any] = []
        with e.kernel(built):
            t = e.dim("T")
            x = e.tensor("x", [t, n], "float32")
            y = e.tensor("y", [t, n], "float32")
            with e.root():
                xf, yf = e.flat(x, t * n), e.flat(y, t * n)
                if kind == HANGS:
                    e.store(yf, e.i64(0), e.f32(0.0), 1)
                    with T.While(yf[0] < e.f32(2.0)):
                        e.store(yf, e.i64(0), T.min(yf[0] + e.f32(0.25), e.f32(1.0)), 1)
                with e.loop(t * n) as i:
                    to = i + t * (1 << 40) if kind == CRASHES else i
                    e.store(yf, to, xf[i] * e.f32(2.5 if kind == WRONG else 2.0), 1)
        return built[0]

    def inputs(self, task: AwkwardConfig, rows: int, rng: np.random.Generator) -> dict[str, Array]:
        return {"x": rng.standard_normal((rows, task.n), np.float32)}

    def arguments(
        self,
        task: AwkwardConfig,
        schedule: Any,
        case: dict[str, Array],
        caps: Capabilities,
        packed: Array | None = None,
    ) -> Arguments:
        return Arguments((case["x"], np.full_like(case["x"], np.nan)), (0,), 1)

    def reference(self, task: AwkwardConfig, case: dict[str, Array]) -> Array:
        return case["x"] * np.float32(2)

    def work(self, task: AwkwardConfig, rows: int) -> Work:
        return Work(8.0 * rows * task.n, 1.0 * rows * task.n, "float32")

    def terms(self, task: AwkwardConfig, schedule: Any, rows: int, caps: Capabilities) -> dict[str, float]:
        return {"kind": float(schedule.kind)}


class _Runner(CpuRunner):
    """Does not measure the machine, which takes seconds."""

    def limits(self) -> Limits:
        return Limits(1e10, {"float32": 1e11})


def command(kind: str, target: str = "cpu") -> list[str]:
    """Of a worker for Awkward."""
    return [sys.executable, "-m", "tests.tune.awkward", kind, target]


def main(arguments: Sequence[str]) -> None:
    backend, caps = get("cpu")
    runner = lambda caps: _Runner(caps, backend.tvm_target(caps))  # noqa: E731
    odd = replace(backend, tunables=lambda: (Awkward(),), runner=runner)
    serve.get = lambda target: (odd, caps)  # type: ignore[attr-defined]
    serve.main(list(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
