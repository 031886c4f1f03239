"""`llmc compile`: options reach the pipeline, mistakes become sentences, and what is printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llmc.artifact import (
    MANIFEST,
    QualityReport,
)
from llmc.cli.compile import quality_text
from llmc.cli.progress import timing_table
from llmc.spec import CompileSpec, DType, Verify
from llmc.stages import StageRunner, Timing
from tests.cli.conftest import MANIFEST_OF_TEST, llmc


class Pipeline:
    """Stands in for llmc.pipeline.compile_model: runs two stages and writes a manifest."""

    def __init__(self) -> None:
        self.calls: list[tuple[CompileSpec, Path, dict[str, Any]]] = []

    def __call__(self, model: str, output: Path, *, spec: CompileSpec, progress: Any, **options: Any) -> None:
        assert model == spec.model
        self.calls.append((spec, output, options))
        with StageRunner(
            spec, stages=("capture", "build"), progress=progress, time_passes=options["time_passes"]
        ) as runner:
            runner.run("capture", lambda: runner.run_pass("capture", "Import", str, 1))
            runner.run("build", lambda: 1)
        if options["stop_after"] is None:
            output.mkdir()
            (output / MANIFEST).write_text(MANIFEST_OF_TEST.as_text())


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    import llmc.pipeline

    fake = Pipeline()
    monkeypatch.setattr(llmc.pipeline, "compile_model", fake)
    return fake


def test_compile_prints_spec_progress_and_summary(pipeline: Pipeline, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = llmc(
        "compile", "some/checkpoint", "-o", output, "--dtype", "bf16", "--verify", "full", "--page-size", "64"
    )
    assert done.exit_code == 0, done.output
    ((spec, where, options),) = pipeline.calls
    assert spec == CompileSpec("some/checkpoint", dtype=DType.BF16, verify=Verify.FULL, page_size=64)
    assert where == output
    assert options == {"dump_ir": None, "time_passes": False, "stop_after": None, "tune_progress": None}
    assert spec.hash() in done.stdout and "the model's" in done.stdout
    assert "[1/2] capture" in done.stderr and "[2/2] build" in done.stderr
    assert "LlamaForCausalLM, 8.03 B parameters" in done.stdout
    assert "prefill 1.50e-05, decode 2.50e-05 of 2.00e-04 allowed, same top token 100.0 %" in done.stdout
    assert str(output) in done.stdout
    assert "Time per stage" not in done.output


def test_compile_quiet_prints_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    assert llmc("compile", "m", "-o", tmp_path / "out", "-q").output == ""


def test_compile_time_passes_and_stop_after(pipeline: Pipeline, tmp_path: Path) -> None:
    done = llmc("compile", "m", "--stop-after", "build", "--time-passes", "--dump-ir", tmp_path / "ir")
    assert done.exit_code == 0, done.output
    rows = [line.split()[0] for line in done.stderr.splitlines() if line.split()[-1:] == ["MiB"]]
    assert rows[-4:] == ["capture", "Import", "build", "total"]
    assert "stopped after stage build" in done.stdout
    assert pipeline.calls[0][2]["dump_ir"] == tmp_path / "ir"


def test_compile_reads_a_spec_and_options_win(pipeline: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text('model = "a/b"\ndtype = "f16"\nmax_batch = 4\n')
    done = llmc("compile", "--spec", file, "--max-batch", "8", "--meta-weights", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert pipeline.calls[0][0] == CompileSpec("a/b", dtype=DType.F16, max_batch=8, meta_weights=True)


@pytest.mark.parametrize(
    ("arguments", "ref"),
    [
        (["compile"], "no-model"),
        (["compile", "m"], "no-output"),
        (["compile", "m", "-o", "OUT", "--dtype", "int3"], "unknown-dtype"),
        (["compile", "m", "-o", "OUT", "--dtype", "int8"], "unknown-dtype"),
        (["compile", "m", "-o", "OUT", "--kv-dtype", "int4"], "unknown-kv-dtype"),
        (["compile", "m", "-o", "OUT", "--verify", "maybe"], "unknown-verify"),
        (["compile", "m", "-o", "OUT", "--quant", "q5"], "unknown-scheme"),
        (["compile", "m", "-o", "OUT", "--quant-head", "int3"], "unknown-scheme"),
        (["compile", "m", "-o", "OUT", "--quant", "q4g32", "--quant-method", "gptq"], "method-without-text"),
        (["compile", "m", "-o", "OUT", "--quant-method", "gptq", "--calib", "t"], "method-without-weights"),
        (["compile", "m", "-o", "OUT", "--quant", "auto"], "quant-auto"),
        (["compile", "m", "-o", "OUT", "--max-kl", "0.1"], "gate-without-text"),
        (["compile", "m", "-o", "OUT", "--eval", "t", "--max-ppl-increase", "-1%"], "bound"),
        (["compile", "m", "-o", "OUT", "--page-size", "7"], "page-size"),
        (["compile", "m", "-o", "OUT", "--stop-after", "lunch"], "unknown-stage"),
        (["compile", "m", "-o", "OUT", "--disable-pass", "LowerLinear"], "pass-not-optional"),
        (["compile", "--spec", "OUT/missing.toml", "-o", "OUT"], "spec-unreadable"),
        (["compile", "m", "-o", "FULL"], "output-not-an-artifact"),
        (["inspect", "OUT"], "no-artifact"),
        (["inspect", "FULL"], "no-artifact"),
        (["inspect", "FULL/thesis.txt"], "library-corrupt"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments: list[str], ref: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    filled = [
        a.replace("OUT", str(tmp_path / "out")).replace("FULL", str(tmp_path / "full")) for a in arguments
    ]
    done = llmc(*filled)
    assert done.exit_code == 2
    assert done.stderr.startswith("llmc: ") and done.stderr.endswith(f"[{ref}]\n")
    assert "Traceback" not in done.output and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_quality_names_the_error_that_has_the_bound() -> None:
    exact = QualityReport("sample", 40, 1e-5, 2e-5, relative_error=1e-6, tolerance=2e-4)
    assert quality_text(exact) == (
        "checked (sample, 40 tokens), largest logit error prefill 1.00e-05, decode 2.00e-05 of 2.00e-04 allowed, "
        "relative error 1.00e-06"
    )
    coarse = dataclasses.replace(exact, relative_error=0.006, reference_noise=0.008, tolerance=0.02)
    assert quality_text(coarse).endswith(
        "decode 2.00e-05, relative error 6.00e-03 of 2.00e-02 allowed, the source itself rounds to 8.00e-03"
    )
    assert quality_text(QualityReport("off", note="why")) == "not checked (why)"


def test_timing_table_shows_a_stage_that_failed_half_way() -> None:
    table = timing_table([Timing("capture", "", 1.0, 1 << 20), Timing("lower", "FuseQKV", 0.5, 2 << 20)])
    assert list(table.columns[0].cells) == [
        "[bold]capture[/bold]",
        "[bold]lower[/bold] (failed)",
        "  FuseQKV",
        "total",
    ]
