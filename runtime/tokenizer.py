"""The checkpoint's tokenizer, from the artifact's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmc.errors import LlmcError


class Tokenizer:
    """Text to token ids and back.

    Args:
        path: tokenizer.json in the format of the library tokenizers.
        bos_token_id: put before a text if the tokenizer's own rules do not; None = leave it to them.

    Raises:
        LlmcError: the file is not a tokenizer.
    """

    def __init__(self, path: Path, bos_token_id: int | None = None) -> None:
        from tokenizers import Tokenizer as HfTokenizer

        try:
            self._tokenizer = HfTokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise LlmcError(
                "tokenizer-unreadable",
                f"{path} is not a readable tokenizer: {e}.",
                hint="Upgrade the package tokenizers, or use token ids.",
            ) from None
        # training settings that some checkpoints left behind; a prompt is never cut or filled up
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos = bos_token_id

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids; `special_tokens` adds what the tokenizer puts around a text (e.g. a begin token)."""
        ids: list[int] = list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)
        if special_tokens and self._bos is not None and ids[:1] != [self._bos]:
            ids.insert(0, self._bos)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text
