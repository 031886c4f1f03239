"""The processes behind the tuner: ``python -m llmc.tune.serve build|measure TARGET SOCKET``.

build    compiles candidates to libraries; as many processes as there are cores
measure  runs them (llmc.tune.measuring)
"""

from __future__ import annotations

import ctypes
import json
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from llmc.schedules.tunable import Bucket, Tunable
from llmc.targets.backend import Backend, get
from llmc.tune.measuring import Answer, Measurer

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Answer questions until the other end of the socket closes."""
    kind, target, number = arguments
    _end_with_parent()
    backend, caps = get(target)
    service: Builder | Measurer = Builder(backend, caps) if kind == "build" else Measurer(backend, caps)
    with socket.socket(fileno=int(number)) as channel, channel.makefile("rwb") as stream:
        _reply(stream, {"ready": True})
        for line in stream:
            question = json.loads(line)
            try:
                answer = service.answer(question)
            except Exception as e:  # every failure of a candidate is an answer
                text = str(e).strip().splitlines()
                said = f"{type(e).__name__}: {text[-1] if text else 'no message'}"[:400]
                answer = {"failure": said, "ends": service.ends_with_failure}
            _reply(stream, answer)
            if answer.get("ends"):
                return


def _reply(stream: Any, answer: Answer) -> None:
    stream.write(json.dumps(answer).encode() + b"\n")
    stream.flush()


def _end_with_parent() -> None:
    """A kernel that hangs must not outlive the tuner (Linux; elsewhere the closed socket ends an idle worker)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tunable_named(backend: Backend, name: str) -> Tunable:
    return next(t for t in backend.tunables() if t.name == name)


class Builder:
    """Question: {rule, task, schedule, low, high, path}; writes the library, or says why it would not be measured."""

    ends_with_failure = False

    def __init__(self, backend: Backend, caps: Any) -> None:
        self.backend, self.caps = backend, caps
        self.target = backend.tvm_target(caps)

    def answer(self, question: dict[str, Any]) -> Answer:
        begin = time.perf_counter()
        tunable = tunable_named(self.backend, question["rule"])
        schedule = tunable.schedule_type(**question["schedule"])
        bucket = Bucket(question["low"], question["high"]) if question["low"] else None
        func = tunable.candidate(tunable.from_values(question["task"]), schedule, bucket, self.caps)
        self.backend.library(func, self.target, self.caps, Path(question["path"]))
        # the default schedule is what all others are compared with, whatever it takes
        unfit = self.backend.unfit(Path(question["path"])) if bucket is not None else ""
        if unfit:
            Path(question["path"]).unlink()
            return {"failure": unfit}
        return {"seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    main(sys.argv[1:])
