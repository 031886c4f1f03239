"""Small torch models that stand for compiled artifacts, right or wrong, and the checkpoints that they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.frontend.graph import SourceModel
from llmc.reference import ReferenceResult, reference_logits
from llmc.spec import Verify
from llmc.verify import verify
from tools.tiny_configs import tiny_config

KINDS = ("llama", "mistral", "qwen3", "gemma3_text", "gpt_oss", "mixtral", "gpt2", "deepseek_v3")
WINDOWED = ("mistral", "gemma3_text", "gpt_oss")
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_model(kind: str, dtype: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """With transformers' own initialisation, whose small weights make defects hard to see."""
    torch.manual_seed(seed)
    if kind in WINDOWED:
        changes = {"sliding_window": 16, **changes}
    config = tiny_config(kind, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(TORCH[dtype])


def open_saved(model: PreTrainedModel, folder: Path) -> SourceModel:
    model.save_pretrained(folder)
    return open_model(str(folder), dtype=None)


class Opened:
    """Checkpoints of default models, each written, opened and run by the reference once for all tests of a process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, tuple[PreTrainedModel, SourceModel]] = {}
        self._runs: dict[str, ReferenceResult] = {}

    def __call__(
        self, kind: str, dtype: str, seed: int = 0, **changes: Any
    ) -> tuple[PreTrainedModel, SourceModel]:
        """(default_model of the arguments, which may be changed; what it was saved as, opened)."""
        key = repr((kind, dtype, seed, sorted(changes.items())))
        if key not in self._made:
            model = default_model(kind, dtype, seed, **changes)
            self._made[key] = model, open_saved(model, self._folder / str(len(self._made)))
        model, source = self._made[key]
        return copy.deepcopy(model), source

    def reference(
        self, source: SourceModel, ids: Sequence[int], dtype: str, **options: Any
    ) -> ReferenceResult:
        """llmc.reference.reference_logits, which is deterministic and reads only: once per checkpoint and arguments."""
        known = [i for i, (_, made) in enumerate(self._made.values()) if made is source]
        if not known:
            return reference_logits(source, ids, dtype, **options)
        key = repr((known[0], list(ids), dtype, sorted(options.items())))
        if key not in self._runs:
            found = reference_logits(source, ids, dtype, **options)
            for array in (found.logits, *found.taps.values()):
                array.flags.writeable = False
            self._runs[key] = found
        return self._runs[key]


class TorchArtifact:
    """Stands for a compiled artifact: a torch model, right or wrong."""

    def __init__(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.model = model
        self.kwargs = kwargs
        self.calls: list[tuple[int, int]] = []

    def logits(self, token_ids: Sequence[int], *, prefill: int | None = None) -> np.ndarray:
        self.calls.append((len(token_ids), prefill or len(token_ids)))
        kwargs = {k: v(len(token_ids)) for k, v in self.kwargs.items()}
        with torch.no_grad():
            out: np.ndarray = (
                self.model(torch.tensor([list(token_ids)]), use_cache=False, **kwargs)
                .logits[0]
                .float()
                .numpy()
            )
        return out

    def logits_batch(
        self, batch: Sequence[Sequence[int]], *, prefill: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        return [self.logits(ids, prefill=n) for ids, n in zip(batch, prefill or map(len, batch), strict=True)]

    def taps(self, token_ids: Sequence[int]) -> Mapping[str, np.ndarray]:
        out: dict[str, np.ndarray] = {}
        handles = []
        for i, layer in enumerate(self.model.model.layers):

            def hook(_: Any, __: Any, value: Any, path: str = f"model.layers.{i}") -> None:
                out[path] = (
                    (value[0] if isinstance(value, tuple) else value)
                    .float()
                    .reshape(-1, value.shape[-1])
                    .numpy()
                )

            handles.append(layer.register_forward_hook(hook))
        self.logits(token_ids)
        for handle in handles:
            handle.remove()
        return out


def fails(
    artifact: TorchArtifact, source: SourceModel, dtype: str, mode: Verify = Verify.SAMPLE, **kw: Any
) -> LlmcError:
    with pytest.raises(LlmcError) as e:
        verify(artifact, source, mode=mode, dtype=dtype, **kw)
    assert e.value.ref == "verify-failed", e.value
    return e.value
