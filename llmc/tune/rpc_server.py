"""Measures for a tuner on another machine: ``python -m llmc.tune.rpc_server --port 9190``.

TVM's RPC server with one more function. Whoever connects can run code here: bind it to an address that only the tuner's
machine reaches, e.g. the default one through ``ssh -L 9190:localhost:9190``. Connections are served one after the other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError
from llmc.tune.remote import ASK
from llmc.tune.workers import Crashed, Hung, Worker, serve_command


class MeasuringService:
    """Answers questions by a measuring process of its own, which is replaced when it crashes or hangs."""

    def __init__(self, command: list[str] | None = None) -> None:
        self._command = command
        self._workers: dict[str, Worker] = {}
        self._work = tempfile.TemporaryDirectory(prefix="llmc-measure-")
        self._count = 0

    def ask(self, target: str, text: str, seconds: float, library: bytes) -> str:
        """One question of llmc.tune.measuring; or {"do": "device"}.

        Returns:
            the answer as JSON; {"crashed" or "hung": how} if the process is gone; {"refused": why} if there can be none.
        """
        question = json.loads(text)
        if question["do"] == "device":
            return json.dumps(_device(target))
        path = Path(self._work.name) / f"library-{self._count}{Path(question.get('path', '')).suffix}"
        self._count += 1  # never a name again: loaders cache
        if "path" in question:
            path.write_bytes(bytes(library))
            question["path"] = str(path)
        worker = self._workers.setdefault(target, Worker(self._command or serve_command("measure", target)))
        try:
            answer = worker.ask(question, seconds)
            if answer.get("ends"):
                worker.renew()
        except Crashed as e:
            answer = {"crashed": str(e)}
        except Hung as e:
            answer = {"hung": str(e)}
        except LlmcError as e:
            answer = {"refused": f"{e.message} {e.hint}".strip()}
        finally:
            path.unlink(missing_ok=True)  # it is loaded
        return json.dumps(answer)


def _device(target: str) -> dict[str, str]:
    from llmc.targets.backend import get

    try:
        backend, caps = get(target)
    except LlmcError as e:
        return {"refused": e.message}
    lacks = backend.missing(caps)
    return {"refused": f"it lacks {', '.join(lacks)}."} if lacks else {"device": backend.device()}


def serve(host: str, port: int, command: list[str] | None = None) -> int:
    """Serve for ever; the port that was bound is told through TVM's log.

    Args:
        command: of a measuring process; for tests.
    """
    import tvm_ffi
    from tvm.rpc import server

    services: list[MeasuringService] = []  # made in the process of each connection

    def ask(target: str, text: str, seconds: float, library: Any) -> str:
        if not services:
            services.append(MeasuringService(command))
        return services[0].ask(target, text, seconds, library)

    tvm_ffi.register_global_func(ASK, ask, override=True)
    state = server.PopenRPCServerState(host, port, port + 1)
    state.thread.join()
    return 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=9190)
    options = parser.parse_args()
    return serve(options.host, options.port)


if __name__ == "__main__":
    raise SystemExit(main())
