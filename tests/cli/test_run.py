"""`llmc run`: prompts, sampling options, the line of figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmc.cli.app import app
from llmc.runtime.results import GenerateResult, Memory, Timings
from tests.cli.conftest import llmc


class Stream:
    """Stands in for llmc.runtime.generate.TextStream."""

    def __init__(self, result: GenerateResult) -> None:
        self.result = result

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> Any:
        return iter(["hello ", "[b]wörld[/b]"])


class FakeModel:
    """Stands in for llmc.runtime.model.Model; remembers what it was asked."""

    def __init__(self, has_tokenizer: bool = True) -> None:
        self.has_tokenizer = has_tokenizer
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def generate(self, prompt: Any, stream: bool = False, **sampling: Any) -> Any:
        self.asked.append((prompt, sampling))
        result = GenerateResult("", (5, 6, 7), "length", None, 4, Timings(0.5, 0.25, 4, 2))
        return Stream(result) if stream else result

    def memory(self) -> Memory:
        return Memory(1 << 20, 1 << 20, 1 << 30, 2 << 20, 0, 3 << 20, 4 << 20)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    import llmc.runtime.model

    fake = FakeModel()
    monkeypatch.setattr(llmc.runtime.model, "load", lambda *_, **__: fake)
    return fake


def test_run_streams_text_and_reports_speed(model: FakeModel) -> None:
    done = llmc(
        "run", "dist", "def f", "--temperature", "0.5", "--stop", "a", "--stop", "b", "--max-tokens", "3"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout == "hello [b]wörld[/b]\n"
    assert done.stderr == (
        "[prompt 4 tokens, 8.0 tok/s | decode 2 steps, 8.0 tok/s | "
        "memory 3.0 MiB (weights 1.0 MiB, KV cache 2.0 MiB) | ended by length]\n"
    )
    ((prompt, sampling),) = model.asked
    assert prompt == "def f" and sampling["stop"] == ["a", "b"]
    assert {k: v for k, v in sampling.items() if v is not None and k != "stop"} == {
        "max_tokens": 3,
        "temperature": 0.5,
    }


def test_run_chat_stdin_and_token_ids(model: FakeModel) -> None:
    assert llmc("run", "dist", "hi", "--chat").exit_code == 0
    assert CliRunner().invoke(app, ["run", "dist", "-"], input="from stdin").exit_code == 0
    assert llmc("run", "dist", "1, 2 3", "--token-ids").stdout == "5 6 7\n"
    assert [prompt for prompt, _ in model.asked] == [
        [{"role": "user", "content": "hi"}],
        "from stdin",
        [1, 2, 3],
    ]


def test_run_mistakes(model: FakeModel) -> None:
    assert llmc("run", "dist", "1 two", "--token-ids").stderr.endswith("[token-ids]\n")
    assert llmc("run", "dist", "1", "--token-ids", "--chat").stderr.endswith("[chat-token-ids]\n")
    model.has_tokenizer = False
    done = llmc("run", "dist", "hi")
    assert done.exit_code == 2 and done.stderr.endswith("[no-tokenizer]\n")


def test_run_without_an_artifact(tmp_path: Path) -> None:
    done = llmc("run", tmp_path / "nothing", "hi")
    assert done.exit_code == 2 and done.stderr.endswith("[artifact-missing]\n")
