"""Calibration tokens: sequences of a text, chosen by a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llmc.errors import LlmcError
from llmc.frontend.graph import SourceModel


def text_tokens(source: SourceModel, text: Path) -> list[int]:
    """The tokens of a text file by the checkpoint's own tokenizer, without special tokens.

    Raises:
        LlmcError: the file is not readable text, or the checkpoint has no tokenizer.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else f"byte {e.start} is not UTF-8"
        raise LlmcError(
            "calibration-text",
            f"The calibration text {text} cannot be read: {reason}.",
            hint="Give a text file.",
        ) from None
    if source.folder is None:
        raise LlmcError(
            "no-tokenizer",
            f"{source.name} was not opened from a folder, so there is no tokenizer for {text}.",
            hint="Give the folder of a checkpoint.",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as e:  # tokenizers raise all kinds of errors
        raise LlmcError(
            "no-tokenizer",
            f"{source.folder} has no tokenizer that can be loaded: {' '.join(str(e).split())[:300]}.",
            hint="Add tokenizer.json to the folder.",
        ) from None
    tokenizer.model_max_length = 1 << 60  # no warning: the text is cut afterwards
    ids: list[int] = tokenizer(content, add_special_tokens=False)["input_ids"]
    return ids


def calibration_sequences(
    source: SourceModel, text: Path, *, sequences: int, length: int, seed: int
) -> torch.Tensor:
    """int64 [sequences, length]: different pieces of the text, none overlapping another.

    Raises:
        LlmcError: fewer tokens than sequences × length, or length beyond what the model takes.
    """
    if length > source.max_seq_len:
        raise LlmcError(
            "calibration-length",
            f"Calibration sequences of {length} tokens were asked for; {source.name} takes at most"
            f" {source.max_seq_len}.",
            hint="Use shorter sequences.",
        )
    ids = text_tokens(source, text)
    required = sequences * length
    if len(ids) < required:
        raise LlmcError(
            "calibration-too-short",
            f"{sequences} sequences of {length} tokens ({required} tokens) are required for calibration; {text} has"
            f" {len(ids)}.",
            hint="Give a longer text, or use fewer or shorter sequences.",
        )
    generator = np.random.default_rng(seed)
    # pieces of the text on a raster that starts anywhere
    start = int(generator.integers(0, min(length, len(ids) - required + 1)))
    pieces = (len(ids) - start) // length
    chosen = np.sort(generator.choice(pieces, size=sequences, replace=False))
    return torch.tensor([ids[start + p * length : start + (p + 1) * length] for p in chosen])
