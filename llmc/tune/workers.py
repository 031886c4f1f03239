"""Worker processes: one message in, one out, over a socket. They are kept alive, because importing tvm takes seconds.

A worker may crash or hang: the code that it runs is made by a search. Whoever asks it learns which, and the next question
finds a fresh process.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
from typing import Any

from llmc.errors import LlmcError


class Crashed(Exception):
    """The worker's process ended instead of answering; the argument says how."""


class Hung(Exception):
    """The worker did not answer in time and was killed."""


class Worker:
    """A child process that answers questions.

    Args:
        command: of the process, to which the number of its socket is appended; it answers each line of JSON with one.
        start_seconds: time allowed for the start, which the first question's limit does not contain.
    """

    def __init__(self, command: list[str], start_seconds: float = 120.0) -> None:
        self._command, self._start_seconds = command, start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._rest = b""
        self._started = False
        self.restarts = 0

    def start(self) -> None:
        """Start the process without waiting for it."""
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            # a session of its own: Ctrl-C is for the tuner, which then ends its workers
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._socket, self._rest, self._started = ours, b"", False

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """send and receive.

        Raises:
            Crashed, Hung: the process is gone; the next question starts another.
        """
        self.send(message)
        return self.receive(seconds)

    def send(self, message: dict[str, Any]) -> None:
        """Ask without waiting."""
        self.start()
        assert self._socket is not None
        with contextlib.suppress(OSError):  # a process that is gone shows when its answer is read
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next answer."""
        self.wait()
        return dict(json.loads(self._line(seconds)))

    def wait(self) -> None:
        """Wait until the process is ready for questions."""
        self.start()
        if not self._started:
            self._line(self._start_seconds)
            self._started = True

    def fileno(self) -> int:
        """For select: readable when an answer is there or the process has ended."""
        assert self._socket is not None
        return self._socket.fileno()

    def _line(self, seconds: float) -> bytes:
        assert self._socket is not None and self._process is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                self.renew()
                raise Hung(f"no answer within {seconds:.0f} s")
            try:
                piece = self._socket.recv(1 << 16)
            except OSError:
                piece = b""
            if not piece:
                status = self._process.wait()
                started = self._started
                self.renew()
                if not started:
                    raise LlmcError(
                        "worker-failed",
                        f"A worker process of the tuner ended with status {status} before it was ready.",
                        hint=f"Run {' '.join(self._command)} to see why.",
                    )
                raise Crashed(f"signal {-status}" if status < 0 else f"exit status {status}")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def renew(self) -> None:
        """End the process; the next question starts another."""
        self.restarts += 1
        self.close()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None


def serve_command(kind: str, *arguments: str) -> list[str]:
    """How a worker of llmc.tune.serve is started."""
    return [sys.executable, "-m", "llmc.tune.serve", kind, *arguments]
