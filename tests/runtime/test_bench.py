"""llmc bench on the toy artifact: figures, tables, files, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llmc.cli.bench
import llmc.runtime.model
from llmc.artifact import KernelEntry
from llmc.bench import Sizes, Speed, choose_sizes
from llmc.cli.app import app
from llmc.cli.bench import percentiles
from llmc.errors import LlmcError
from llmc.kernel_work import Workload
from llmc.limits import MachineLimits
from llmc.roofline import best_share, multiplies_in, step_roofline
from llmc.runtime.model import Model, load
from llmc.runtime.profile import StepTimes

LIMITS = MachineLimits(2, 10e9, {"f32": 100e9, "bf16": 200e9, "int8": 400e9})


def counted(model: Model) -> Model:
    """The toy with counts of bytes and operations for one of its two kernels."""
    entry = KernelEntry("attend", "attention", 1, 0.0, "600*C", "1200*R", "600*P")
    functions = tuple(dataclasses.replace(f, kernels=(entry,)) for f in model.manifest.functions)
    model.manifest = dataclasses.replace(model.manifest, functions=functions)
    return model


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "220"})
    return done.exit_code, done.output


def test_speed(artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    code, text = run(
        str(artifact), "--prompt", "20", "--tokens", "5", "--rounds", "3", "--batch", "2", "--json", str(file)
    )
    assert code == 0, text
    assert "3 rounds, 2 sequences" in text and "prefill" in text and "decode" in text
    found = json.loads(file.read_text())
    assert len(found["speed"]["prefill"]) == 3 and len(found["speed"]["decode"]) == 15
    assert found["speed"]["sizes"] == {"prompt": 20, "tokens": 5, "rounds": 3, "batch": 2}
    assert found["limits"] is None and found["steps"] == []


def test_roofline(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmc.cli.bench, "measured_limits", lambda threads: LIMITS)
    model = counted(load(artifact))
    monkeypatch.setattr(llmc.runtime.model, "load", lambda path, threads, level: model)
    file = tmp_path / "out.json"
    code, text = run(
        str(artifact), "--roofline", "--prompt", "9", "--tokens", "2", "--rounds", "1", "--json", str(file)
    )
    assert code == 0, text
    steps = json.loads(file.read_text())["steps"]
    assert [s["function"] for s in steps] == ["decode", "step"]
    for step, work in zip(steps, (Workload.decode(1, 9 + 47 // 2), Workload.prefill(9)), strict=True):
        rows = {row["name"]: row for row in step["rows"]}
        assert set(rows) == {"append", "attend"} and rows["append"]["moved"] is None
        seen, pairs = work.value("C", 0), work.value("P", 0)
        assert rows["attend"]["moved"] == 600 * seen + 1200
        assert rows["attend"]["operations"] == 600 * pairs
        assert rows["attend"]["read_share"] == pytest.approx(
            rows["attend"]["moved"] / rows["attend"]["seconds"] / 10e9
        )
    for words in ("outside of kernels", "virtual machine", "Python", "whole step", "read 10.0 GB/s"):
        assert words in text
    assert "without counts of bytes and operations: append" in text


def test_what_cannot_be_measured_is_refused(artifact: Path, tmp_path: Path) -> None:
    cases = {
        ("--prompt", "0"): "--prompt must be at least 1, found 0",
        ("--batch", "9"): "at most 4 sequences",
        ("--prompt", "60", "--tokens", "5"): "--prompt 59 or less",
        ("--tokens", "64"): "larger --max-seq-len",
        ("--json", str(tmp_path / "no" / "x.json")): "there is no folder",
        ("--plot", str(tmp_path / "no" / "x.png")): "there is no folder",
        ("--threads", "0"): "threads must be at least 1",
    }
    for arguments, said in cases.items():
        code, text = run(str(artifact), *arguments)
        assert code == 2 and said in " ".join(text.split()), (arguments, text)
    code, text = run(str(tmp_path / "none"))
    assert code == 2 and "artifact-missing" in text


def test_an_artifact_without_counts(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmc.cli.bench, "measured_limits", lambda threads: LIMITS)
    code, text = run(str(artifact), "--roofline", "--prompt", "4", "--tokens", "1", "--rounds", "1")
    assert code == 2 and "no-kernels" in text


def test_the_prompt_fits_by_default(artifact: Path) -> None:
    model = load(artifact)
    assert choose_sizes(model, None, 10, 1, 1) == Sizes(54, 10, 1, 1)
    assert choose_sizes(model, None, 10, 1, 1, room=47).prompt == 17
    with pytest.raises(LlmcError, match="bench-sizes"):
        choose_sizes(model, 5, 5, 0, 1)


def test_rates_are_of_medians() -> None:
    speed = Speed(Sizes(100, 3, 3, 2), (1.0, 4.0, 2.0), (0.5, 0.1, 0.25))
    assert speed.prefill_tokens_per_second == 100 and speed.decode_tokens_per_second == 8
    assert percentiles([float(i) for i in range(11)]) == (1.0, 9.0)


def test_rows_of_a_roofline(artifact: Path) -> None:
    model = counted(load(artifact))
    times = StepTimes("decode", 1e-3, 0.9e-3, {"append": (1, 1e-5), "attend": (4, 5e-4)}, 7)
    step = step_roofline(model.manifest, times, Workload.decode(1, 1000), "", LIMITS)
    attend, append = step.rows
    assert (attend.name, attend.calls, attend.moved, attend.operations) == ("attend", 4, 4 * 601200.0, 2.4e6)
    assert attend.read_share == pytest.approx(4 * 601200 / 5e-4 / 10e9)
    assert attend.multiply_share == pytest.approx(2.4e6 / 5e-4 / 200e9)
    assert best_share(attend) == (attend.read_share, "bandwidth")
    assert append.moved is None and append.intensity is None and best_share(append) is None
    assert step.overhead == pytest.approx(0.49)


@pytest.mark.parametrize(
    ("kind", "dtype", "operands"),
    [
        ("linear w4a8", "bfloat16", "int8"),
        ("linear q4g32", "bfloat16", "bf16"),
        ("linear", "float32", "f32"),
        ("rope + append + attention", "bfloat16", "bf16"),
        ("rms norm", "bfloat16", ""),
    ],
)
def test_what_a_kernel_is_held_against(kind: str, dtype: str, operands: str) -> None:
    assert multiplies_in(kind, dtype, LIMITS) == operands
    plain = MachineLimits(1, 1.0, {"f32": 1.0})  # a machine without the instructions
    assert multiplies_in(kind, dtype, plain) == ("f32" if operands else "")


def test_a_plot(tmp_path: Path, artifact: Path) -> None:
    from llmc.cli.roofline_plot import write_plot

    model = counted(load(artifact))
    times = StepTimes("decode", 1e-3, 0.9e-3, {"append": (1, 1e-5), "attend": (4, 5e-4)}, 7)
    step = step_roofline(model.manifest, times, Workload.decode(1, 1000), "1 sequence", LIMITS)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        assert "pip install matplotlib" in write_plot(tmp_path / "a.png", (step,), LIMITS)
        return
    assert "a.png" in write_plot(tmp_path / "a.png", (step,), LIMITS)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LlmcError, match="plot-unwritable"):
        write_plot(tmp_path / "a.nonsense", (step,), LIMITS)
