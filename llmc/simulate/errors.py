"""What the simulator finds."""

from __future__ import annotations

from typing import Any

from llmc.errors import LlmcError

_LONGEST = 200  # characters of a statement in a message


class SimulationError(LlmcError):
    """A kernel does something that a GPU does not define.

    Attributes:
        ref: ``simulate-race``, ``simulate-bounds``, ``simulate-alignment``, ``simulate-barrier``, ``simulate-shuffle``,
            ``simulate-assertion`` or ``simulate-unsupported``.
        context: buffer, element, threads and statement, where there are such.
    """


def failure(ref: str, message: str, statement: Any = None, **context: Any) -> SimulationError:
    """A SimulationError whose message ends with the statement that was being executed.

    Args:
        statement: a TIR statement or expression; None = none.
    """
    text = text_of(statement) if statement is not None else ""
    where = f" in `{text}`" if text else ""
    return SimulationError(f"simulate-{ref}", f"{message}{where}.", context={**context, "statement": text})


def text_of(node: Any) -> str:
    """The last line of a node in TVMScript: the statement without the declarations that precede it."""
    lines = [line.strip() for line in str(node).splitlines()]
    kept = [line for line in lines if line and not line.startswith("#")]
    last = kept[-1] if kept else ""
    return last if len(last) <= _LONGEST else f"{last[:_LONGEST]} ..."
