"""An artifact for another processor, run by an emulated Python: what the check at the end of a compile needs of a model.

LLMC_EMULATOR is the command of a Python that runs as on the target and can import llmc, numpy and TVM's runtime
(``python tools/run_aarch64.py --command`` prints one). It is started with this file and answers on its standard streams: a
line of JSON for each call; for each array of logits a line of JSON with its shape, and its float32 values.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llmc.artifact import MANIFEST, Manifest
from llmc.errors import LlmcError


class EmulatedModel:
    """logits() and logits_batch() of an artifact, computed by an emulated machine.

    Args:
        folder: the artifact.
        command: what starts the emulated Python.

    Raises:
        LlmcError: "emulator-failed": it cannot be started, or ended; its last line of errors is shown.
    """

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.manifest = Manifest.from_text(
            (folder / MANIFEST).read_text(encoding="utf-8"), str(folder / MANIFEST)
        )
        self._command = list(command)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the server
        try:
            self._server = subprocess.Popen(
                [*command, "-m", "llmc.emulated", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        except OSError as e:
            raise self._failure(str(e.strerror)) from None

    def logits(self, token_ids: Sequence[int], *, prefill: int | None = None) -> np.ndarray[Any, Any]:
        """See llmc.runtime.model.Model.logits."""
        return self.logits_batch([token_ids], prefill=None if prefill is None else [prefill])[0]

    def logits_batch(
        self, batch: Sequence[Sequence[int]], *, prefill: Sequence[int] | None = None
    ) -> list[np.ndarray[Any, Any]]:
        """See llmc.runtime.model.Model.logits_batch."""
        assert self._server.stdin is not None and self._server.stdout is not None
        call = {
            "batch": [[int(i) for i in ids] for ids in batch],
            "prefill": None if prefill is None else list(prefill),
        }
        try:
            self._server.stdin.write(json.dumps(call).encode() + b"\n")
            self._server.stdin.flush()
            return [self._array() for _ in batch]
        except (OSError, ValueError):
            raise self._failure(self._last_words()) from None

    def _array(self) -> np.ndarray[Any, Any]:
        """The next array; ValueError if there is no whole one."""
        assert self._server.stdout is not None
        shape = json.loads(self._server.stdout.readline())
        raw = self._server.stdout.read(4 * math.prod(shape))
        return np.frombuffer(raw, np.float32).reshape(shape)

    def close(self) -> None:
        """End the emulated machine."""
        assert self._server.stdin is not None and self._server.stdout is not None
        with contextlib.suppress(OSError):  # it may have ended already
            self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()
        self._errors.close()

    def __enter__(self) -> EmulatedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        """What the server said before it ended; it is ended if it has not."""
        self._server.kill()
        code = self._server.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].rstrip(".") if lines else f"exit code {code}"

    def _failure(self, why: str) -> LlmcError:
        return LlmcError(
            "emulator-failed",
            f"The artifact could not be checked in the emulator {self._command[0]}: {why}.",
            hint="Correct or unset LLMC_EMULATOR, or compile with --verify off.",
        )


def serve(folder: Path) -> None:
    """Answer calls until the other side closes the stream."""
    from llmc.runtime.model import load

    replies, sys.stdout = sys.stdout.buffer, sys.stderr
    # the files were hashed while they were written
    model = load(folder, check_hashes=False)
    for line in sys.stdin.buffer:
        for logits in model.logits_batch(**json.loads(line)):
            replies.write(json.dumps(logits.shape).encode() + b"\n" + logits.astype(np.float32).tobytes())
        replies.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
