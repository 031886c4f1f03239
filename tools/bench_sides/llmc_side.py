"""An artifact through llmc's runtime."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench_sides.protocol import ROOT


class Side:
    """See protocol.Side; `model` is the artifact."""

    def __init__(self, model: Path, threads: int, options: dict[str, str]) -> None:
        import llmc

        self._model = llmc.load(model, threads=threads, check_hashes=False)
        self._sequences: list[Any] = []

    def start(self, prompt: list[int], batch: int) -> Any:
        for sequence in self._sequences:
            sequence.free()
        self._sequences = [self._model.new_sequence() for _ in range(batch)]
        return self._model.step([(sequence, prompt) for sequence in self._sequences])

    def step(self, tokens: list[int]) -> Any:
        return self._model.step([(s, [t]) for s, t in zip(self._sequences, tokens, strict=True)])

    def versions(self) -> dict[str, str]:
        manifest = self._model.manifest
        return {"llmc": manifest.llmc_version, "tvm": manifest.tvm_version, "preset": manifest.target.preset}


def compile_artifact(model: Path, artifact: Path, options: list[str]) -> float:
    """Compile `model` with the given options of llmc compile; seconds that it took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "llmc", "compile", str(model), "-o", str(artifact), "--verify", "off"]
    done = subprocess.run([*command, "--quiet", *options], check=False, cwd=ROOT, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"bench: llmc compile failed with code {done.returncode}; see its output above")
    return time.perf_counter() - start


def weight_bytes(artifact: Path) -> int:
    """Bytes of the packed weights."""
    from llmc.inspect import inspect

    return sum(entry.nbytes for entry in inspect(artifact).manifest.params)
