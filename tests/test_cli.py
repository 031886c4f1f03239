"""The command line: options reach the pipeline, errors become sentences and exit codes, tables hold the facts."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmc.artifact import (
    LIBRARY,
    MANIFEST,
    SCHEMA,
    FunctionEntry,
    KernelEntry,
    Limits,
    Manifest,
    ModelInfo,
    ParamEntry,
    QualityReport,
    TargetInfo,
    TensorSpec,
    sha256_file,
)
from llmc.cli.app import app
from llmc.cli.compile import quality_text
from llmc.cli.format import human_bytes, human_count
from llmc.cli.guard import guard
from llmc.cli.progress import timing_table
from llmc.errors import LlmcError
from llmc.inspect import inspect
from llmc.kv_plan import KVGroup, KVKind, KVPlan
from llmc.link import embed_manifest, run_cxx
from llmc.runtime.results import GenerateResult, Memory, Timings
from llmc.spec import CompileSpec, DType, Verify
from llmc.stages import StageRunner, Timing

ROOT = Path(__file__).resolve().parent.parent
WIDE = {**os.environ, "COLUMNS": "240", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}

MANIFEST_OF_TEST = Manifest(
    schema=SCHEMA,
    llmc_version="0.1.0",
    tvm_version="0.27.0",
    created="2026-11-21T00:00:00+00:00",
    spec={},
    model=ModelInfo("some/checkpoint", "LlamaForCausalLM", "llama", 1000, 6, 8_030_261_248, "bfloat16"),
    target=TargetInfo("cpu", "cpu/x86-64-v3", "x86_64-unknown-linux-gnu", "x86-64-v3", ("avx2", "fma")),
    limits=Limits(4096, 16, 512),
    kv_plan=KVPlan(
        32,
        (
            KVGroup("g0", KVKind.FULL, (0, 2, 3), 4, 64, 64, 0, 0, "bfloat16"),
            KVGroup("g1", KVKind.SLIDING_WINDOW, (1, 4), 4, 64, 64, 1024, 0, "bfloat16"),
        ),
        shared=((5, 3),),
    ),
    functions=(
        FunctionEntry(
            "step",
            (TensorSpec("input_ids", "int32", ("T",)),),
            (TensorSpec("logits", "float32", ("R", 1000)),),
        ),
    ),
    params=tuple(
        ParamEntry(f"w{i}", (8, 16), "bfloat16", "weights-00001.safetensors", 64 * i, 256, "rows", ())
        for i in range(20)
    ),
    quality=QualityReport("sample", 64, 1.5e-5, 2.5e-5, top1_agreement=1.0, tolerance=2e-4),
    versions={"torch": "2.13.0"},
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"COLUMNS": "240", "NO_COLOR": "1", "LLMC_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LLMC_DEBUG", raising=False)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder with a manifest and weights, but no code."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "weights-00001.safetensors").write_bytes(bytes(5120))
    files = {"weights-00001.safetensors": sha256_file(folder / "weights-00001.safetensors")}
    (folder / MANIFEST).write_text(dataclasses.replace(MANIFEST_OF_TEST, files=files).as_text())
    return folder


def llmc(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


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


# --- compile ---------------------------------------------------------------------------------------------------


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


# --- exit codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (LlmcError("x-y", "Found 3.", hint="Use 4."), 2, "llmc: Found 3. Use 4. [x-y]"),
        (LlmcError("internal-error", "Pass A failed."), 1, "llmc: Pass A failed. [internal-error]"),
        (ValueError("boom"), 1, "llmc: ValueError: boom. This is a bug in llmc"),
        (KeyboardInterrupt(), 130, "llmc: interrupted."),
    ],
)
def test_guard(
    error: BaseException,
    code: int,
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import typer

    with pytest.raises(typer.Exit) as e, guard():
        raise error
    assert e.value.exit_code == code
    captured = capsys.readouterr()
    assert captured.err.startswith(text) and "Traceback" not in captured.err and captured.out == ""
    monkeypatch.setenv("LLMC_DEBUG", "1")
    with pytest.raises(typer.Exit), guard():
        raise error
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_help_is_fast_and_needs_neither_tvm_nor_torch(tmp_path: Path) -> None:
    for name in ("tvm", "torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('must not be imported')")
    start = time.perf_counter()
    for arguments in (["--help"], ["compile", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-m", "llmc", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**WIDE, "PYTHONPATH": str(tmp_path)},
            check=True,
        )
        assert "llmc" in done.stdout
    # three times well under a second each; generous, because test machines are shared
    assert time.perf_counter() - start < 6


def test_ctrl_c_during_compile_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    # a pipeline that hangs in the middle of writing, in a process of its own
    (tmp_path / "slow.py").write_text(
        "import sys, time, llmc.pipeline\n"
        "from llmc.writer import ArtifactWriter\n"
        "from llmc.cli import main\n"
        "def compile_model(model, output, **_):\n"
        "    with ArtifactWriter(output) as w:\n"
        "        (w.folder / 'model.so').write_text('half')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "llmc.pipeline.compile_model = compile_model\n"
        "sys.argv = ['llmc', 'compile', 'm', '-o', sys.argv[1], '-q']\n"
        "main()\n"
    )
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "out" / "demo")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**WIDE, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code, errors
        assert b"Traceback" not in errors
        assert not (tmp_path / "out").exists()


# --- run -------------------------------------------------------------------------------------------------------


class Stream:
    """Stands in for llmc.runtime.generate.TextStream."""

    def __init__(self, result: GenerateResult) -> None:
        self.result = result

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> Any:
        return iter(["hello ", "[b]wörld[/b]"])


class FakeModel:
    """Stands in for llmc.runtime.model.Model; remembers what it was asked."""

    def __init__(self, has_tokenizer: bool = True) -> None:
        self.has_tokenizer = has_tokenizer
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def generate(self, prompt: Any, stream: bool = False, **sampling: Any) -> Any:
        self.asked.append((prompt, sampling))
        result = GenerateResult("", (5, 6, 7), "length", None, 4, Timings(0.5, 0.25, 4, 2))
        return Stream(result) if stream else result

    def memory(self) -> Memory:
        return Memory(1 << 20, 1 << 20, 1 << 30, 2 << 20, 0, 3 << 20, 4 << 20)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    import llmc.runtime.model

    fake = FakeModel()
    monkeypatch.setattr(llmc.runtime.model, "load", lambda *_, **__: fake)
    return fake


def test_run_streams_text_and_reports_speed(model: FakeModel) -> None:
    done = llmc(
        "run", "dist", "def f", "--temperature", "0.5", "--stop", "a", "--stop", "b", "--max-tokens", "3"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout == "hello [b]wörld[/b]\n"
    assert done.stderr == (
        "[prompt 4 tokens, 8.0 tok/s | decode 2 steps, 8.0 tok/s | "
        "memory 3.0 MiB (weights 1.0 MiB, KV cache 2.0 MiB) | ended by length]\n"
    )
    ((prompt, sampling),) = model.asked
    assert prompt == "def f" and sampling["stop"] == ["a", "b"]
    assert {k: v for k, v in sampling.items() if v is not None and k != "stop"} == {
        "max_tokens": 3,
        "temperature": 0.5,
    }


def test_run_chat_stdin_and_token_ids(model: FakeModel) -> None:
    assert llmc("run", "dist", "hi", "--chat").exit_code == 0
    assert CliRunner().invoke(app, ["run", "dist", "-"], input="from stdin").exit_code == 0
    assert llmc("run", "dist", "1, 2 3", "--token-ids").stdout == "5 6 7\n"
    assert [prompt for prompt, _ in model.asked] == [
        [{"role": "user", "content": "hi"}],
        "from stdin",
        [1, 2, 3],
    ]


def test_run_mistakes(model: FakeModel) -> None:
    assert llmc("run", "dist", "1 two", "--token-ids").stderr.endswith("[token-ids]\n")
    assert llmc("run", "dist", "1", "--token-ids", "--chat").stderr.endswith("[chat-token-ids]\n")
    model.has_tokenizer = False
    done = llmc("run", "dist", "hi")
    assert done.exit_code == 2 and done.stderr.endswith("[no-tokenizer]\n")


def test_run_without_an_artifact(tmp_path: Path) -> None:
    done = llmc("run", tmp_path / "nothing", "hi")
    assert done.exit_code == 2 and done.stderr.endswith("[artifact-missing]\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "from llmc.cli.guard import guard\nimport sys, typer\n"
        "def work():\n    with guard():\n        while True:\n            print('x' * 9999, flush=True)\n"
        "typer.run(work)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=WIDE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 141


# --- inspect ---------------------------------------------------------------------------------------------------


def test_inspect_shows_everything(artifact: Path) -> None:
    done = llmc("inspect", artifact)
    assert done.exit_code == 0, done.output
    for text in (
        "some/checkpoint: LlamaForCausalLM (llama), 6 layers, 8.03 B parameters, vocabulary 1000",
        "cpu/x86-64-v3 (x86_64-unknown-linux-gnu, x86-64-v3)",
        "avx2 fma",
        "4096 tokens per sequence, 16 sequences and 512 tokens per step",
        "pages of 32 tokens, 5.0 KiB per token",
        "sliding_window 1024",
        "3 (0, 2-3)",
        "layer 5 reads layer 3's",
        "20 tensors, 5.0 KiB (bfloat16 5.0 KiB)",
        "8 more; --params lists all",
        "2.13.0",
    ):
        assert text in done.stdout, text
    assert "-> logits" in done.stdout and "Rx1000" in done.stdout
    assert "w19" not in done.stdout and "w19" in llmc("inspect", artifact, "--params").stdout
    assert "problem" not in done.stdout


def test_inspect_json_is_the_manifest(artifact: Path) -> None:
    done = llmc("inspect", artifact, "--json")
    assert Manifest.from_text(done.stdout, "stdout").model == MANIFEST_OF_TEST.model
    assert json.loads(done.stdout)["schema"] == SCHEMA


def test_inspect_names_missing_and_changed_files(artifact: Path) -> None:
    assert inspect(artifact, check_hashes=True).problems == ()
    weights = artifact / "weights-00001.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[77] ^= 1
    weights.write_bytes(raw)
    assert inspect(artifact, check_hashes=True).problems == (
        "weights-00001.safetensors has changed since the artifact was written",
    )
    weights.unlink()
    assert "weights-00001.safetensors is missing" in llmc("inspect", artifact).stdout


def test_inspect_a_library_alone(artifact: Path, tmp_path: Path) -> None:
    run_cxx(
        ["-shared", "-o", str(artifact / LIBRARY), str(embed_manifest(MANIFEST_OF_TEST.as_text(), tmp_path))]
    )
    assert inspect(artifact / LIBRARY).manifest == MANIFEST_OF_TEST


@pytest.mark.parametrize("text", ["", "{", "[]", "\x80", '{"schema": 99}', f'{{"schema": {SCHEMA}}}'])
def test_inspect_refuses_a_damaged_manifest(artifact: Path, text: str) -> None:
    (artifact / MANIFEST).write_bytes(text.encode("latin1"))
    done = llmc("inspect", artifact)
    assert done.exit_code == 2
    assert done.stderr.endswith(("[manifest-corrupt]\n", "[manifest-version]\n"))


KERNELS = (
    KernelEntry("embedding", "embedding", 1, 0.0, "4*T", "100*T", "0"),
    KernelEntry("linear_512_256", "linear", 6, 1.0, "262144 + 512*T", "1024*T", "262144*T"),
    KernelEntry("attention_0", "attention", 4, 0.5, "512*C1024", "512*T", "1024*P1024"),
)


def with_kernels(folder: Path, *kernels: KernelEntry) -> Path:
    function = MANIFEST_OF_TEST.functions[0]
    both = tuple(dataclasses.replace(function, name=n, kernels=kernels) for n in ("step", "decode"))
    manifest = dataclasses.replace(MANIFEST_OF_TEST, functions=both)
    (folder / MANIFEST).write_text(manifest.as_text())
    assert Manifest.from_text(manifest.as_text(), "") == manifest
    return folder


def test_inspect_kernels(artifact: Path) -> None:
    done = llmc("inspect", with_kernels(artifact, *KERNELS), "--kernels", "--context", "2000")
    assert done.exit_code == 0, done.output
    decode, step = done.stdout.split("step: ")
    assert "decode: 11 kernels per step, 1.5 per block, for 1 sequence of 2000 tokens" in decode
    rows = {line.split()[0]: line for line in decode.splitlines() if line.strip()}
    assert rows["linear_512_256"].split()[1:8] == ["linear", "6", "1", "257.5", "KiB", "262.14", "K"]
    assert "262.14K + 1.54K T" in rows["linear_512_256"] and "262.14K T" in rows["linear_512_256"]
    # the window bounds what is read: 1024 of 2000 tokens
    assert rows["attention_0"].split()[1:8] == ["attention", "4", "0.5", "512.5", "KiB", "1.05", "M"]
    total = 104 + 6 * (262144 + 1536) + 4 * (512 * 1024 + 512)
    assert human_bytes(total) in rows["all"]
    assert "a prompt of 512 tokens" in step


def test_inspect_kernels_mistakes(artifact: Path) -> None:
    def refused(*arguments: str, ref: str) -> str:
        done = llmc("inspect", artifact, *arguments)
        assert done.exit_code == 2 and done.stderr.endswith(f"[{ref}]\n")
        return str(done.stderr)

    refused("--kernels", ref="no-kernels")
    refused("--context", "5", ref="context")
    with_kernels(artifact, *KERNELS)
    assert "1 to 4096" in refused("--kernels", "--context", "5000", ref="context")
    with_kernels(artifact, dataclasses.replace(KERNELS[1], read="all of it"))
    assert "linear_512_256" in refused("--kernels", ref="manifest-corrupt")


# --- numbers ---------------------------------------------------------------------------------------------------


def test_numbers() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [human_count(n) for n in (7, 5_000, 8_030_261_248)] == ["7", "5.00 K", "8.03 B"]


def test_timing_table_shows_a_stage_that_failed_half_way() -> None:
    table = timing_table([Timing("capture", "", 1.0, 1 << 20), Timing("lower", "FuseQKV", 0.5, 2 << 20)])
    assert list(table.columns[0].cells) == [
        "[bold]capture[/bold]",
        "[bold]lower[/bold] (failed)",
        "  FuseQKV",
        "total",
    ]
