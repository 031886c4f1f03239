"""tools/bench.py: the talk with its sides, what it reports, and the GGUF that it writes."""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc.limits import MachineLimits
from tools import bench
from tools.bench_sides import llama_cpp_convert as gguf
from tools.bench_sides import peers as peer_table
from tools.bench_sides.check import distance
from tools.bench_sides.peers import PEERS, Peer, PeerUnavailable, converted, interpreter
from tools.bench_sides.protocol import Round, SideFailed, Worker
from tools.bench_sides.results import Weights, parameters, prefill_operations, spread, summary
from tools.bench_sides.shapes import prompt_of
from tools.bench_sides.table import compare_batch, compare_context, notes, sides_table

LIMITS = MachineLimits(2, 20e9, {"f32": 1e12, "bf16": 4e12})
STUB = "tests.tools.bench_stub"


def test_a_side_runs_rounds() -> None:
    worker = Worker("stub", Path(sys.executable), STUB, Path("some"), 3, {})
    try:
        assert worker.versions == {"stub": "3"}
        done = worker.round([7] * 5, 3, batch=2)
        assert done.chosen == [5, 6, 7] and len(done.decode) == 3
        assert done.prefill > 0 and min(done.decode) > 0 and done.peak_rss > 1 << 20
        assert worker.round([1, 2], 1).chosen == [2]
        assert worker.logits([1, 2, 3]).index(1.0) == 3
    finally:
        worker.close()


def test_a_side_that_ends_says_why() -> None:
    with pytest.raises(SideFailed, match=r"the stub side ended with code 1:\n.*no such model: broken"):
        Worker("stub", Path(sys.executable), STUB, Path("broken"), 1, {})


def test_sizes_of_the_shapes() -> None:
    # as published: Llama-3.2-1B and Qwen2.5-0.5B
    assert parameters("llama-1b") == 1_235_814_400
    assert parameters("qwen-0.5b") == 494_032_768
    head = 128256 * 2048
    one, two = prefill_operations("llama-1b", 1), prefill_operations("llama-1b", 2)
    assert one == 2 * (1_235_814_400 - 2048)  # every weight but the last norm
    assert two - one == one - 2 * head


def test_a_summary() -> None:
    rounds = [Round(1.0, [0.1, 0.2], [], 10), Round(3.0, [0.2, 0.3], [], 30), Round(2.0, [0.2, 0.2], [], 20)]
    found = summary(rounds, 512, "x", Weights("llama-1b", 800_000_000), LIMITS)
    assert found["prefill_tokens_per_second"] == 256 and found["decode_tokens_per_second"] == 5
    assert found["bits_per_weight"] == pytest.approx(5.179, abs=1e-3)
    assert found["decode_share_of_read_bandwidth"] == pytest.approx(0.8e9 / 0.2 / 20e9)
    assert found["prefill_share_of_multiply_peak"] == pytest.approx(
        prefill_operations("llama-1b", 512) / 2 / 4e12
    )
    assert found["peak_rss_bytes"] == 30
    assert spread([1.0]) == 0 and spread([9.0, 10.0, 11.0]) == pytest.approx(0.1)


def result() -> dict:
    rounds = [Round(1.0, [0.1], [], 10)]
    sides = {
        name: summary(rounds, 512, kind, Weights("llama-1b", nbytes), LIMITS)
        for name, kind, nbytes in (("llmc", "w4a8", 770), ("near", "Q4", 800), ("far", "int4", 820))
    }
    return {
        "shape": "llama-1b", "quant": "w4a8", "threads": 2, "prompt": 512, "rounds": 1, "tokens": 1,
        "machine": "m", "sides": sides, "ratios": {n: {"prefill": 1.5, "decode": 2.0} for n in ("near", "far")},
        "missing": {"gone": "gone cannot be installed: no network\nand more"}, "limits": LIMITS.to_json(),
        "load_average": 3.0, "compile_seconds": 1.0, "versions": {},
        "batch": compare_batch(8, [0.1], [0.16]),
        "context": compare_context(512, 8192, [0.1], [0.13], [60.0], 1 << 30),
    }  # fmt: skip


def test_notes_say_what_does_not_compare() -> None:
    text = "\n".join(notes(result()))
    assert "not the same size: far has" in text and "not the same size: near" not in text
    assert "fastest side of at most llmc's size (and 5 %): prefill 1.50 (near), decode 2.00 (near)" in text
    assert "gone was not measured: gone cannot be installed: no network" in text and "and more" not in text
    assert "batch 8: 50.0 tok/s, 5.00 times" in text
    assert "context 8192: 130.00 ms per step, 1.30 times that at 512" in text
    assert "busy: load average 3.0" in text and "read 20.0 GB/s" in text
    assert sides_table(result()).row_count == 5


def test_formats_of_peers() -> None:
    assert bench.llmc_bits("w4a8", "bf16") == 4 and bench.llmc_bits("none", "bf16") == 16
    assert bench.peer_format(PEERS["llama.cpp"], 4) == "Q4_0"
    with pytest.raises(PeerUnavailable, match="no format of 3 bits"):
        bench.peer_format(PEERS["openvino"], 3)


def test_a_comma_list() -> None:
    parse = bench._names(PEERS)
    assert parse("openvino, llama.cpp") == ["openvino", "llama.cpp"]
    for wrong in ("onnx", "openvino,onnx", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not one of llama\.cpp"):
            parse(wrong)


def test_an_environment_that_cannot_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **options: object) -> argparse.Namespace:
        if "pip" in command:
            print("ERROR: No matching distribution found for nothing==1", file=options["stdout"], flush=True)
        return argparse.Namespace(returncode="pip" in command)

    monkeypatch.setattr(peer_table.subprocess, "run", fail)
    with pytest.raises(PeerUnavailable, match=r"p cannot be installed: ERROR: No matching .*p\.log"):
        interpreter(Peer("p", "s", ("nothing==1",)), tmp_path)
    assert not (tmp_path / "envs" / "p" / "llmc-bench-installed.txt").exists()


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    peer = Peer("p", "s", convert="tools.bench_sides.nothing")
    with pytest.raises(PeerUnavailable, match=r"p cannot convert m to K: .*No module named"):
        converted(peer, Path(sys.executable), model, "K")
    assert sorted(f.suffix for f in tmp_path.iterdir()) == ["", ".log"]


def test_interleaved_rows_rotate_alike() -> None:
    """Rotating halves of the checkpoint's q equals rotating neighbours of the interleaved one, reordered."""
    heads, d, tokens = 2, 8, 5
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((heads * d, 6)), rng.standard_normal((tokens, 6))
    angle = np.arange(tokens)[:, None, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle), np.sin(angle)
    q = (x @ weight.T).reshape(tokens, heads, d)
    a, b = q[..., : d // 2], q[..., d // 2 :]
    halves = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    p = (x @ gguf.interleave(weight, heads).T).reshape(tokens, heads, d)
    a, b = p[..., ::2], p[..., 1::2]
    neighbours = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    assert np.allclose(halves, neighbours)


def test_reading_a_checkpoint(tmp_path: Path) -> None:
    values = np.array([[1.0, -2.0]], np.float32)
    header = {
        "__metadata__": {},
        "a": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1, 2], "data_offsets": [4, 12]},
    }
    text = json.dumps(header).encode()
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    (tmp_path / "m.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + bits.tobytes() + values.tobytes()
    )
    found = {name: (dtype, raw) for name, dtype, raw in gguf.tensors(tmp_path)}
    assert found["a"][0] == "BF16" and np.array_equal(found["a"][1], bits)
    assert np.array_equal(found["b"][1], values)


def test_prompts_are_equal_for_all_sides() -> None:
    assert prompt_of("tiny", 4) == [7919 * i % 512 for i in (1, 2, 3, 4)]
    assert distance(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == pytest.approx(2**0.5)


@pytest.mark.slow
def test_a_run_beside_transformers(tmp_path: Path) -> None:
    command = [sys.executable, "tools/bench.py", "--shape", "tiny", "--quant", "none,q4g32", "--prompt", "24"]
    command += ["--tokens", "3", "--rounds", "2", "--batch", "2", "--context", "40", "--threads", "1"]
    command += ["--against", "transformers", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        command,
        cwd=bench.ROOT,
        env={**os.environ, "LLMC_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, small = json.loads((tmp_path / "out.json").read_text())
    for found in (whole, small):
        assert set(found["sides"]) == {"llmc", "transformers"} and set(found["ratios"]) == {"transformers"}
        assert found["batch"]["size"] == 2 and found["context"]["long"] == 40 and found["missing"] == {}
    assert whole["sides"]["llmc"]["bits_per_weight"] == pytest.approx(16, abs=0.1)
    assert 4.5 < small["sides"]["llmc"]["bits_per_weight"] < 5.2
    assert "not the same size: transformers" in done.stdout
