"""Time and memory of compiling graphs of production size, without weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def compile_meta(config: dict[str, object], folder: Path) -> tuple[float, float]:
    """(processor seconds, peak RSS in GB) of ``llmc compile --meta-weights`` in a process of its own.

    Processor time instead of wall time: other load on the machine does not count, and two cores can only be faster.
    """
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arguments = ["compile", str(folder), "-o", str(folder / "out"), "--meta-weights"]
    process = subprocess.Popen([sys.executable, "-m", "llmc", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def test_8b(tmp_path: Path) -> None:
    seconds, gigabytes = compile_meta(LLAMA_8B, tmp_path)
    assert seconds < 60
    assert gigabytes < 1.5


@pytest.mark.slow
def test_70b(tmp_path: Path) -> None:
    """slow: 80 layers take about a minute."""
    seconds, gigabytes = compile_meta(LLAMA_70B, tmp_path)
    assert seconds < 150
    assert gigabytes < 2.5
