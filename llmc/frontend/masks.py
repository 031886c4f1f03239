"""What a mask function of transformers means, decided from the function itself, never from its values at one length."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import masking_utils

from llmc.errors import LlmcError


@dataclass(frozen=True)
class MaskKind:
    """Causality, window (tokens seen, the query included; 0 = all) and chunk (0 = none) of one mask."""

    causal: bool = False
    window: int = 0
    chunk: int = 0

    def also(self, other: MaskKind) -> MaskKind:
        """Both masks at once."""
        if self.chunk and other.chunk and self.chunk != other.chunk:
            raise LlmcError(
                "mask-not-understood", f"Two chunk sizes in one mask: {self.chunk} and {other.chunk}."
            )
        windows = [w for w in (self.window, other.window) if w]
        return MaskKind(
            self.causal or other.causal, min(windows) if windows else 0, self.chunk or other.chunk
        )


def classify_mask(mask_function: Callable[..., Any]) -> MaskKind:
    """The kind of a ``masking_utils`` mask function.

    Combinations are followed through the closures, because evaluating the function shows a window only when the probed
    length exceeds it. Raises LlmcError("mask-not-understood") for anything else: bidirectional, padding, packed
    sequences, unions, functions of a model's own.
    """
    if mask_function is masking_utils.causal_mask_function:
        return MaskKind(causal=True)
    name = getattr(mask_function, "__qualname__", repr(mask_function)).replace(".<locals>", "")
    if (
        isinstance(mask_function, types.FunctionType)
        and mask_function.__module__ == masking_utils.__name__
        and mask_function.__closure__
    ):
        cells = dict(
            zip(
                mask_function.__code__.co_freevars,
                (cell.cell_contents for cell in mask_function.__closure__),
                strict=True,
            )
        )
        if name == "and_masks.and_mask":
            kind = MaskKind()
            for part in cells["mask_functions"]:
                kind = kind.also(classify_mask(part))
            return kind
        if name == "sliding_window_overlay.inner_mask":
            return MaskKind(window=int(cells["sliding_window"]))
        if name == "chunked_overlay.inner_mask":
            # left_padding is zero: the caller of this module never passes a padding mask
            return MaskKind(chunk=int(cells["chunk_size"]))
    raise LlmcError(
        "mask-not-understood",
        f"The attention mask {name!r} is none of causal, sliding window and chunked.",
        hint="Only decoder-only models with such masks can be compiled.",
    )
