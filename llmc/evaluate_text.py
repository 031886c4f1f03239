"""What an evaluation runs on: the tokens of a text file, and the model to compare with."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmc.artifact import LIBRARY, MANIFEST
from llmc.errors import LlmcError
from llmc.evaluate import MAX_TOKENS, WINDOW, Floats, Logits, Window, cut
from llmc.spec import DType

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel
    from llmc.runtime.model import Model

# characters read per token wanted, before it is known how many the tokenizer makes of them
_CHARACTERS = 8


class Tokenizes(Protocol):
    """What a text needs of a model; llmc.runtime.model.Model has it."""

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""


class FolderTokenizer:
    """The tokenizer of a checkpoint's folder, before there is an artifact.

    Raises:
        LlmcError: the folder has no tokenizer.json, or it is not readable.
    """

    def __init__(self, folder: str | None, name: str) -> None:
        from llmc.runtime.tokenizer import Tokenizer

        path = Path(folder or "") / "tokenizer.json"
        if folder is None or not path.is_file():
            raise LlmcError(
                "no-tokenizer",
                f"{name} has no tokenizer.json, so nothing can be measured on a text.",
                hint="Put the tokenizer's files beside the checkpoint.",
            )
        self._tokenizer = Tokenizer(path)

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer.encode(text, special_tokens=special_tokens)


def read_tokens(path: Path, tokenizer: Tokenizes, most: int | None = None) -> list[int]:
    """Token ids of a UTF-8 text file, without what the tokenizer puts around it.

    Args:
        most: so many are enough; a long file is then not read to its end.

    Raises:
        LlmcError: the file cannot be read, or is not UTF-8.
    """
    try:
        with path.expanduser().open(encoding="utf-8") as file:
            if most is None:
                return tokenizer.tokenize(file.read(), special_tokens=False)
            text = ""
            while True:
                piece = file.read(_CHARACTERS * most)
                text += piece
                ids = tokenizer.tokenize(text, special_tokens=False)
                # the tokens at the cut may differ from those of the whole text
                if not piece or len(ids) >= most + 64:
                    return ids[:most]
    except OSError as e:
        raise unreadable(path, e) from None
    except UnicodeDecodeError as e:
        raise not_utf8(path, e) from None


def check_text(path: Path, least: int = WINDOW) -> None:
    """Refuse a text that cannot do, before the long work: no file, no UTF-8, or fewer bytes than tokens needed.

    Raises:
        LlmcError: it cannot be read or is too short.
    """
    try:
        with path.expanduser().open("rb") as file:
            start = file.read(least)
        found = len(start)
        codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut
    except OSError as e:
        raise unreadable(path, e) from None
    except UnicodeDecodeError as e:
        raise not_utf8(path, e) from None
    if found < least:
        raise LlmcError(
            "text-too-short",
            f"The text {path} has {found} bytes; at least {least} tokens are required.",
            hint="Use a longer text.",
        )


def unreadable(path: Path, error: OSError) -> LlmcError:
    """The error for a text file that cannot be opened or read."""
    return LlmcError(
        "text-unreadable",
        f"The text {path} cannot be read: {error.strerror or error}.",
        hint="Give a UTF-8 text file.",
    )


def not_utf8(path: Path, error: UnicodeDecodeError) -> LlmcError:
    """The error for a file in another encoding."""
    return LlmcError(
        "text-not-utf8",
        f"The text {path} is not UTF-8: {error.reason} at byte {error.start} of a piece of it.",
        hint="Convert it to UTF-8.",
    )


def prefix_of(tokenizer: Tokenizes) -> tuple[int, ...]:
    """What the tokenizer puts before a text, e.g. a begin token."""
    word = "a"
    whole, bare = tokenizer.tokenize(word), tokenizer.tokenize(word, special_tokens=False)
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return tuple(whole[:at])
    return ()


def text_windows(
    model: Model,
    path: Path,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = MAX_TOKENS,
) -> list[Window]:
    """Windows of a text for a loaded artifact; see llmc.evaluate.cut.

    Args:
        window: None = 512, or the artifact's limit if that is less.

    Raises:
        LlmcError: no tokenizer, no readable or too short a text, or a window beyond the artifact's limit.
    """
    if not model.has_tokenizer:
        raise LlmcError(
            "no-tokenizer",
            f"The artifact of {model.manifest.model.source} has no tokenizer.json, so it cannot be evaluated on a text.",
            hint="Put the tokenizer's files beside the checkpoint and compile again.",
        )
    return cut_text(
        model,
        path,
        model.manifest.limits.max_seq_len,
        window=window,
        stride=stride,
        max_tokens=max_tokens,
    )


def cut_text(
    tokenizer: Tokenizes,
    path: Path,
    limit: int,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = MAX_TOKENS,
) -> list[Window]:
    """text_windows for any tokenizer; `limit` is the longest sequence."""
    if window is not None and window > limit:
        raise LlmcError(
            "window",
            f"A window may have at most {limit} tokens (the artifact's max_seq_len), found {window}.",
            hint=f"Use --window {limit} or less.",
        )
    ids = read_tokens(path, tokenizer, max_tokens)
    return cut(
        ids,
        window=min(WINDOW, limit) if window is None else window,
        stride=stride,
        max_tokens=max_tokens,
        prefix=prefix_of(tokenizer),
    )


@dataclass(frozen=True)
class Reference:
    """A model to compare with.

    Attributes:
        name: for messages.
        logits: its predictions.
        source: the opened source model; None if it is an artifact.
    """

    name: str
    logits: Logits
    source: SourceModel | None = None


def is_artifact(path: str) -> bool:
    """Whether a path is an artifact's folder or library; anything else is taken for a model."""
    folder = Path(path).expanduser()
    return folder.suffix == ".so" or (folder / MANIFEST).is_file() or (folder / LIBRARY).is_file()


def open_reference(path: str, model: Model, *, check_hashes: bool = True) -> Reference:
    """Open what to compare `model` with: an artifact, or a source model run by torch in float32.

    Raises:
        LlmcError: it cannot be opened, or its tokenizer is another one.
    """
    if is_artifact(path):
        from llmc.runtime.model import load

        other = load(path, check_hashes=check_hashes)
        sample = "def f(x):\n    return 'Où? 1234'"
        if other.has_tokenizer and model.has_tokenizer and other.tokenize(sample) != model.tokenize(sample):
            raise LlmcError(
                "tokenizers-differ",
                f"{path} has another tokenizer than the artifact.",
                hint="Compare artifacts of the same model.",
            )
        return Reference(path, other.logits)
    try:
        from llmc.frontend.checkpoint import open_model
    except ModuleNotFoundError as e:
        raise LlmcError(
            "no-torch",
            f"Comparing with a source model needs the package {e.name}, which is not installed.",
            hint="pip install 'llmc-compiler[compile]', or compare with an artifact.",
        ) from None
    dtype = model.manifest.spec.get("dtype")  # in which the layers are compared; predictions are in float32
    return source_reference(open_model(path, dtype=DType.parse(dtype) if dtype else None))


def source_reference(source: SourceModel) -> Reference:
    """An opened source model as a reference: float32, its weights streamed in bounded memory."""
    from llmc.reference import reference_logits

    def logits(ids: Sequence[int]) -> Floats:
        return reference_logits(source, ids, "float32").logits

    return Reference(source.name, logits, source)
