"""A side for test_bench.py: its logits like the number of tokens so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class Side:
    def __init__(self, model: Path, threads: int, options: dict[str, str]) -> None:
        if model.name == "broken":
            raise SystemExit(f"no such model: {model}")
        print("noise on stdout")
        self._threads, self._length, self._batch = threads, 0, 1

    def start(self, prompt: list[int], batch: int) -> Any:
        self._length, self._batch = len(prompt), batch
        return self._logits()

    def step(self, tokens: list[int]) -> Any:
        if len(tokens) != self._batch or any(t != self._length for t in tokens):
            raise SystemExit(f"fed with {tokens} after {self._length} tokens")
        self._length += 1
        return self._logits()

    def versions(self) -> dict[str, str]:
        return {"stub": str(self._threads)}

    def _logits(self) -> Any:
        return np.eye(64, dtype=np.float32)[[self._length] * self._batch]
