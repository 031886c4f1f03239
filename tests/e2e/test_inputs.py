"""What may be compiled besides a folder: exported programs, with and without positions of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import llmc
from llmc.pipeline import compile_model
from tools.tiny_configs import VOCAB, tiny_model

pytestmark = pytest.mark.e2e


class IdsOnly(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class WithPositions(IdsOnly):
    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


@pytest.mark.parametrize("wrapper", [IdsOnly, WithPositions])
def test_an_exported_program_compiles(wrapper: type[IdsOnly], tmp_path: Path) -> None:
    """transformers' sdpa attention with its mask arithmetic in the graph, saved by torch.export."""
    model = tiny_model("llama")
    model.config._attn_implementation = "sdpa"
    tokens = torch.arange(16)[None]
    # two tensors: torch.export takes one object given twice for one input
    inputs = (tokens,) if wrapper is IdsOnly else (tokens, tokens.clone())
    length = torch.export.Dim("length", min=2, max=256)
    program = torch.export.export(wrapper(model), inputs, dynamic_shapes=tuple({1: length} for _ in inputs))
    torch.export.save(program, tmp_path / "model.pt2")
    compile_model(tmp_path / "model.pt2", tmp_path / "artifact", max_seq_len=128)
    ids = np.random.default_rng(0).integers(0, VOCAB, 45).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    got = llmc.load(tmp_path / "artifact").logits(ids, prefill=30)
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_a_spec_file_says_everything(tmp_path: Path) -> None:
    """The same bytes as with arguments."""
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "spec.toml").write_text(
        f'model = "{tmp_path / "model"}"\ndtype = "f32"\nmax_seq_len = 64\nmax_batch = 2\n', encoding="utf-8"
    )
    spec = llmc.CompileSpec.from_toml(tmp_path / "spec.toml")
    result = compile_model(spec.model, tmp_path / "artifact", spec=spec)
    assert result.manifest is not None
    assert (result.manifest.limits.max_seq_len, result.manifest.limits.max_batch) == (64, 2)
    loaded = llmc.load(tmp_path / "artifact")
    with pytest.raises(llmc.LlmcError, match="64"):
        loaded.generate(list(range(80)), max_tokens=1)
