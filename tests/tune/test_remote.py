"""Measuring through RPC: the service on the other side, and mistakes on this one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmc.cli.app import app
from llmc.errors import LlmcError
from llmc.schedules.records import Status
from llmc.targets.backend import get
from llmc.tune.job import Job
from llmc.tune.lab import ProcessLab
from llmc.tune.remote import RemoteWorker
from llmc.tune.rpc_server import MeasuringService
from tests.tune.awkward import CRASHES, HANGS, RIGHT, WRONG, Awkward, AwkwardConfig, AwkwardSchedule, command
from tests.tune.test_workers import ACTOR


def test_the_service_answers_and_survives() -> None:
    service = MeasuringService(ACTOR)

    def ask(tile: int, seconds: float = 30) -> dict[str, object]:
        question = {"do": "measure", "schedule": {"rows_tile": tile}, "path": "x.so"}
        return dict(json.loads(service.ask("cpu", json.dumps(question), seconds, b"code")))

    assert ask(0)["status"] == "ok" and ask(5)["status"] == "wrong"
    assert ask(3) == {"crashed": "signal 11"}
    assert "no answer within" in str(ask(4, 1)["hung"])
    assert ask(0)["status"] == "ok" and not list(Path(service._work.name).iterdir())
    assert json.loads(service.ask("cpu", '{"do": "device"}', 1, b"")) == {"device": get("cpu")[0].device()}
    assert "no NVIDIA driver" in service.ask("cuda/sm_90", '{"do": "device"}', 1, b"") or (
        get("cuda/sm_90")[0].missing(get("cuda/sm_90")[1]) == ()
    )
    for worker in service._workers.values():
        worker.close()


def test_a_process_that_cannot_start_is_told() -> None:
    service = MeasuringService([sys.executable, "-c", "raise SystemExit(7)"])
    assert "status 7" in json.loads(service.ask("cpu", '{"do": "limits"}', 5, b""))["refused"]


def test_addresses() -> None:
    with pytest.raises(LlmcError, match=r"HOST:PORT; found 'gpubox'.*\[rpc-address\]"):
        RemoteWorker("gpubox", "cpu")
    with socket.socket() as held:  # a port that nobody listens at
        held.bind(("127.0.0.1", 0))
        worker = RemoteWorker(f"127.0.0.1:{held.getsockname()[1]}", "cpu")
        with pytest.raises(
            LlmcError, match=r"No llmc measures at 127.0.0.1:\d+.*rpc_server.*\[rpc-unreachable\]"
        ):
            worker.ask({"do": "limits"}, 1)
    result = CliRunner().invoke(app, ["tune", "--measure", "c.zip", "--rpc", "a:1"])
    assert result.exit_code == 2 and "[tune-rpc]" in result.stderr


@pytest.mark.slow(reason="a server and its measuring processes import tvm")
def test_candidates_are_measured_by_a_server() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    code = f"from llmc.tune.rpc_server import serve; serve('127.0.0.1', {port}, {command('measure')!r})"
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    caps = get("cpu")[1]
    job = Job.of(Awkward(), AwkwardConfig(4096), Awkward().buckets(None)[0], 1, caps, ((0, 1.0),))
    try:
        remote = RemoteWorker(f"127.0.0.1:{port}", caps.preset)
        for attempt in range(60):
            try:
                device = remote.device()
                break
            except LlmcError:
                assert server.poll() is None and attempt < 59
                time.sleep(0.5)
        assert device == get("cpu")[0].device()
        with ProcessLab(caps.preset, 1, command("build"), measurer=remote, measure_seconds=2) as lab:
            assert lab.limits().read == 1e10 and lab.default(job).status is Status.OK
            job.default_seconds = 1e-4
            wanted = {RIGHT: Status.OK, CRASHES: Status.CRASHED, HANGS: Status.HUNG, WRONG: Status.WRONG}
            schedules = [AwkwardSchedule(kind) for kind in (*wanted, RIGHT)]
            found = [(s.kind, o.status) for s, o in lab.measure(job, schedules, seconds=0.05)]
        assert found == [*wanted.items(), (RIGHT, Status.OK)]
    finally:
        server.terminate()
        server.wait()
