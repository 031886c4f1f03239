"""How the driver and a side speak: lines of JSON over pipes. Standard library only: it runs in every environment.

A side is a class in a module of this package:

    class Side:
        def __init__(self, model: Path, threads: int, options: dict[str, str]) -> None: ...
        def start(self, prompt: list[int], batch: int) -> Logits: ...   # prefill; logits of the last token
        def step(self, tokens: list[int]) -> Logits: ...                # one more token per sequence
        def versions(self) -> dict[str, str]: ...
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]


class Side(Protocol):
    """Something that runs a model; lives in a worker process. Logits are float32 arrays [batch, vocabulary]."""

    def start(self, prompt: list[int], batch: int) -> Any:
        """Forget everything; run `prompt` in `batch` sequences; logits of the last token of each."""
        ...

    def step(self, tokens: list[int]) -> Any:
        """Append one token to each sequence; its logits."""
        ...

    def versions(self) -> dict[str, str]:
        """What ran it."""
        ...


@dataclass(frozen=True)
class Round:
    """One prompt and its greedy continuation.

    Attributes:
        prefill: seconds until the logits of the prompt's last token are there.
        decode: seconds per step, the choice of the likeliest token included.
        chosen: the first sequence's tokens.
        peak_rss: bytes of the process, so far.
    """

    prefill: float
    decode: list[float]
    chosen: list[int]
    peak_rss: int


class Worker:
    """A side in a process of its own.

    Args:
        name: for messages.
        python: interpreter of the environment that the side lives in.
        module: dotted name of the side's module.
        model: what it shall load.
        threads: of its kernels.
        options: more of its options.
    """

    def __init__(
        self, name: str, python: Path, module: str, model: Path, threads: int, options: dict[str, str]
    ) -> None:
        self.name = name
        command = [str(python), "-m", "tools.bench_sides.protocol", module, str(model), str(threads)]
        count = str(threads)
        env = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS"), count),
        }
        self._process = subprocess.Popen(
            [*command, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=env,
            cwd=ROOT,
        )
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.versions: dict[str, str] = self._read()["versions"]

    def round(self, prompt: list[int], tokens: int, batch: int = 1) -> Round:
        """Prefill `prompt` in `batch` equal sequences, then feed back the likeliest token `tokens` times."""
        return Round(**self._ask({"prompt": prompt, "tokens": tokens, "batch": batch}))

    def logits(self, prompt: list[int]) -> list[float]:
        """Logits of the prompt's last token."""
        row: list[float] = self._ask({"prompt": prompt, "logits": True})["logits"]
        return row

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _read says why
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        code = self._process.wait()
        self._listener.join(timeout=5)
        why = "".join(self._said[-15:]).rstrip()
        raise SideFailed(f"the {self.name} side ended with code {code}:\n{why}")

    def _listen(self) -> None:
        """Keep what the process says; it is shown if the process ends early."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line)
            del self._said[:-200]


class SideFailed(Exception):
    """A side's process ended before its time; the message holds the end of its output."""


def serve(module: str, model: Path, threads: int, options: dict[str, str]) -> None:
    """Body of a worker process: answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    side: Side = importlib.import_module(module).Side(model, threads, options)
    print(json.dumps({"versions": side.versions()}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("logits"):
            row = [float(x) for x in side.start(request["prompt"], 1)[0]]
            print(json.dumps({"logits": row}), file=answers, flush=True)
            continue
        done = _round(side, request["prompt"], request["tokens"], request["batch"])
        print(json.dumps(done), file=answers, flush=True)


def _round(side: Side, prompt: list[int], tokens: int, batch: int) -> dict[str, Any]:
    start = time.perf_counter()
    logits = side.start(prompt, batch)
    prefill = time.perf_counter() - start
    decode, chosen = [], []
    for _ in range(tokens):
        start = time.perf_counter()
        likeliest = [int(i) for i in logits.argmax(-1)]
        logits = side.step(likeliest)
        decode.append(time.perf_counter() - start)
        chosen.append(likeliest[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    return {"prefill": prefill, "decode": decode, "chosen": chosen, "peak_rss": peak_bytes}


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
