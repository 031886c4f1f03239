"""Calibration layer by layer: the same hidden states as the model, exact folds, better rounding than to the nearest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.frontend.graph import SourceModel
from llmc.quant.awq import AWQ
from llmc.quant.calibrate import LayerWork, Method, Nearest, calibrate
from llmc.quant.corpus import calibration_sequences
from llmc.quant.fold import Fold, find_folds
from llmc.quant.gptq import GPTQ, GPTQOptions, gptq
from llmc.quant.methods import Calibration, calibrated
from llmc.quant.recorder import Recorder
from llmc.quant.rounding import best_grid, decode, encode, packed, plain_grid
from llmc.quant.rtn import quantize
from llmc.quant.runner import LayerRunner
from llmc.quant.schemes import SCHEMES, Scheme
from llmc.quant.smooth import SmoothQuant
from llmc.reference import reference_logits
from tests.frontend.tiny import save, tiny_model
from tests.quant.prequantized import DEMO

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
SEQUENCES = torch.randint(0, 160, (3, 24), generator=torch.Generator().manual_seed(0))


def opened(kind: str, folder: Path) -> SourceModel:
    return open_model(str(save(tiny_model(kind), folder)), dtype=None)


def matrices(source: SourceModel, scheme: str = "q4g32") -> dict[str, Scheme]:
    """Everything that is multiplied with activations inside of the layers, biases of experts not."""
    return {
        name: SCHEMES[scheme]
        for name, p in source.module.named_parameters()
        if p.ndim >= 2 and ("layers." in name or ".h." in name) and "bias" not in name and "norm" not in name
    }


def runner_of(source: SourceModel, sequences: torch.Tensor = SEQUENCES) -> LayerRunner:
    assert source.weights is not None
    runner = LayerRunner(source, source.weights, sequences)
    runner.start()
    return runner


def inputs_of(model: torch.nn.Module, path: str) -> torch.Tensor:
    """What a module gets on the sequences, [tokens, width]."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(SEQUENCES)
    hook.remove()
    return torch.cat(seen).flatten(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_models(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.quant.runner.TOKENS_PER_BATCH", 48)  # batches of two and one
    source = opened(kind, tmp_path)
    runner = runner_of(source)
    for path in runner.layers:
        with runner.held(path) as layer:
            runner.advance(layer)
    taps = reference_logits(source, SEQUENCES[2].tolist(), "float32", taps=(runner.layers[-1],)).taps
    np.testing.assert_allclose(
        runner._hidden[1][0].numpy(), taps[runner.layers[-1]], rtol=1e-4, atol=2e-5 * np.abs(taps[path]).max()
    )


def test_one_layer_is_in_memory(tmp_path: Path) -> None:
    source = open_model(str(save(tiny_model("llama", num_hidden_layers=4), tmp_path)), dtype=None)
    runner = runner_of(source)
    for path in runner.layers:
        with runner.held(path) as layer:
            runner.advance(layer)
            real = [n for n, p in runner._model.named_parameters() if p.device.type != "meta"]
            assert real and all(n.startswith(path + ".") for n in real)
    assert all(p.device.type == "meta" for p in runner._model.parameters())


def test_statistics_of_inputs(tmp_path: Path) -> None:
    """Those of q, k and v are one; against hooks on the model itself."""
    model = tiny_model("llama")
    runner = runner_of(open_model(str(save(model, tmp_path)), dtype=None))
    with runner.held("model.layers.0") as layer:
        recorder = Recorder(layer.parameters)
        runner.feed(layer, recorder.watch)
        usages = recorder.finish()
    prefix = "model.layers.0."
    assert {n.removeprefix(prefix) for n in usages} == {
        *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
        *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    }
    q, k = (usages[f"{prefix}self_attn.{x}_proj.weight"] for x in "qk")
    assert q.group == k.group and q.moments[0] is k.moments[0]
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        x = inputs_of(model, prefix + name)
        moments = usages[f"{prefix}{name}.weight"].moments[0]
        assert moments is not None and moments.rows == 72
        torch.testing.assert_close(moments.second, x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.magnitude, x.abs().sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.peak, x.abs().amax(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"))
def test_experts_have_inputs_of_their_own(kind: str, tmp_path: Path) -> None:
    source = opened(kind, tmp_path)
    runner = runner_of(source)
    path = runner.layers[-1]
    with runner.held(path) as layer:
        recorder = Recorder(layer.parameters)
        runner.feed(layer, recorder.watch)
        usages = recorder.finish()
        experts = {n: u for n, u in usages.items() if layer.parameters[n].ndim == 3}
    assert len(experts) == 2
    top = getattr(source.module.config, "num_experts_per_tok", 2)
    for usage in experts.values():
        assert usage.transposed == (kind == "gpt_oss")
        assert sum(m.rows for m in usage.moments if m is not None) == SEQUENCES.numel() * top


class _Random:
    """Scales every fold by random factors and keeps the layers' outputs before and after."""

    def __init__(self) -> None:
        self.folds: list[Fold] = []
        self.errors: list[float] = []

    def prepare(self, work: LayerWork) -> None:
        before = work.runner.probe(work.layer, lambda: Recorder({}).watch())
        folds = find_folds(work)
        self.folds += folds
        for fold in folds:
            generator = torch.Generator().manual_seed(len(self.folds))
            fold.apply(work, torch.rand(fold.width, generator=generator) + 0.5)
        after = work.runner.probe(work.layer, lambda: Recorder({}).watch())
        self.errors.append(float((after - before).abs().max() / before.abs().max()))

    def round(self, *args: object) -> object:
        return Nearest().round(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", ("input_layernorm", "post_attention_layernorm", "v_proj", "up_proj")),
        ("gemma3_text", ("input_layernorm", "pre_feedforward_layernorm", "v_proj", "up_proj")),
        ("gpt2", ("ln_1", "ln_2")),
        ("opt", ("self_attn_layer_norm", "final_layer_norm", "v_proj", "fc1")),
        ("mixtral", ("input_layernorm", "v_proj")),
        ("falcon", ()),
    ],
)
def test_folds_change_nothing(kind: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    """Found by trying, for architectures with and without grouped heads, fused projections, parallel blocks and experts."""
    source = opened(kind, tmp_path)
    method = _Random()
    calibrate(source, matrices(source), SEQUENCES, method)
    assert max(method.errors) < 1e-4
    found = {fold.producer.weight.split(".")[-2] for fold in method.folds}
    assert found >= set(expected)


def test_fold_of_v_shares_heads(tmp_path: Path) -> None:
    method = _Random()
    source = opened("llama", tmp_path)
    calibrate(source, matrices(source), SEQUENCES, method)
    (fold,) = [f for f in method.folds if "layers.0" in f.producer.weight and "v_proj" in f.producer.weight]
    # 4 query heads of 16 over 2 heads of k and v
    np.testing.assert_array_equal(
        fold.channel.reshape(4, 16).numpy(), np.arange(32).reshape(2, 16).repeat(2, axis=0)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", (GPTQ, AWQ, SmoothQuant))
def test_every_architecture(kind: str, method: Callable[[], Method], tmp_path: Path) -> None:
    """At 8 bits the calibrated model stays close to the source, whatever was folded, transposed or shared."""
    source = opened(kind, tmp_path)
    plan = matrices(source, "q8g32")
    result = calibrate(source, plan, SEQUENCES, method())
    from dataclasses import replace

    ids = SEQUENCES[0].tolist()
    got = reference_logits(replace(source, weights=result.weights), ids, "float32").logits
    want = reference_logits(source, ids, "float32").logits
    # of most tokens: a router may send single ones to other experts
    assert np.median(np.abs(got - want).max(axis=1)) < 0.03 * np.abs(want).max()
    for name, scheme in plan.items():
        stored = result.weights.quantized(name)
        assert stored is not None and stored.scheme is scheme
        assert result.quantizer.quantize(name, stored.codes, scheme).codes.shape == stored.codes.shape
        assert result.weights.load(name).shape == source.module.get_parameter(name).shape
    with pytest.raises(LlmcError, match="not-calibrated"):
        result.quantizer.quantize(name, stored.codes, SCHEMES["nf4"])


def test_what_no_token_reaches_is_reported(tmp_path: Path) -> None:
    source = opened("qwen3_moe", tmp_path)
    result = calibrate(source, matrices(source), SEQUENCES[:1, :1], GPTQ())
    assert any(
        "2 of 4 experts of model.layers.0.mlp.experts.gate_up_proj: rounded to the nearest" in n
        for n in result.notes
    )


def test_head_and_tied_embedding(tmp_path: Path) -> None:
    """The output projection gets the statistics of the last norm; tied to the embedding it is one tensor."""
    for tied in (False, True):
        model = tiny_model("llama", tie_word_embeddings=tied)
        source = open_model(str(save(model, tmp_path / str(tied))), dtype=None)
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        result = calibrate(source, {name: SCHEMES["q4g32"]}, SEQUENCES, GPTQ())
        assert result.notes == () and result.weights.quantized(name) is not None
        assert 0 < result.errors[name] < 0.2


def correlated(k: int, rows: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    return torch.randn(rows, k, generator=generator) @ mix * torch.rand(k, generator=generator).exp()


@pytest.mark.parametrize("scheme", ("q4g32", "q4g32a", "q3g64", "q8", "nf4", "mxfp4", "fp8"))
@pytest.mark.parametrize("order", (True, False))
def test_gptq_beats_nearest(scheme: str, order: bool) -> None:
    x = correlated(192)
    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(2))
    codes, grid = gptq(weight, x.T @ x, SCHEMES[scheme], GPTQOptions(act_order=order, block=64))
    made = torch.from_numpy(packed(codes, grid).dequantize())
    plain = best_grid(weight, SCHEMES[scheme])
    nearest = decode(encode(weight, plain), plain)
    assert ((made - weight) @ x.T).norm() < 0.95 * ((nearest - weight) @ x.T).norm()


def test_gptq_without_correlation_is_nearest() -> None:
    """With a diagonal Hessian there is nothing to compensate."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    codes, grid = gptq(weight, torch.eye(64), SCHEMES["q4g32"])
    assert torch.equal(codes, encode(weight, grid).to(torch.uint8))
    dead = torch.eye(64)
    dead[5, 5] = 0
    assert torch.equal(gptq(weight, dead, SCHEMES["q4g32"])[0], codes)


@pytest.mark.parametrize("scheme", sorted(name for name in SCHEMES if not SCHEMES[name].outlier_share))
def test_plain_grid_is_round_to_nearest(scheme: str) -> None:
    """The same scales and values as llmc.quant.rtn; only values half-way between two codes may go either way."""
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(4))
    grid = plain_grid(weight, SCHEMES[scheme])
    ours, theirs = packed(encode(weight, grid), grid), quantize(weight.numpy(), SCHEMES[scheme])
    np.testing.assert_allclose(ours.scales, theirs.scales, rtol=2e-7)
    assert np.isclose(ours.dequantize(), theirs.dequantize(), rtol=1e-6, atol=0).mean() > 0.999
    np.testing.assert_array_equal(ours.dequantize(), decode(encode(weight, grid), grid).numpy())


def test_weights_that_cannot_be_rounded() -> None:
    weight = torch.zeros(4, 64)
    grid = best_grid(weight, SCHEMES["q4g32"])
    assert (packed(encode(weight, grid), grid).dequantize() == 0).all()
    weight[1, 3] = float("nan")
    with pytest.raises(LlmcError, match="quant-not-finite"):
        plain_grid(weight, SCHEMES["q4g32"])
    weight[1, 3] = 1e7
    with pytest.raises(LlmcError, match="float16"):
        plain_grid(weight, SCHEMES["q4g32"])


def test_demo_model_is_better_than_nearest() -> None:
    """GPTQ and AWQ against rounding to the nearest: error of the logits on text that was not calibrated on."""
    source = open_model(str(DEMO), dtype=None)
    plan = {n: SCHEMES["q4g32"] for n in matrices(source)}
    calib = calibration_sequences(source, DEMO / "calibration.txt", sequences=6, length=256, seed=0)
    held = calibration_sequences(source, DEMO / "heldout.txt", sequences=1, length=512, seed=0)[0].tolist()
    want = reference_logits(source, held, "float32").logits
    from dataclasses import replace

    from llmc.quant.overlay import OverlayWeights

    assert source.weights is not None
    floats = {
        name: torch.from_numpy(quantize(source.weights.load(name).float().numpy(), scheme).dequantize())
        for name, scheme in plan.items()
    }
    plain = replace(source, weights=OverlayWeights(source.weights, floats))
    error = np.linalg.norm(reference_logits(plain, held, "float32").logits - want)
    for method, share in ((GPTQ(), 0.75), (AWQ(), 0.9)):
        got = replace(source, weights=calibrate(source, plan, calib, method).weights)
        assert np.linalg.norm(reference_logits(got, held, "float32").logits - want) < share * error


def test_by_name() -> None:
    source = open_model(str(DEMO), dtype=None)
    name = "model.layers.0.mlp.up_proj.weight"
    plan = {name: SCHEMES["q4g32"]}
    text = DEMO / "calibration.txt"
    done: list[tuple[int, int]] = []
    made, found = calibrated(
        source, plan, Calibration("gptq", text, 2, 64), progress=lambda i, n: done.append((i, n))
    )
    assert made.weights is found.weights and found.weights.quantized(name) is not None
    assert done == [(i + 1, 7) for i in range(7)]
    with pytest.raises(LlmcError, match="gptq, awq"):
        calibrated(source, plan, Calibration("qat", text))


def test_text_too_short(tmp_path: Path) -> None:
    source = open_model(str(DEMO), dtype=None)
    text = tmp_path / "short.txt"
    text.write_text("def f():\n    return 1\n")
    with pytest.raises(LlmcError) as caught:
        calibration_sequences(source, text, sequences=4, length=128, seed=0)
    assert "512 tokens" in str(caught.value) and "calibration-too-short" in str(caught.value)
    with pytest.raises(LlmcError, match="calibration-text"):
        calibration_sequences(source, tmp_path / "none.txt", sequences=1, length=8, seed=0)
    with pytest.raises(LlmcError, match="4096"):
        calibration_sequences(source, text, sequences=1, length=5000, seed=0)


def test_choice_of_text() -> None:
    source = open_model(str(DEMO), dtype=None)

    def chosen(seed: int) -> torch.Tensor:
        return calibration_sequences(source, DEMO / "calibration.txt", sequences=8, length=128, seed=seed)

    assert torch.equal(chosen(0), chosen(0)) and not torch.equal(chosen(0), chosen(1))
    assert len({tuple(row.tolist()) for row in chosen(0)}) == 8
