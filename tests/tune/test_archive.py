"""Candidates built on one machine and measured on another: the file, and both steps on real kernels."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llmc.cli.app import app
from llmc.errors import LlmcError
from llmc.schedules.linear import LinearConfig
from llmc.schedules.records import Status, read_records
from llmc.schedules.tunable import BUCKETS
from llmc.schedules.tune_linear import TunableLinear
from llmc.targets.backend import get
from llmc.tune.archive import Archive, ArchiveWriter, Listed
from llmc.tune.exporting import choose_candidates, export_candidates
from llmc.tune.job import Job
from llmc.tune.session import measure_candidates
from llmc.tune.sources import tvm_version

BACKEND, CAPS = get("cpu")


def jobs(*buckets: int) -> list[Job]:
    task = TunableLinear().task(LinearConfig(128, 96, "float32", "float32", "float32"))
    return [Job.of(TunableLinear(), task, BUCKETS[i], BUCKETS[i].low, CAPS, ((0, 2.0),)) for i in buckets]


def written(path: Path, tvm: str = "", code: str = "") -> Path:
    """An archive whose libraries are text."""
    writer = ArchiveWriter(path, CAPS.preset, tvm or tvm_version())
    library = path.with_name("library")
    library.write_text("code")
    for job in jobs(0, 1):
        job.code = code or job.code
        if not writer.has_default(job):
            writer.add_default(job, library)
        writer.add(job, {s: library for s in choose_candidates([job], CAPS, 4, [])[0]})
    writer.finish()
    return path


def test_jobs_come_back_with_their_candidates(tmp_path: Path) -> None:
    archive = Archive(written(tmp_path / "c.zip"))
    archive.open(BACKEND.tunables(), CAPS, tvm_version())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    for job, source in zip(archive.jobs, jobs(0, 1), strict=True):
        assert (job.task, job.bucket, job.rows, job.calls, job.code) == (
            source.task, source.bucket, source.rows, source.calls, source.code,
        )  # fmt: skip
        assert job.size == 5 and job.space.default in job.space
        for schedule in job.space:
            library = archive.library(job, schedule)
            assert library is not None and library.read_text() == "code" and schedule in source.space
    rng, space = np.random.default_rng(0), archive.jobs[0].space
    assert all(space.mutate(space.random(rng), rng) in space for _ in range(20))
    last = list(space)[-1]
    assert space.nearest(vars(last)) == last and isinstance(space, Listed)
    work = Path(archive._work.name)
    archive.close()
    assert not work.exists()


def test_all_buckets_of_a_task_get_its_layouts() -> None:
    chosen = choose_candidates(jobs(0, 4), CAPS, 6, [])
    # the default is there in any case
    assert {0, *(s.vectors for s in chosen[0])} == {0, *(s.vectors for s in chosen[1])} != {0}


@pytest.mark.parametrize(
    ("make", "ref"),
    [
        (lambda p: None, "candidates-missing"),
        (lambda p: p.write_text("no zip"), "candidates-corrupt"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "candidates-corrupt"),
        (lambda p: written(p, tvm="0.1"), "candidates-other-version"),
        (lambda p: written(p, code="0" * 16), "candidates-other-version"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, make, ref: str) -> None:
    make(tmp_path / "c.zip")
    with pytest.raises(LlmcError) as error:
        measure_candidates(tmp_path / "c.zip", budget=1, database=tmp_path / "r")
    assert error.value.ref == ref and not (tmp_path / "r").exists()


def test_another_format_and_another_machine(tmp_path: Path) -> None:
    def with_index(path: Path, **changes: object) -> Path:
        with zipfile.ZipFile(path) as held:
            index = json.loads(held.read("candidates.json"))
        with zipfile.ZipFile(path, "w") as held:
            held.writestr("candidates.json", json.dumps({**index, **changes}))
        return path

    path = with_index(written(tmp_path / "c.zip"), **{"llmc-candidates": 9})
    result = CliRunner().invoke(app, ["tune", "--measure", str(path)])
    assert result.exit_code == 2 and "[candidates-version]" in result.stderr and "format 9" in result.stderr
    other = "cpu/aarch64" if CAPS.preset.startswith("cpu/x86") else "cpu/x86-64-v3"
    path = with_index(written(tmp_path / "d.zip"), preset=other)
    result = CliRunner().invoke(app, ["tune", "--measure", str(path)])
    assert result.exit_code == 2 and "[cannot-tune-here]" in result.stderr
    for arguments, ref in (
        (["tune", "m", "--measure", str(path)], "tune-and-list"),
        (["tune", "m", "--export-candidates", "x", "--candidates", "0"], "tune-candidates"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and f"[{ref}]" in result.stderr


@pytest.mark.slow
def test_build_here_measure_there(tmp_path: Path) -> None:
    path, database = tmp_path / "c.zip", tmp_path / "r.jsonl"
    done = export_candidates(jobs(0, 2), CAPS, tvm_version(), path, each=3, builders=1)
    assert done.jobs == 2 and done.candidates >= 6 and done.failures == {}
    result = measure_candidates(path, budget=600, database=database)
    records = read_records(database)
    assert {r.status for r in records} == {Status.OK} and len(records) == done.candidates + 2
    assert result.failures == {} and all(job.default_seconds for job in result.jobs)
    assert {(r.low, r.device) for r in records} == {(1, BACKEND.device()), (5, BACKEND.device())}
    # what is known is not measured again
    again = measure_candidates(path, budget=600, database=database)
    assert again.trials == 0 and again.known == len(records)
