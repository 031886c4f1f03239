"""The stage runner: order, dumps, stop-after, timings, reproducers."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmc.errors import LlmcError
from llmc.reproducer import toml_text
from llmc.spec import CompileSpec, DType, Verify
from llmc.stages import ProgressReporter, StageRunner, Timing, run_passes

SPEC = CompileSpec(model="some/model", dtype=DType.BF16, verify=Verify.FULL)
NAMES = ("one", "two", "three")


@dataclass(frozen=True)
class Graph:
    """A stage result with a text."""

    text: str

    def as_text(self) -> str:
        return self.text


class Recorder(ProgressReporter):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.table: list[Timing] = []

    def stage_started(self, stage: str, number: int, total: int) -> None:
        self.events.append(f"{number}/{total} {stage}")

    def stage_finished(self, timing: Timing) -> None:
        self.events.append(f"done {timing.stage}")

    def timings(self, timings: Sequence[Timing]) -> None:
        self.table = list(timings)

    def close(self) -> None:
        self.events.append("closed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLMC_CACHE", str(folder))
    return folder


def double(graph: Graph) -> Graph:
    return Graph(graph.text * 2)


def same(graph: Graph) -> Graph:
    return graph


def fail(graph: Graph) -> Graph:
    raise ValueError("shape mismatch\nsecond line")


def test_stages_report_progress_and_time() -> None:
    seen = Recorder()
    with StageRunner(SPEC, stages=NAMES, time_passes=True, progress=seen) as runner:
        graph = runner.run("one", Graph, "a")
        graph = runner.run(
            "two", lambda: run_passes(runner, "two", [("Double", double), ("Same", same)], graph)
        )
        assert graph.text == "aa"
    assert seen.events == ["1/3 one", "done one", "2/3 two", "done two", "closed"]
    assert [(t.stage, t.part) for t in seen.table] == [
        ("one", ""),
        ("two", "Double"),
        ("two", "Same"),
        ("two", ""),
    ]
    assert all(t.seconds >= 0 and t.peak_rss > 1 << 20 for t in seen.table)


def test_dump_writes_only_changes(tmp_path: Path) -> None:
    folder = tmp_path / "ir"
    folder.mkdir()
    (folder / "000_stale_Old.py").write_text("from an earlier compile")
    (folder / "notes.txt").write_text("mine")
    with StageRunner(SPEC, stages=NAMES, dump_ir=folder) as runner:
        graph = runner.run("one", Graph, "a")
        graph = run_passes(runner, "two", [("Same", same), ("Double", double)], graph)
        runner.run("three", lambda: 7)
    assert sorted(p.name for p in folder.iterdir()) == ["000_one_Graph.py", "001_two_Double.py", "notes.txt"]
    assert (folder / "001_two_Double.py").read_text() == "aa"


def test_dump_of_a_tvm_module(tmp_path: Path) -> None:
    import tvm

    with StageRunner(SPEC, stages=NAMES, dump_ir=tmp_path) as runner:
        runner.run("one", lambda: tvm.IRModule({}))
    assert "class Module" in (tmp_path / "000_one_IRModule.py").read_text()


def test_stop_after_skips_the_rest_and_closes() -> None:
    seen = Recorder()
    ran = []
    with StageRunner(SPEC, stages=NAMES, stop_after="two", progress=seen) as runner:
        runner.run("one", ran.append, 1)
        runner.run("two", ran.append, 2)
        runner.run("three", ran.append, 3)
    assert ran == [1, 2]
    assert seen.events[-1] == "closed"


def test_unknown_stage_lists_the_names() -> None:
    with pytest.raises(LlmcError, match="'four'; the stages are one, two, three") as e:
        StageRunner(SPEC, stages=NAMES, stop_after="four")
    assert e.value.ref == "unknown-stage"


def test_a_bug_in_a_pass_leaves_a_reproducer(cache: Path) -> None:
    with pytest.raises(LlmcError) as e, StageRunner(SPEC, stages=NAMES) as runner:
        runner.run("one", lambda: 1)
        passes = [("Double", double), ("Fail", fail)]
        runner.run("two", lambda: run_passes(runner, "two", passes, Graph("ir text")))
    assert e.value.ref == "internal-error"
    assert (
        "Pass two/Fail failed with ValueError: shape mismatch (ran before it: one, two/Double)"
        in e.value.message
    )
    folder = Path(str(e.value.context["reproducer"]))
    assert str(folder) in e.value.message and folder.parent == cache / "reproducers"
    assert (folder / "before.py").read_text() == "ir textir text"
    assert "raise ValueError" in (folder / "traceback.txt").read_text()
    assert json.loads((folder / "versions.json").read_text())["apache-tvm"].startswith("0.27")
    assert CompileSpec.from_toml(folder / "spec.toml") == SPEC
    assert (folder / "command.txt").read_text().strip()


def test_a_tvm_module_in_a_reproducer_loads_again() -> None:
    import tvm

    def broken(module: tvm.IRModule) -> tvm.IRModule:
        raise RuntimeError("no")

    module = tvm.IRModule({})
    with pytest.raises(LlmcError) as e, StageRunner(SPEC, stages=NAMES) as runner:
        runner.run_pass("one", "Broken", broken, module)
    folder = Path(str(e.value.context["reproducer"]))
    tvm.ir.assert_structural_equal(tvm.ir.load_json((folder / "before.json").read_text()), module)


def test_user_errors_pass_through_without_reproducer(cache: Path) -> None:
    def refuse() -> None:
        raise LlmcError("no-such-model", "The folder x does not exist.")

    seen = Recorder()
    with (
        pytest.raises(LlmcError, match="no-such-model"),
        StageRunner(SPEC, stages=NAMES, progress=seen) as runner,
    ):
        runner.run("one", refuse)
    assert not cache.exists()
    assert seen.events[-1] == "closed"


def test_unwritable_dump_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LlmcError, match="dump-unwritable"):
        StageRunner(SPEC, dump_ir=tmp_path / "file" / "ir")


def test_toml_text_quotes_and_skips_none() -> None:
    text = toml_text({"a": 'x"\\\n', "b": None, "c": True, "d": [1, "y"], "e": 2})
    assert text == 'a = "x\\"\\\\\\n"\nc = true\nd = [1, "y"]\ne = 2\n'


def test_ctrl_c_inside_of_a_pass_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM hands on a KeyboardInterrupt of a pass in Python as a RuntimeError."""
    import tvm

    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))

    @tvm.transform.module_pass(opt_level=0)
    class Interrupted:
        def transform_module(self, module: object, context: object) -> object:
            signal.raise_signal(signal.SIGINT)
            return module

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StageRunner(SPEC, stages=NAMES) as runner:
        runner.run("one", lambda: runner.run_pass("one", "Interrupted", Interrupted(), tvm.IRModule()))
    assert signal.getsignal(signal.SIGINT) is before
    assert list(tmp_path.iterdir()) == []
