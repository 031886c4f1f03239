"""Measuring on another machine, through TVM's RPC: this side. ``python -m llmc.tune.rpc_server`` is the other one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError
from llmc.tune.workers import Crashed, Hung

ASK = "llmc.tune.ask"  # of the server: (target, question as JSON, seconds, library) -> answer as JSON
_DEVICE_SECONDS = 60.0


class RemoteWorker:
    """Asks a measuring process on another machine; has the methods of a Worker.

    The other side replaces its process when it crashes or hangs; libraries travel with the questions that name them.

    Args:
        address: ``HOST:PORT``.
        target: as in ``--target``, with its preset.

    Raises:
        LlmcError: not an address.
    """

    def __init__(self, address: str, target: str) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise LlmcError(
                "rpc-address",
                f"--rpc takes HOST:PORT; found {address!r}.",
                hint="For example --rpc gpubox:9190.",
            )
        self._address, self._host, self._port, self._target = address, host, int(port), target
        self._session: Any = None
        self.restarts = 0

    def start(self) -> None:
        """Nothing to start here."""

    def wait(self) -> None:
        """Connect.

        Raises:
            LlmcError: nobody answers there, or not this llmc.
        """
        if self._session is not None:
            return
        from tvm import rpc

        try:
            self._session = rpc.connect(self._host, self._port)
            self._ask = self._session.get_function(ASK)
        except Exception as e:
            self._session = None
            raise LlmcError(
                "rpc-unreachable",
                f"No llmc measures at {self._address}: {_last_line(e)}.",
                hint="Start python -m llmc.tune.rpc_server there, with the same llmc and TVM.",
            ) from None

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a question.

        Raises:
            Crashed, Hung: the process on the other side is gone; the next question finds another.
            LlmcError: see wait.
        """
        self.wait()
        library = Path(message["path"]).read_bytes() if "path" in message else b""
        try:
            text = str(self._ask(self._target, json.dumps(message), float(seconds), library))
        except Exception as e:
            self.renew()
            raise Crashed(f"the connection to {self._address}: {_last_line(e)}") from None
        answer = dict(json.loads(text))
        if "hung" in answer:
            self.restarts += 1
            raise Hung(answer["hung"])
        if "crashed" in answer:
            self.restarts += 1
            raise Crashed(answer["crashed"])
        if "refused" in answer:
            raise LlmcError("rpc-refused", f"{self._address} cannot measure: {answer['refused']}")
        return answer

    def device(self) -> str:
        """Name of the device there.

        Raises:
            LlmcError: it cannot run code for the target.
        """
        return str(self.ask({"do": "device"}, _DEVICE_SECONDS)["device"])

    def renew(self) -> None:
        """Connect anew for the next question."""
        self.restarts += 1
        self.close()

    def close(self) -> None:
        """End the connection, and with it the other side's process."""
        self._ask = self._session = None


def _last_line(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return (lines[-1].strip() if lines else type(e).__name__).rstrip(".")
