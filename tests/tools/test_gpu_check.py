"""tools/gpu_check.py with no GPU: what it says, what a failing section costs, the table; and every section on a stand-in."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmc import cuda_driver
from llmc.cuda_driver import CudaDevice, CudaDriver
from tools import gpu_check, gpu_peers
from tools.gpu_check import SECTIONS, main, read_lines, read_rows, table, write_line
from tools.gpu_device import FULL, TINY, Row, Simulated
from tools.gpu_kernels import Session
from tools.gpu_models import prefill_operations


def test_what_it_says_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_driver, "query", lambda: CudaDriver(0, (), "there is no NVIDIA driver"))
    assert main([]) == 2 and "there is no NVIDIA driver. Here it can --prepare" in capsys.readouterr().err
    assert main(["--only", "gemm,colour"]) == 2 and "found colour" in capsys.readouterr().err
    assert main(["--prepared", str(tmp_path), "--device", "simulator"]) == 2
    assert "is not what gpu_check --prepare wrote" in capsys.readouterr().err
    assert gpu_check.default_target() == "cuda/sm_90a"
    monkeypatch.setattr(cuda_driver, "query", lambda: CudaDriver(13000, (CudaDevice(0, "A", 86, 84, 1),)))
    assert gpu_check.default_target() == "cuda/sm_86"


def test_the_table(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    rows = [
        Row("gemm", "4096^3", 0.80, "x torch", 0.85),
        Row("gemm", "8192^3", 0.90, "x torch", 0.85),
        Row("schemes", "q8", 0.01, "relative error", 0.03, at_most=True),
        Row("model-bf16", "decode, batch 1", 0.9, "of copy", 0.85, facts={"tokens_per_second": 240.0}),
        Row("torch", "decode, max-autotune", 150.0, "tokens/s"),
        Row("gemm", "4096^3", 0.86, "x torch", 0.85),  # measured again: the later one counts
    ]
    for row in rows:
        write_line(path, json.loads(row.to_json()))
    for name in ("gemm", "torch"):
        write_line(path, {"done": name})
    write_line(path, {"failed": "flat", "why": "signal 11"})
    with path.open("a") as file:
        file.write('{"section": "gemv", "wh')  # a process that was killed while it wrote
    assert [r.value for r in read_rows(path) if r.section == "gemm"] == [0.86, 0.9]
    text = table(path)
    assert "5 of 5 targets reached; 2 of 16 sections ran" in text
    assert "decode against torch.compile" in text and "1.6 x max-autotune" in text
    assert "flat          FAILED: signal 11" in text and "gemv          not run" in text
    assert text.index("schemes") < text.index("4096^3") < text.index("model-bf16")


def test_a_section_that_fails_or_hangs_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared, results, child = tmp_path / "p", tmp_path / "r.jsonl", tmp_path / "child.py"
    prepared.mkdir()
    (prepared / "about.json").write_text("{}")
    child.write_text(
        "import os, sys, time\n"
        "name = sys.argv[sys.argv.index('--section') + 1]\n"
        "if name == 'gemm': os.kill(os.getpid(), 11)\n"
        "if name == 'flat': time.sleep(60)\n"
        "if name == 'gemv': sys.exit('ValueError: no')\n"
        "open(sys.argv[-1], 'a').write('{\"done\": \"%s\"}\\n' % name)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(child))
    monkeypatch.setattr(gpu_check, "_LEAST", 0.0)
    monkeypatch.setitem(SECTIONS, "flat", gpu_check.Section("x", "x", 0.5))
    arguments = ["--prepared", str(prepared), "--device", "simulator", "--json", str(results)]
    assert main([*arguments, "--only", "gemm,flat,gemv,quant"]) == 1
    lines = read_lines(results)
    assert [v.get("failed", v.get("done")) for v in lines] == ["gemm", "flat", "gemv", "quant"]
    assert [v.get("why", "") for v in lines] == [
        "signal 11", "no end within 0 s", "exit status 1: ValueError: no", "",
    ]  # fmt: skip
    capsys.readouterr()
    # what is done is not done again, unless asked for
    assert main([*arguments, "--only", "quant"]) == 0 and "quant: done already" in capsys.readouterr().out
    assert main([*arguments, "--only", "quant", "--again"]) == 0 and len(read_lines(results)) == 5
    assert main([*arguments, "--only", "ceilings", "--budget", "1e-9"]) in (0, 1)
    assert sys.executable  # sections run with this Python


def _session(folder: Path) -> Session:
    (folder / "models" / "bf16" / "source").mkdir(parents=True)
    (folder / "models" / "bf16" / "source" / "config.json").write_text("{}")
    return Session(Simulated(), folder, [])


def test_other_programs_that_are_not_there_or_do_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _session(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (row,) = gpu_peers.trtllm(session)
    assert row.note == "not installed: pip install tensorrt_llm" and row.reached is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def refused(folder: Path, tokens: int) -> gpu_peers.Generate:
        raise ValueError("no CUDA device\nand more")

    monkeypatch.setattr(gpu_peers, "_vllm", refused)
    (row,) = gpu_peers.vllm(session)
    assert row.note == "did not run: ValueError: no CUDA device"


def test_the_rate_of_another_program_leaves_the_prompt_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that takes a second for a call and a hundredth for a token."""
    clock = [0.0]

    def load(folder: Path, tokens: int) -> gpu_peers.Generate:
        assert (folder / "config.json").is_file()

        def generate(prompt: list[int], count: int) -> None:
            assert len(prompt) + count < tokens and max(prompt) < TINY.model[6]
            clock[0] += 1 + count / 100

        return generate

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="1.2"))
    monkeypatch.setattr(gpu_peers, "_vllm", load)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    (row,) = gpu_peers.vllm(_session(tmp_path))
    assert row.value == pytest.approx(100) and row.note == "1.2, 1 s to load"
    results = tmp_path / "r.jsonl"
    ours = Row("model-bf16", "decode, batch 1", 0.9, "of copy", 0.85, facts={"tokens_per_second": 250.0})
    for line in (ours, row):
        write_line(results, json.loads(line.to_json()))
    assert "decode against vllm" in table(results) and "2.5 x vllm" in table(results)


def test_operations_of_a_prefill() -> None:
    """8.03 G parameters less the embedding, twice per token, the head for one of them; and attention."""
    weights = 32 * (4096 * (4096 * 2 + 2 * 1024) + 3 * 4096 * 14336)
    attention = 32 * 4 * 4096 * 4096**2 / 2
    assert prefill_operations(FULL) == 2 * 4096 * weights + 2 * 4096 * 128256 + attention


@pytest.mark.slow(reason="compiles small models and simulates every kernel: some minutes")
def test_every_section_runs_on_the_stand_in(tmp_path: Path) -> None:
    prepared, results = tmp_path / "p", tmp_path / "r.jsonl"
    assert main(["--prepare", str(prepared), "--device", "simulator"]) == 0
    common = ["--prepared", str(prepared), "--device", "simulator", "--json", str(results), "--patience", "5"]
    assert main(common) == 0, table(results)
    rows = {(r.section, r.what): r for r in read_rows(results)}
    assert {section for section, _ in rows} >= {*SECTIONS} - {"torch"}
    # times mean nothing there, numbers do
    assert rows["tokens", "llama"].reached and rows["schemes", "q4g32"].reached
    assert rows["model-bf16", "logits"].reached
