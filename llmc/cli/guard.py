"""What the user sees when a command fails: one sentence, and an exit code that scripts can rely on."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from llmc import knobs
from llmc.errors import LlmcError

EXIT_BUG = 1
EXIT_USER = 2
EXIT_INTERRUPT = 130
EXIT_PIPE = 141


@contextmanager
def guard() -> Iterator[None]:
    """Run a command's body; every failure becomes a sentence on stderr and an exit code (STYLE 21)."""
    try:
        yield
    except LlmcError as e:
        if knobs.debug():
            traceback.print_exc()
            for key, value in e.context.items():
                say(f"{key}: {value}")
        say(f"llmc: {e}")
        raise typer.Exit(EXIT_BUG if e.ref == "internal-error" else EXIT_USER) from None
    except KeyboardInterrupt:
        say("llmc: interrupted.")
        raise typer.Exit(EXIT_INTERRUPT) from None
    except typer.Exit:
        raise
    except BrokenPipeError:
        # the reader of our output has gone, e.g. `| head`; Python would complain once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_PIPE) from None
    except Exception as e:
        if knobs.debug():
            traceback.print_exc()
        say(
            f"llmc: {type(e).__name__}: {e}. This is a bug in llmc; "
            "run again with LLMC_DEBUG=1 and report the traceback. [internal-error]"
        )
        raise typer.Exit(EXIT_BUG) from None


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)
