"""The one error that a user of llmc sees: what is required, what was found, what to do."""

from __future__ import annotations

from collections.abc import Mapping


class LlmcError(Exception):
    """A user-facing error.

    Args:
        ref: stable, greppable identifier in kebab case, e.g. ``"kv-pool-exhausted"``.
        message: one sentence with the numbers: what is required and what was found.
        hint: what to do about it, one sentence; may be empty.
        context: further facts for a log or an issue report.
    """

    def __init__(
        self, ref: str, message: str, *, hint: str = "", context: Mapping[str, object] | None = None
    ) -> None:
        self.ref = ref
        self.message = message
        self.hint = hint
        self.context = dict(context or {})
        super().__init__(self.__str__())

    def __str__(self) -> str:
        text = self.message
        if self.hint:
            text = f"{text} {self.hint}"
        return f"{text} [{self.ref}]"
