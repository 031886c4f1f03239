"""Mask functions of transformers are classified from what they are; everything else is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils as mu

from llmc.errors import LlmcError
from llmc.frontend.masks import MaskKind, classify_mask

NO_PADDING = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (mu.causal_mask_function, MaskKind(causal=True)),
        (mu.sliding_window_causal_mask_function(4096), MaskKind(causal=True, window=4096)),
        (mu.chunked_causal_mask_function(8192, NO_PADDING), MaskKind(causal=True, chunk=8192)),
        (
            mu.and_masks(mu.sliding_window_overlay(8), mu.sliding_window_causal_mask_function(5)),
            MaskKind(causal=True, window=5),
        ),
    ],
)
def test_known(function: object, kind: MaskKind) -> None:
    assert classify_mask(function) == kind  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "function",
    [
        mu.bidirectional_mask_function,
        mu.sliding_window_bidirectional_mask_function(4),
        mu.or_masks(mu.causal_mask_function, mu.bidirectional_mask_function),
        mu.and_masks(mu.causal_mask_function, mu.padding_mask_function(torch.ones(1, 4, dtype=torch.bool))),
        mu.and_masks(mu.causal_mask_function, mu.packed_sequence_mask_function(torch.zeros(1, 4))),
        mu.blockwise_overlay(torch.zeros(1, 4)),
        lambda b, h, q, k: k <= q,
    ],
)
def test_others_are_refused(function: object) -> None:
    with pytest.raises(LlmcError) as refused:
        classify_mask(function)  # type: ignore[arg-type]
    assert refused.value.ref == "mask-not-understood"


def test_two_chunk_sizes_are_refused() -> None:
    both = mu.and_masks(mu.chunked_overlay(4, NO_PADDING), mu.chunked_overlay(8, NO_PADDING))
    with pytest.raises(LlmcError, match="chunk"):
        classify_mask(both)


@pytest.mark.parametrize("kind", [MaskKind(causal=True), MaskKind(True, window=3), MaskKind(True, chunk=4)])
def test_the_operator_allows_what_transformers_allows(kind: MaskKind) -> None:
    from llmc.frontend.torch_ops import allowed_pairs

    functions = [mu.causal_mask_function]
    if kind.window:
        functions.append(mu.sliding_window_overlay(kind.window))
    if kind.chunk:
        functions.append(mu.chunked_overlay(kind.chunk, NO_PADDING))
    theirs = mu.sdpa_mask(1, 11, 11, mask_function=mu.and_masks(*functions), allow_is_causal_skip=False)
    assert torch.equal(allowed_pairs(11, kind.causal, kind.window, kind.chunk), theirs[0, 0])
