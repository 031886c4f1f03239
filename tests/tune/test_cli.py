"""``llmc tune`` and the tuning options of ``llmc compile``, as far as they go without tuning anything."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from llmc.cli.app import app
from llmc.cli.tune_view import TuneView, clock, conclusions, jobs_table, next_step, result_table
from llmc.errors import LlmcError
from llmc.schedules.linear import LinearConfig, LinearSchedule
from llmc.schedules.records import RecordFile, Status, read_records
from llmc.schedules.tunable import code_of
from llmc.spec import CompileSpec, parse_budget
from llmc.targets.backend import get
from llmc.tune.job import Outcome
from llmc.tune.result import TuneResult
from llmc.tune.sources import Judge, tvm_version
from llmc.tune.tuner import Tuner
from tests.tune.synthetic import CAPS, ToyLab, ToySchedule, toy_jobs
from tests.tune.test_records import record


def llmc(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5 h", 5400), ("30", 30)])
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds
    assert CompileSpec.from_json({"model": "m", "tune": text}).tune == seconds


@pytest.mark.parametrize("text", ["0", "0m", "soon", "-5m", "10d"])
def test_budgets_that_are_none(text: str, tmp_path: Path) -> None:
    for arguments in (
        ["tune", tmp_path, f"--budget={text}"],
        ["compile", tmp_path, "-o", tmp_path / "o", f"--tune={text}"],
    ):
        result = llmc(*arguments)
        assert result.exit_code == 2, result.output
        assert "[tune-budget]" in result.stderr and "Traceback" not in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "ref"),
    [
        (["tune"], "no-model"),
        (["tune", "somewhere"], "tune-budget"),
        (["tune", "somewhere", "--list"], "tune-and-list"),
        (["tune", "--merge", "nowhere.jsonl"], "records-unreadable"),
        (["compile", "somewhere", "-o", "out", "--records", "nowhere.jsonl"], "records-missing"),
    ],
)
def test_refused_in_a_sentence(
    arguments: list[str], ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = llmc(*arguments)
    assert result.exit_code == 2 and f"[{ref}]" in result.stderr, result.output
    assert {p.name for p in tmp_path.iterdir()} <= {"tuning"}


@pytest.mark.parametrize("command", [["tune", "--budget=1m"], ["compile", "--tune=1m"], ["compile"]])
def test_a_corrupt_database_is_refused_before_the_work(command: list[str], tmp_path: Path) -> None:
    """Nothing of the model is read, nothing is written, and the file stays as it is."""
    pytest.importorskip("xgboost", reason="the tuner needs xgboost")
    database = tmp_path / "r.jsonl"
    RecordFile(database).append([record()])
    text = database.read_text() + '{"rule": "toy"}\n'
    database.write_text(text)
    output = ["-o", tmp_path / "out"] if command[0] == "compile" else []
    result = llmc(command[0], tmp_path / "no-model", *command[1:], *output, "--records", database)
    assert result.exit_code == 2 and "Line 3 of" in result.stderr, result.output
    assert "[records-corrupt]" in result.stderr and database.read_text() == text
    assert not (tmp_path / "out").exists()


def test_list_and_merge(tmp_path: Path) -> None:
    a, b, into = (tmp_path / name for name in ("a", "b", "into"))
    RecordFile(a).append([record(0.5), record(0.25, tile=4)])
    RecordFile(b).append([record(0.9, tile=2, device="there")])
    result = llmc("tune", "--records", into, "--merge", a, "--merge", b, "--list")
    assert result.exit_code == 0, result.output
    assert "3 records added, 0 were there" in result.output.replace("\n", " ")
    assert (
        len(read_records(into)) == 3 and "4.00x" in result.output and "toy/one, there, TVM 1" in result.output
    )
    assert "tile=4" in result.output and "unknown here" in result.output
    said = llmc("tune", "--list", "--records", tmp_path / "none").output
    assert "no tuning records" in " ".join(said.split())  # lines are wrapped
    a.write_text("oh\n")
    broken = llmc("tune", "--list", "--records", a)
    assert broken.exit_code == 2 and "[records-corrupt]" in broken.stderr


def test_a_list_says_which_records_a_compile_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    tunable = next(t for t in get("cpu/x86-64-v3")[0].tunables() if t.name == "linear")
    caps = get("cpu/x86-64-v3")[1]
    task = tunable.to_values(tunable.task(LinearConfig(64, 32, "float32", "float32", "float32")))
    schedule = vars(LinearSchedule(prefetch=512))
    current = replace(
        record(), rule="linear", preset=caps.preset, tvm=tvm_version(), task=task, schedule=schedule,
        code=code_of(tunable, caps),
    )  # fmt: skip
    judge = Judge()
    assert judge.objection(current) == "" and judge.schedule_text(current) == "prefetch=512"
    assert judge.objection(replace(current, code="0")) == "kernel has changed"
    assert judge.objection(replace(current, tvm="0.1")) == "other TVM"
    assert judge.objection(replace(current, preset="cpu/z80")) == "unknown here"
    RecordFile(tmp_path / "r").append([current, replace(current, code="0" * 16)])
    said = llmc("tune", "--list", "--records", tmp_path / "r").output
    assert said.count("linear 64x32 float32") == 2 and "kernel has" in said


def test_no_xgboost_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from llmc.tune.model import require_xgboost

    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(LlmcError, match="not installed") as error:
        require_xgboost()
    assert error.value.ref == "no-xgboost"


def test_what_a_run_came_to(tmp_path: Path) -> None:
    fast, broken, idle = toy_jobs(64, 128, 256, rows=(1,))
    fast.default_seconds, fast.roofline, fast.share = 0.004, 0.001, 0.9
    fast.add(ToySchedule(), Outcome(Status.OK, 0.004, 1.0))
    fast.add(ToySchedule(tile=4), Outcome(Status.OK, 0.002, 0.5))
    broken.failure = "the default schedule crashed: signal 11"
    broken.add(ToySchedule(), Outcome(Status.CRASHED))
    result = TuneResult((idle, broken, fast), 7, 3, {"wrong": 2, "hung": 1}, 1, 61.0, True, None, 0.5)
    rows = [list(column.cells) for column in result_table(result).columns]
    assert rows[0] == ["toy 64", "toy 128"]
    assert [column[0] for column in rows[1:]] == [
        "1",
        "90.0 %",
        "4.000",
        "2.000",
        "2.00x",
        "50 %",
        "2",
        "tile=4",
    ]
    assert rows[-1][1].endswith("signal 11")
    assert len(jobs_table([idle]).rows) == 1
    idle.share = 0.1
    text = "\n".join(conclusions(result))
    assert "interrupted" in text and "dropped: 1 hung, 2 wrong" in text and "1 processes restarted" in text
    assert "50.0 % of that with default" in text
    assert "1 tasks were not reached" in text and "left alone" not in text
    idle.share = 0.001
    assert "1 more tasks take less than 0.2 %" in "\n".join(conclusions(result))
    said = next_step("my/model", {"quant": "w4a8", "max_batch": 4, "dtype": None}, tmp_path / "r")
    assert f"llmc compile my/model --quant w4a8 --max-batch 4 --records {tmp_path / 'r'} -o DIR" in said
    assert clock(754) == "12:34" and clock(3700) == "01:01:40" and clock(-3) == "00:00"


@pytest.mark.parametrize("live", [True, False])
def test_the_view_of_a_run(tmp_path: Path, live: bool) -> None:
    pytest.importorskip("xgboost", reason="the cost model needs xgboost")
    out = io.StringIO()
    console = Console(file=out, force_terminal=live, width=120, highlight=False)
    view = TuneView(console, live=live, quiet=False)
    view.note("3 of TVM 0.1 only seed the search")
    lab = ToyLab(lambda s: Outcome(Status.HUNG, note="no answer") if s.tile == 2 else None)
    jobs = toy_jobs(64, 4096)
    Tuner(jobs, lab, RecordFile(tmp_path / "r"), CAPS, "1", "here", progress=view, clock=lab.clock).run(60)
    text = out.getvalue()
    assert view.result is not None and view.result.trials > 20
    assert "toy 4096" in text and text.startswith("3 of TVM 0.1 only seed the search\n")
    if live:
        assert "hung" in text and "roofline" in text and "left," in text
    else:
        assert "measuring default schedules" in text
        assert "hung, no answer" in text and "% of the roofline" in text and "read 1.0 GB/s" in text
    quiet = io.StringIO()
    TuneView(Console(file=quiet), live=False, quiet=True).phase("searching")
    assert quiet.getvalue() == ""
