"""Text that comes token by token: whole characters only, and stop strings that span several tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what a decoder puts in place of an incomplete character
_CONTEXT = 8  # tokens of the prompt that decoding looks back at, e.g. for the space before a word
_PATIENCE = 16  # tokens without a whole character after which bytes are taken as invalid


class Detokenizer:
    """Turns tokens into text piece by piece; the pieces never hold half a character.

    New text is what decoding adds to the text of the tokens before it, because many tokenizers decode a token
    differently at the start of a text.

    Args:
        decode: token ids to text.
        prompt: the tokens before the first one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        self._done = len(self._ids)  # tokens whose text has been given out
        self._given = len(decode(self._ids)) if self._ids else 0  # characters of the window given out

    def push(self, token: int) -> str:
        """The text that has become certain; may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        sure = text
        if len(self._ids) - self._done < _PATIENCE:
            # up to three bytes of a four-byte character may be waiting for the rest
            for _ in range(3):
                sure = sure.removesuffix(_BROKEN)
        return self._give(sure, whole=sure == text)

    def flush(self) -> str:
        """The rest, broken characters included."""
        return self._give(self._decode(self._ids), whole=True) if self._ids else ""

    def _give(self, sure: str, *, whole: bool) -> str:
        piece = sure[self._given :]
        self._given = max(self._given, len(sure))
        if whole and (piece or len(self._ids) - self._done >= _PATIENCE):
            # from here on, look back only at the tokens of this piece
            self._ids = self._ids[self._done :]
            self._done = len(self._ids)
            self._given = len(self._decode(self._ids))
        return piece


class StopFinder:
    """Passes text through until one of the stop strings appears; holds back what may become one.

    Args:
        stops: non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certainly before any stop string; once one was found, nothing."""
        if self.found or not text:
            return ""
        self._held += text
        hits = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self.found = True
            out, self._held = self._held[: min(hits)], ""
            return out
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """What was held back and has not become a stop string."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that `stop` begins with."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
