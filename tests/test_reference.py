"""The reference runner gives exactly what transformers gives, whatever little memory it may use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.reference import _units, reference_logits
from llmc.spec import DType
from tests.frontend.tiny import save, tiny_config, tiny_model

KINDS = (
    "llama",
    "gpt2",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "gemma3_text",
    "bloom",
    "opt",
    "falcon",
)
IDS = [3, 150, 7, 99, 42, 8, 8, 120, 61, 5, 33]


def eager(folder: Path, dtype: torch.dtype, ids: list[int] = IDS) -> np.ndarray:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        out: np.ndarray = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", (1 << 30, 40_000, 1))
def test_equals_transformers_in_float32(kind: str, budget: int, tmp_path: Path) -> None:
    """The checkpoint is bfloat16, the reference float32: embedding scales and the like must not be rounded."""
    folder = save(tiny_model(kind, dtype=torch.bfloat16), tmp_path)
    source = open_model(str(folder), dtype=None)
    result = reference_logits(source, IDS, "float32", budget=budget)
    assert result.logits.dtype == np.float32
    np.testing.assert_array_equal(result.logits, eager(folder, torch.float32))


@pytest.mark.parametrize("kind", ("llama", "gpt_oss", "gemma3_text", "deepseek_v3"))
def test_equals_transformers_in_bfloat16(kind: str, tmp_path: Path) -> None:
    folder = save(tiny_model(kind, dtype=torch.bfloat16), tmp_path)
    result = reference_logits(open_model(str(folder), dtype=None), IDS, "bfloat16", budget=40_000)
    np.testing.assert_array_equal(result.logits, eager(folder, torch.bfloat16))


def test_memory_is_bounded(tmp_path: Path) -> None:
    """At any time no more weights are materialised than the budget, or one module's."""
    folder = save(tiny_model("llama", num_hidden_layers=6), tmp_path)
    source = open_model(str(folder), dtype=None)
    largest = max(p.numel() * 4 for p in source.module.parameters())
    budget = sum(p.numel() * 4 for p in source.module.model.layers[0].parameters())
    alive: list[int] = []

    def live(module: torch.nn.Module, args: object, out: object) -> None:
        alive.append(sum(p.numel() * 4 for p in root.parameters() if p.device.type != "meta"))

    import llmc.reference as reference

    original = reference._runnable

    def runnable(*args: object) -> torch.nn.Module:
        nonlocal root
        root = original(*args)  # type: ignore[arg-type]
        for module in root.modules():
            if not list(module.children()):
                module.register_forward_hook(live)
        return root

    root: torch.nn.Module = source.module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_runnable", runnable)
        reference_logits(source, IDS, "float32", budget=budget)
    assert len(alive) > 20
    assert 0 < max(alive) <= max(budget, largest)
    assert all(p.device.type == "meta" for p in root.parameters())


def test_units_cover_every_weight_once(tmp_path: Path) -> None:
    source = open_model(str(save(tiny_model("gpt_oss"), tmp_path)), dtype=None)
    everything = {n for n, _ in source.module.named_parameters(remove_duplicate=False)}
    for budget in (1, 30_000, 1 << 30):
        names = [s.name for _, slots in _units(source.module, "", budget) for s in slots]
        assert len(names) == len(set(names)) and set(names) == everything


def test_source_module_is_left_alone(tmp_path: Path) -> None:
    source = open_model(str(save(tiny_model("llama"), tmp_path)), dtype=None)
    source.module.config._attn_implementation = "sdpa"
    before = {n: id(p) for n, p in source.module.named_parameters()}
    reference_logits(source, IDS, "float32")
    assert {n: id(p) for n, p in source.module.named_parameters()} == before
    assert source.module.config._attn_implementation == "sdpa"
    assert all(p.device.type == "meta" for p in source.module.parameters())


def test_taps(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), tmp_path)
    paths = ("model.layers.0", "model.layers.1", "model.norm")
    result = reference_logits(open_model(str(folder), dtype=None), IDS, "float32", taps=paths, budget=1)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        hidden = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    assert tuple(result.taps) == paths
    np.testing.assert_array_equal(result.taps["model.layers.0"], hidden[1][0].numpy())
    np.testing.assert_array_equal(result.taps["model.norm"], hidden[2][0].numpy())


def test_module_from_python() -> None:
    model = tiny_model("llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    source = open_model(model, dtype=None)
    got = reference_logits(source, IDS, "bfloat16").logits
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].float().numpy()
    np.testing.assert_array_equal(got, expected)
    assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("kind", ("gemma3_text", "llama", "deepseek_v3"))
def test_module_from_python_compiled_in_another_dtype(kind: str) -> None:
    """The float32 reference of a float32 module is the module, whatever the artifact's dtype."""
    model = tiny_model(kind)
    model.set_experts_implementation("eager") if kind == "deepseek_v3" else None
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    source = open_model(model, dtype=DType.BF16)
    np.testing.assert_array_equal(reference_logits(source, IDS, "float32").logits, expected)


class _Plain(torch.nn.Module):
    """A module that reads its child's weight around the child's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.mix = torch.nn.Linear(16, 16)
        self.rows = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(16)) for _ in range(2)])

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.rows[0] + positions[..., None]
        x = torch.nn.functional.linear(x, self.mix.weight) * self.rows[1]
        return x @ self.embed.weight.T


def test_plain_module_with_weights_read_from_outside() -> None:
    torch.manual_seed(0)
    module = _Plain()
    ids = [3, 4, 5]
    got = reference_logits(open_model(module, dtype=None), ids, "float32", budget=1).logits
    with torch.no_grad():
        expected = module(torch.tensor([ids]), torch.arange(3)[None])[0].numpy()
    np.testing.assert_array_equal(got, expected)


class _Lender(torch.nn.Module):
    """Returns a view of its weight: that memory must not be used for the next module's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 16))

    def forward(self, n: int) -> tuple[torch.Tensor]:
        return (self.weight[:n],)


class _Borrower(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = _Lender(), _Lender(), _Lender()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        n = ids.shape[1]
        parts = [m(n)[0] for m in (self.first, self.second, self.third)]
        return torch.stack(parts).sum(0)[None]


@pytest.mark.parametrize("least", (1, 1 << 20))
def test_buffers_are_used_again_only_if_nobody_looks(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.reference import _Buffers

    monkeypatch.setattr(_Buffers, "_WORTH", least)
    torch.manual_seed(0)
    module = _Borrower().bfloat16()
    got = reference_logits(open_model(module, dtype=None), [1, 2, 3], "float32", budget=1).logits
    with torch.no_grad():
        expected = module.float()(torch.tensor([[1, 2, 3]]))[0].numpy()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", ("llama", "mixtral", "gpt2", "opt"))
def test_reused_buffers_change_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.reference import _Buffers

    monkeypatch.setattr(_Buffers, "_WORTH", 1)
    folder = save(tiny_model(kind, dtype=torch.bfloat16), tmp_path)
    for budget in (1, 60_000):
        result = reference_logits(open_model(str(folder), dtype=None), IDS, "float32", budget=budget)
        np.testing.assert_array_equal(result.logits, eager(folder, torch.float32))


def test_without_weights(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(LlmcError, match="no-weights"):
        reference_logits(open_model(str(tmp_path), dtype=None, meta_weights=True), IDS, "float32")


def test_inputs_of_named_weights_are_rounded_to_int8(tmp_path: Path) -> None:
    """What an integer kernel does to its activations, whatever torch function multiplies."""
    from llmc.products import InputRounding, Product, RoundedInputs

    x = torch.tensor([[1.0, -2.0, 127.4], [0.0, 0.0, 0.0]])
    expected = torch.round(x * (127 / 127.4)) * (torch.tensor(127.4) / 127)
    torch.testing.assert_close(InputRounding()(x), expected * (x != 0), rtol=1e-6, atol=0)
    weight = torch.randn(4, 3)
    with RoundedInputs.of({"w": weight}, {"w": InputRounding()}):
        for got in (
            torch.nn.functional.linear(x, weight),
            x @ weight.T,
            torch.addmm(torch.zeros(4), x, weight.T),
            torch.nn.functional.linear(input=x, weight=weight),
        ):
            torch.testing.assert_close(got, expected @ weight.T)
        torch.testing.assert_close(x @ torch.eye(3), x)
    assert Product.of(torch.add, (x, x), {}) is None

    folder = save(tiny_model("llama"), tmp_path / "model")
    source = open_model(str(folder), dtype=None)
    plain = reference_logits(source, IDS, "float32").logits
    source.weights.rounded_inputs = {"model.layers.0.mlp.up_proj.weight": InputRounding()}
    for budget in (1, 1 << 30):
        changed = reference_logits(source, IDS, "float32", budget=budget).logits
        assert 1e-5 < np.abs(changed - plain).max() / np.abs(plain).max() < 0.05
    # the mlp's inputs have 64 columns: with all of them kept nothing is rounded
    source.weights.rounded_inputs = {
        "model.layers.0.mlp.up_proj.weight": InputRounding(kept=torch.arange(64))
    }
    np.testing.assert_array_equal(reference_logits(source, IDS, "float32").logits, plain)
    source.weights.rounded_inputs = {"model.layers.0.mlp.up_proj.weight": InputRounding()}
    jittered = reference_logits(source, IDS, "float32", jitter=0.01).logits
    assert 0 < np.abs(jittered - changed).max() < np.abs(plain).max()
