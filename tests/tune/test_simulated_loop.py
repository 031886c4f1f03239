"""The tuner's whole loop on kernels for blocks and threads: processes, builds, checks, times, records, the compiled choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmc.schedules.gpu.configs import GpuLinearSchedule, Way
from llmc.schedules.gpu.linear import linear
from llmc.schedules.gpu.tune_linear import TunableGpuLinear
from llmc.schedules.linear import LinearConfig
from llmc.schedules.records import RecordFile, Status, read_records
from llmc.schedules.tunable import BUCKETS
from llmc.schedules.tuned_choice import Tuned
from llmc.targets.backend import get
from llmc.tune.archive import Archive, ArchiveLab
from llmc.tune.exporting import export_candidates
from llmc.tune.job import Job
from llmc.tune.lab import ProcessLab
from llmc.tune.sources import tvm_version
from llmc.tune.tuner import Tuner
from tests.simulate.gpu import SimulatedTools
from tests.tune.simulated import CONFIG, DEVICE, TARGET, command

BACKEND, CAPS = get(TARGET)
GPU = TunableGpuLinear()
pytestmark = pytest.mark.slow(reason="worker processes import tvm, and the simulator runs every candidate")


def jobs(*buckets: int) -> list[Job]:
    task = GPU.task(CONFIG)
    return [Job.of(GPU, task, BUCKETS[i], BUCKETS[i].low, CAPS, ((i, 1.0),)) for i in buckets]


def test_thresholds_are_measured_and_compiled(tmp_path: Path) -> None:
    pytest.importorskip("xgboost", reason="the cost model needs xgboost")
    path = tmp_path / "records"
    made = jobs(0, 1, 3)
    with ProcessLab(TARGET, 1, command("build"), command("measure")) as lab:
        result = Tuner(made, lab, RecordFile(path), CAPS, tvm_version(), DEVICE, seed=1).run(60)
    assert result.trials >= 12 and set(result.failures) <= {"unbuilt"}
    records = read_records(path)
    assert {r.device for r in records} == {DEVICE} and {r.preset for r in records} == {TARGET}
    ok = [r for r in records if r.status is Status.OK]
    assert max(r.error for r in ok) < 1 and all(r.seconds > 0 for r in ok)
    # the clock counts statements, so that small kernels win: one row takes fewer than the matrix units
    best = made[0].best()
    assert best is not None and best[0].way == Way.THREADS and best[1].ratio < 1
    assert result.gain < 1
    # the compile that takes these records has the schedules, and its kernel computes the same
    tuned = Tuned([records], CAPS, tvm_version(), DEVICE, (GPU,))
    config = tuned.apply(replace(CONFIG, lead=1))
    assert isinstance(config.schedule.choices[0], GpuLinearSchedule) and tuned.used
    assert config.schedule.at(1) == best[0] and LinearConfig.from_json(config.to_json()) == config
    rng = np.random.default_rng(0)
    tools = SimulatedTools()
    kernel = tools.build(CAPS, k=linear(config, CAPS))["k"]
    for rows in (1, 3, 20):
        case = GPU.case(CONFIG, rows, rng)
        expected = GPU.reference(CONFIG, case)
        arguments = GPU.arguments(GPU.task(CONFIG), config.schedule.choices[0], case, CAPS)
        values = [tools.tensor(v[None] if i != 1 else v) for i, v in enumerate(arguments.values)]
        kernel(*values)
        found = values[-1].numpy()[0].astype(np.float32)
        assert np.abs(found - expected).max() < 0.05


def test_build_here_measure_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps with a file, as between a machine with the compiler and one with the GPU."""
    from llmc.tune import building

    monkeypatch.setattr(building, "serve_command", lambda kind, target: command(kind))
    path = tmp_path / "candidates.zip"
    done = export_candidates(jobs(0, 1), CAPS, tvm_version(), path, each=3, builders=1)
    assert done.jobs == 2 and done.candidates >= 5 and not done.failures
    archive = Archive(path)
    archive.open((GPU,), CAPS, tvm_version())
    records = RecordFile(tmp_path / "records")
    with ArchiveLab(archive, command("measure")) as lab:
        result = Tuner(archive.jobs, lab, records, CAPS, tvm_version(), DEVICE, use_model=False).run(100)
    archive.close()
    assert result.failures == {} and result.trials == done.candidates
    assert {r.status for r in records} == {Status.OK} and {r.low for r in records} == {1, 2}
