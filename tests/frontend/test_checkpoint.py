"""Opening models: from folders, the hub, Python objects and exported programs; and every way in which that can fail."""

from __future__ import annotations

import json
import re
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import NO_LIMIT, open_model
from llmc.spec import DType
from tests.frontend.tiny import save, tiny_config, tiny_model


def write_config(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def refused(model: str, ref: str, *words: str, **kwargs: Any) -> LlmcError:
    with pytest.raises(LlmcError) as e:
        open_model(model, dtype=None, **kwargs)
    assert e.value.ref == ref, e.value
    for word in words:
        assert word in str(e.value), e.value
    assert e.value.hint
    return e.value


# folders


def test_folder(tmp_path: Path) -> None:
    folder = save(tiny_model("llama", dtype=torch.bfloat16), tmp_path)
    source = open_model(str(folder), dtype=None)
    assert (source.dtype, source.model_type, source.max_seq_len) == ("bfloat16", "llama", 512)
    assert source.folder == str(folder) and source.config["hidden_size"] == 64
    assert not source.module.training
    assert {p.dtype for p in source.module.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in source.module.parameters()} == {"meta"}


def test_dtype_asked_for(tmp_path: Path) -> None:
    """The module is in the dtype asked for; the weights stay as they are stored."""
    folder = save(tiny_model("llama", dtype=torch.bfloat16), tmp_path)
    source = open_model(str(folder), dtype=DType.F32)
    assert source.dtype == "bfloat16" and source.weights is not None
    assert {p.dtype for p in source.module.parameters()} == {torch.float32}
    assert source.weights.info("model.norm.weight").dtype == "bfloat16"


def test_dtype_from_the_weights(tmp_path: Path) -> None:
    folder = save(tiny_model("llama", dtype=torch.float16), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    source = open_model(str(folder), dtype=None)
    assert source.dtype == "float16"
    assert {p.dtype for p in source.module.parameters()} == {torch.float16}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_weights_that_stay_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """DeepSeek's router bias is kept in float32 whatever the model's dtype."""
    folder = save(tiny_model("deepseek_v3", dtype=dtype), tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    state = open_model(str(folder), dtype=None).module.state_dict()
    assert {n: t.dtype for n, t in state.items()} == {n: t.dtype for n, t in expected.items()}
    bias = [n for n in state if "e_score_correction_bias" in n]
    assert bias and all(state[n].dtype == torch.float32 for n in bias)


@pytest.mark.parametrize(
    ("kind", "limit"), [("llama", 512), ("gpt2", 512), ("bloom", NO_LIMIT), ("opt", 512)]
)
def test_limit(kind: str, limit: int, tmp_path: Path) -> None:
    tiny_config(kind).save_pretrained(tmp_path)
    assert open_model(str(tmp_path), dtype=None, meta_weights=True).max_seq_len == limit


def test_meta_weights_need_only_the_config(tmp_path: Path) -> None:
    tiny_config("llama", dtype="bfloat16").save_pretrained(tmp_path)
    refused(str(tmp_path), "weights-missing", "model.safetensors")
    source = open_model(str(tmp_path), dtype=None, meta_weights=True)
    assert source.weights is None and source.dtype == "bfloat16"
    inv_freq = source.module.model.rotary_emb.inv_freq
    assert inv_freq.device.type == "cpu" and float(inv_freq[0]) == 1.0


def test_a_70b_shape_opens_fast_and_small(tmp_path: Path) -> None:
    write_config(
        tmp_path,
        model_type="llama",
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        torch_dtype="bfloat16",
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    source = open_model(str(tmp_path), dtype=None, meta_weights=True)
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert sum(p.numel() for p in source.module.parameters()) > 70e9


# the hub


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tiny_model("llama"), tmp_path)
    asked: list[dict[str, Any]] = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append({"name": name, **kwargs})
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = open_model("some-org/tiny.llama-1", dtype=None, revision="abc")
    assert source.name == "some-org/tiny.llama-1" and source.folder == str(folder)
    assert len(asked) == 1 and asked[0]["name"] == "some-org/tiny.llama-1" and asked[0]["revision"] == "abc"
    assert "*.safetensors" in asked[0]["allow_patterns"]
    assert not any("bin" in p or "py" in p for p in asked[0]["allow_patterns"])


def test_hub_id_with_bin_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The .bin files are fetched only if there are no safetensors."""
    folder = save(tiny_model("llama"), tmp_path, as_bin=True)
    asked: list[list[str]] = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append(kwargs["allow_patterns"])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_model("org/old", dtype=None).weights is not None
    assert len(asked) == 2 and asked[1] == ["pytorch_model*.bin"]


def test_meta_weights_download_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    asked: list[list[str]] = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append(kwargs["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    open_model("org/name", dtype=None, meta_weights=True)
    assert asked == [["*.json", "*.jinja"]]


def test_hub_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **kwargs: Any) -> str:
        raise OSError("404 Client Error.\nlong\nstory")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    error = refused("org/nope", "hub-download", "org/nope", "404 Client Error", "revision v2", revision="v2")
    assert "\n" not in str(error)


@pytest.mark.parametrize("path", ("/no/such/folder", "./models/x", "a/b/c", "~/nope/x", "models/x/"))
def test_no_such_folder(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **kwargs: Any) -> str:
        raise AssertionError("a path must not be looked up on the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    refused(path, "model-not-found", path, "does not exist")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    refused(str(file), "model-not-found", "is a file")


# configs


def test_no_config(tmp_path: Path) -> None:
    refused(str(tmp_path), "config-missing", "config.json")


@pytest.mark.parametrize("text", ("{", "\xff", "[]", '{"hidden_size": 3}', '{"model_type": 7}'))
def test_unreadable_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(LlmcError, match=r"config-(unreadable|without-type)"):
        open_model(str(tmp_path), dtype=None)


def test_unknown_type(tmp_path: Path) -> None:
    refused(str(write_config(tmp_path, model_type="llama99")), "unknown-architecture", "'llama99'")


def test_code_in_the_checkpoint_is_never_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "modeling_evil.py").write_text(
        f"open({str(touched)!r}, 'w')\nfrom transformers import PreTrainedConfig\n"
        "class EvilConfig(PreTrainedConfig):\n    model_type = 'evil'\n"
    )
    auto_map = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    write_config(tmp_path, model_type="evil", auto_map=auto_map)
    refused(str(tmp_path), "unknown-architecture", "'evil'", "never runs")
    write_config(tmp_path, **tiny_config("llama").to_dict(), auto_map=auto_map)
    open_model(str(tmp_path), dtype=None, meta_weights=True)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("bert", "an encoder."),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("vit", "not a language model"),
    ],
)
def test_no_decoder(kind: str, found: str, tmp_path: Path) -> None:
    values = {"is_encoder_decoder": True} if "decoder" in found and "encoder." not in found else {}
    write_config(tmp_path, model_type=kind, **values)
    refused(str(tmp_path), "not-a-decoder", repr(kind), found)


@pytest.mark.parametrize(
    "values",
    ({"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "nope"}, {"hidden_size": 65}),
)
def test_nonsense_in_the_config(values: dict[str, Any], tmp_path: Path) -> None:
    write_config(tmp_path, **{**tiny_config("llama").to_dict(), **values})
    error = refused(str(tmp_path), "config-invalid", "config.json", meta_weights=True)
    assert "\n" not in str(error)


def test_quantized(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "hqq"}})
    )
    refused(str(folder), "quantization-config", "hqq")


# Python objects


def test_transformers_module() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True).train()
    source = open_model(model, dtype=None)
    assert (source.dtype, source.model_type, source.max_seq_len) == ("bfloat16", "llama", 512)
    assert source.folder is None and source.config["hidden_size"] == 64
    assert {p.device.type for p in source.module.parameters()} == {"meta"}
    assert source.module.lm_head.weight is source.module.model.embed_tokens.weight
    assert not source.module.training and model.training
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert source.weights is not None and "lm_head.weight" not in source.weights.names()
    assert torch.equal(source.module.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_transformers_module_in_another_dtype() -> None:
    """Computed buffers are what transformers makes of them in that dtype; one that was changed is cast."""
    model = tiny_model("gemma3_text")
    expected = tiny_model("gemma3_text").config
    twin = AutoModelForCausalLM.from_config(expected, dtype=torch.bfloat16)
    model.model.rotary_emb.sliding_attention_inv_freq.mul_(2)
    source = open_model(model, dtype=DType.BF16)
    got, own = dict(source.module.named_buffers()), dict(twin.named_buffers())
    assert set(got) == set(own) and any("embed_scale" in n for n in got)
    for name in got:
        if name == "model.rotary_emb.sliding_attention_inv_freq":
            assert torch.equal(got[name], model.model.rotary_emb.sliding_attention_inv_freq.bfloat16())
        else:
            assert got[name].dtype == own[name].dtype and torch.equal(got[name], own[name]), name
    assert {p.dtype for p in source.module.parameters()} == {torch.bfloat16}


def test_transformers_module_keeps_float32_weights() -> None:
    state = open_model(tiny_model("deepseek_v3"), dtype=DType.BF16).module.state_dict()
    kept = {n for n, t in state.items() if t.dtype == torch.float32}
    assert kept and all("e_score_correction_bias" in n for n in kept)


class Plain(torch.nn.Module):
    """No transformers about it; one weight is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("table", torch.arange(8.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.scale * self.embed(ids) @ self.embed.weight.T


def test_plain_module() -> None:
    module = Plain()
    source = open_model(module, dtype=DType.BF16)
    assert source.dtype == "float32" and source.max_seq_len == NO_LIMIT and source.model_type == "Plain"
    assert source.weights is not None and source.weights.names() == ("embed.weight", "scale")
    assert source.module.embed.weight.dtype == torch.bfloat16
    assert source.weights.load("embed.weight").dtype == torch.float32
    assert torch.equal(source.module.table, module.table.bfloat16())


def test_module_without_values() -> None:
    with torch.device("meta"):
        module = Plain()
    source = open_model(module, dtype=None)
    assert source.weights is not None
    with pytest.raises(LlmcError, match="weight-missing"):
        source.weights.load("embed.weight")


def test_exported_program(tmp_path: Path) -> None:
    module = Plain()
    program = torch.export.export(module, (torch.zeros(1, 4, dtype=torch.long),))
    torch.export.save(program, tmp_path / "m.pt2")
    for model in (program, str(tmp_path / "m.pt2")):
        source = open_model(model, dtype=None)
        assert source.program is not None and source.dtype == "float32" and source.weights is not None
        assert torch.equal(source.weights.load("embed.weight"), module.embed.weight)
    with pytest.raises(LlmcError, match=r"float32; bfloat16.*exported-dtype"):
        open_model(program, dtype=DType.BF16)


def test_bad_pt2(tmp_path: Path) -> None:
    refused(str(tmp_path / "no.pt2"), "model-not-found", "no.pt2")
    (tmp_path / "bad.pt2").write_bytes(b"PK nothing")
    error = refused(str(tmp_path / "bad.pt2"), "pt2-damaged", "bad.pt2")
    assert re.search(r"torch\.export\.save", error.hint)
