"""``llmc run``: load an artifact, stream text, say how fast it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.cli.format import human_bytes
from llmc.cli.guard import say
from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.runtime.model import Model
    from llmc.runtime.results import GenerateResult


def run_generate(
    artifact: Path,
    prompt: str,
    *,
    chat: bool,
    token_ids: bool,
    threads: int | None,
    kv_pages: int | None,
    max_memory: str | None,
    level: str | None = None,
    **sampling: Any,
) -> None:
    """Stream the continuation of `prompt` to stdout; one line about it goes to stderr.

    Args:
        artifact: folder or model.so.
        prompt: text, ``-`` for stdin, or token ids separated by commas or spaces with `token_ids`.
        chat: the prompt is a user's message in the model's chat format.
        token_ids: the prompt is ids, and ids are printed.
        threads, kv_pages, max_memory, level: see llmc.load.
        sampling: see Model.generate.

    Raises:
        LlmcError: see llmc.load and Model.generate.
    """
    if chat and token_ids:
        raise LlmcError("chat-token-ids", "--chat and --token-ids exclude each other.")
    if prompt == "-":
        prompt = sys.stdin.read()
    ids = _parse_ids(prompt) if token_ids else None
    from llmc.runtime.model import load

    model = load(artifact, threads=threads, kv_pages=kv_pages, max_memory=max_memory, level=level)
    if ids is not None:
        result = model.generate(ids, **sampling)
        print(" ".join(str(i) for i in result.token_ids), flush=True)
    else:
        if not model.has_tokenizer:
            raise LlmcError(
                "no-tokenizer",
                f"{artifact} has no tokenizer, so it takes and gives token ids only.",
                hint='Use --token-ids "1 2 3".',
            )
        message = [{"role": "user", "content": prompt}] if chat else prompt
        with model.generate(message, stream=True, **sampling) as stream:
            for piece in stream:
                sys.stdout.write(piece)
                sys.stdout.flush()
            result = stream.result
        print(flush=True)
    say(summary(model, result))


def summary(model: Model, result: GenerateResult) -> str:
    """One line: speed of prompt and decode, memory."""
    t, m = result.timings, model.memory()
    parts = [
        f"prompt {t.prompt_tokens} tokens, {t.prefill_tokens_per_second:.1f} tok/s",
        f"decode {t.decode_steps} steps, {t.decode_tokens_per_second:.1f} tok/s",
        f"memory {human_bytes(m.process)} (weights {human_bytes(m.weights)}, KV cache {human_bytes(m.kv_resident)})",
        f"ended by {result.finish_reason}",
    ]
    return "[" + " | ".join(parts) + "]"


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise LlmcError(
            "token-ids",
            f"--token-ids needs integers separated by commas or spaces, found {text!r}.",
            hint='Write e.g. --token-ids "1 2 3".',
        ) from None
