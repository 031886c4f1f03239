"""Every tensor that a WeightSource serves equals, bit for bit, the one that from_pretrained loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.frontend.graph import SourceModel, WeightSource
from llmc.frontend.weights import ModuleWeights
from tests.frontend.tiny import save, tiny_model

KINDS = (
    "llama",
    "mixtral",
    "qwen3_moe",
    "gpt2",
    "gpt_oss",
    "phi3",
    "deepseek_v3",
    "falcon",
    "bloom",
    "opt",
    "gpt_neox",
    "gemma3_text",
)


def weights_of(source: SourceModel) -> WeightSource:
    assert source.weights is not None
    return source.weights


def assert_same_as_from_pretrained(folder: Path) -> SourceModel:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    source = open_model(str(folder), dtype=None)
    weights = weights_of(source)
    expected = reference.state_dict()
    unique = [n for n, _ in reference.named_parameters()]
    assert set(weights.names()) >= set(unique)
    assert len(set(weights.names())) == len(weights.names())
    assert set(weights.names()) <= set(expected)
    for name in expected:  # tied names too
        tensor, info = weights.load(name), weights.info(name)
        assert torch.equal(tensor.to(expected[name].dtype), expected[name]), name
        assert info.shape == tuple(tensor.shape) and info.dtype == str(tensor.dtype).removeprefix("torch.")
        assert source.module.state_dict()[name].dtype == expected[name].dtype, name
    for (name, mine), (_, theirs) in zip(
        source.module.named_buffers(), reference.named_buffers(), strict=True
    ):
        if name not in expected:
            assert mine.device.type == "cpu" and mine.dtype == theirs.dtype, name
            assert torch.equal(mine, theirs), name
    assert all(p.device.type == "meta" for p in source.module.parameters())
    return source


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_safetensors(kind: str, tmp_path: Path) -> None:
    folder = save(tiny_model(kind, dtype=torch.bfloat16), tmp_path, shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    source = assert_same_as_from_pretrained(folder)
    assert source.dtype == "bfloat16"


@pytest.mark.parametrize("kind", ("llama", "gpt2", "mixtral"))
def test_bin(kind: str, tmp_path: Path) -> None:
    folder = save(tiny_model(kind), tmp_path, as_bin=True)
    assert not list(folder.glob("*.safetensors"))
    assert_same_as_from_pretrained(folder)


def test_sharded_bin(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), tmp_path, as_bin=True)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save({n: state[n] for n in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    assert_same_as_from_pretrained(folder)


def test_base_model_checkpoint(tmp_path: Path) -> None:
    """The checkpoint of the bare decoder has no ``transformer.`` before its names."""
    folder = save(tiny_model("gpt2"), tmp_path)
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor.contiguous() for name, tensor in state.items()}
    assert set(bare) != set(state)
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_as_from_pretrained(folder)


def test_tied_weights_are_one(tmp_path: Path) -> None:
    folder = save(tiny_model("llama", tie_word_embeddings=True), tmp_path)
    source = assert_same_as_from_pretrained(folder)
    assert source.module.lm_head.weight is source.module.model.embed_tokens.weight
    assert "lm_head.weight" not in weights_of(source).names()
    assert torch.equal(
        weights_of(source).load("lm_head.weight"), weights_of(source).load("model.embed_tokens.weight")
    )


def test_tied_weight_stored_under_the_other_name(tmp_path: Path) -> None:
    folder = save(tiny_model("llama", tie_word_embeddings=True), tmp_path)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    source = assert_same_as_from_pretrained(folder)
    assert "model.embed_tokens.weight" in weights_of(source).names()


@pytest.mark.parametrize("equal", (True, False))
def test_tied_weights_stored_twice(equal: bool, tmp_path: Path) -> None:
    """The config says tied; what is stored decides, as in from_pretrained."""
    folder = save(tiny_model("llama", tie_word_embeddings=True), tmp_path)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone() + (0 if equal else 1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    source = assert_same_as_from_pretrained(folder)
    assert ("lm_head.weight" in weights_of(source).names()) is not equal


def test_one_expert_parameter_reads_only_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(open_model(str(save(tiny_model("mixtral"), tmp_path)), dtype=None))
    read: list[str] = []
    files = weights._files  # type: ignore[attr-defined]
    original = files.read
    monkeypatch.setattr(files, "read", lambda keys: (read.extend(keys), original(keys))[1])
    weights.info("model.layers.1.mlp.experts.gate_up_proj")
    assert read == []
    weights.load("model.layers.1.mlp.experts.gate_up_proj")
    assert len(read) == 8 and all("layers.1." in key for key in read)


# bad input


def edit(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tiny_model("llama"), tmp_path)


def fails(folder: Path, ref: str, *words: str) -> None:
    with pytest.raises(LlmcError) as e:
        open_model(str(folder), dtype=None)
    assert e.value.ref == ref
    for word in words:
        assert word in str(e.value), e.value
    assert e.value.hint


def test_missing_tensor(llama: Path) -> None:
    edit(llama, lambda s: s.pop("model.layers.1.mlp.up_proj.weight"))
    fails(llama, "weight-missing", "lacks 1 of", "model.layers.1.mlp.up_proj.weight")


def test_missing_expert(tmp_path: Path) -> None:
    folder = save(tiny_model("mixtral"), tmp_path)
    edit(folder, lambda s: s.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    fails(folder, "weight-shape", "model.layers.1.mlp.experts.gate_up_proj", "model.safetensors")


def test_wrong_shape(llama: Path) -> None:
    edit(llama, lambda s: s.update({"model.norm.weight": torch.ones(65)}))
    fails(llama, "weight-shape", "model.safetensors", "model.norm.weight", "65", "64")


def test_other_config(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "hidden_size": 128, "head_dim": 32}))
    fails(llama, "weight-shape", "256×64", "256×128")


@pytest.mark.parametrize("keep", (0, 5, 200, -1, -4096))
def test_truncated_safetensors(llama: Path, keep: int) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(llama, "weights-damaged", "model.safetensors", "truncated")


def test_truncated_bin(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), tmp_path, as_bin=True)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    fails(folder, "weights-damaged", "pytorch_model.bin")


def test_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), tmp_path, as_bin=True)
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (touched,))

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    fails(folder, "weights-damaged", "pytorch_model.bin")
    assert not touched.exists()


def test_missing_shard(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), tmp_path, shard_size="60KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    fails(folder, "weights-missing", victim.name)


def test_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    fails(llama, "weights-missing", "model.safetensors")


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_not_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(tiny_model("llama", dtype=dtype), tmp_path)

    def change(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.mlp.up_proj.weight"][3, 5] = value

    edit(folder, change)
    weights = weights_of(open_model(str(folder), dtype=None))
    with pytest.raises(LlmcError) as e:
        weights.load("model.layers.0.mlp.up_proj.weight")
    assert e.value.ref == "weight-not-finite"
    assert "1 of 8192" in str(e.value) and "model.safetensors" in str(e.value)


def test_module_weights() -> None:
    model: PreTrainedModel = tiny_model("llama", tie_word_embeddings=True)
    weights = ModuleWeights.of(model)
    assert set(weights.names()) == {n for n, _ in model.named_parameters()}
    assert torch.equal(weights.load("model.norm.weight"), model.model.norm.weight)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(LlmcError, match="weight-not-finite"):
        weights.load("model.norm.weight")
    with pytest.raises(LlmcError, match="no weight 'nope'"):
        weights.load("nope")
