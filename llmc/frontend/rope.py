"""Rotary embeddings whose frequencies follow the length of the sequence, held at those of the original length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmc.errors import LlmcError

_INV_FREQ = "inv_freq"
_ORIGINAL = "original_inv_freq"


@contextmanager
def original_frequencies(model: torch.nn.Module, limit: int) -> Iterator[None]:
    """Let dynamic NTK rotary embeddings of transformers compute with the frequencies of sequences up to `limit`.

    They recompute their frequencies when the sequence grows beyond the original length, a decision that cannot be traced.
    Up to that length there is nothing to decide: the original frequencies are the ones that count.

    Raises LlmcError("length-dependent") if `limit` is beyond the original length.
    """
    saved: list[tuple[torch.nn.Module, Any, dict[str, Any]]] = []
    try:
        for path, module in model.named_modules():
            kinds = getattr(module, "rope_type", None)
            by_layer = kinds if isinstance(kinds, dict) else {"": kinds}
            dynamic = [name for name, kind in by_layer.items() if isinstance(kind, str) and "dynamic" in kind]
            original = getattr(module, "original_max_seq_len", None)
            if not dynamic or not isinstance(original, int):
                continue
            if limit > original:
                raise LlmcError(
                    "length-dependent",
                    f"{path or 'The model'} ({type(module).__name__}) changes its rotary frequencies with the length of "
                    f"sequences of more than {original} tokens, and the model is made for up to {limit}.",
                    hint=f"Compile it for at most {original} tokens (--max-seq-len {original}).",
                    context={"module": path},
                )
            saved.append((module, kinds, dict(module._buffers)))
            fixed = {name: "default" if name in dynamic else kind for name, kind in by_layer.items()}
            module.rope_type = fixed if isinstance(kinds, dict) else "default"
            for name in dynamic:
                prefix = f"{name}_" if name else ""
                first = getattr(module, prefix + _ORIGINAL, None)
                if isinstance(first, torch.Tensor) and prefix + _INV_FREQ in module._buffers:
                    module._buffers[prefix + _INV_FREQ] = first  # a longer sequence may have replaced it
        yield
    finally:
        for module, kinds, buffers in saved:
            module.rope_type = kinds
            module._buffers.update(buffers)
