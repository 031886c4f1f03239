"""Pruning and low-rank factors: better methods lose less on the calibration text, and zeros stay zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.frontend.graph import SourceModel
from llmc.frontend.low_rank import low_rank
from llmc.quant.awq import AWQ
from llmc.quant.calibrate import Method, calibrate
from llmc.quant.gptq import GPTQ
from llmc.quant.low_rank import factors
from llmc.quant.prune import pruned
from llmc.quant.recorder import Moments
from llmc.quant.schemes import SCHEMES
from llmc.quant.shrink import PruneRule, RankRule
from llmc.quant.transform import factor, prune
from llmc.reference import reference_logits
from llmc.spec import CompileSpec
from tests.frontend.tiny import save, tiny_model
from tests.quant.test_calibrate import SEQUENCES, correlated, matrices, opened


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments.zero(x.shape[1])
    moments.add(x)
    return moments


@pytest.mark.parametrize("pattern", ("2:4", "1:4", "4:8", "0.5", "0.7"))
def test_better_methods_lose_less(pattern: str) -> None:
    x = correlated(192)
    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(2))
    error = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        rule = PruneRule.parse(f"{method}:{pattern}")
        result = pruned("w", weight, moments_of(x), rule)
        assert float((result == 0).double().mean()) == pytest.approx(rule.share, abs=0.005)
        if rule.of:
            zeros = (result.reshape(48, -1, rule.of) == 0).sum(dim=2)
            assert int(zeros.min()) == int(zeros.max()) == rule.of - rule.kept
        error[method] = float(((result - weight) @ x.T).norm())
    assert error["wanda"] < 0.95 * error["magnitude"]
    assert error["sparsegpt"] < 0.9 * error["wanda"]


def test_sparsegpt_without_correlation_is_wanda_without_weights() -> None:
    """With a diagonal Hessian nothing is passed on: the smallest of each group go."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    x = torch.eye(64)
    results = [
        pruned("w", weight, moments_of(x), PruneRule.parse(f"{m}:2:4")) for m in ("sparsegpt", "wanda")
    ]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("scheme", ("q4g32", "q4g32a", "q3g64", "nf4", "mxfp4", "fp8", "q8"))
def test_zeros_stay_zeros_when_rounded(scheme: str) -> None:
    """Also through GPTQ, which moves every weight before it rounds it; and the rest makes up for them."""
    from llmc.quant.gptq import gptq
    from llmc.quant.rounding import packed
    from llmc.quant.rtn import quantize

    x = correlated(192)
    weight = torch.randn(32, 192, generator=torch.Generator().manual_seed(2))
    sparse = pruned("w", weight, moments_of(x), PruneRule.parse("wanda:2:4"))
    codes, grid = gptq(sparse, x.T @ x, SCHEMES[scheme])
    made = packed(codes, grid).dequantize()
    nearest = quantize(sparse.numpy(), SCHEMES[scheme]).dequantize()
    for values in (made, nearest):
        assert (values[sparse.numpy() == 0] == 0).all()
    errors = [np.linalg.norm((v - sparse.numpy()) @ x.numpy().T) for v in (made, nearest)]
    assert errors[0] < errors[1]


def logits(source: SourceModel) -> np.ndarray:
    return reference_logits(source, SEQUENCES[0].tolist(), "float32").logits


@pytest.mark.parametrize("kind", ("llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3"))
def test_every_matrix_but_routers(kind: str, tmp_path: Path) -> None:
    """Whatever is transposed, shared or an expert; then quantized: two of four are zero along the inputs."""
    source = opened(kind, tmp_path)
    made = prune(source, SEQUENCES, PruneRule.parse("sparsegpt:2:4"))
    assert made.source.weights is not None
    method: Method = AWQ(rounding=GPTQ()) if kind == "llama" else GPTQ()
    names = [n for n in matrices(source) if n in made.errors]
    assert len(names) >= 6 and not any("router" in n or n.endswith("mlp.gate.weight") for n in made.errors)
    weights = calibrate(made.source, {n: SCHEMES["q4g32"] for n in names}, SEQUENCES, method).weights
    for name in names:
        stored = weights.quantized(name)
        assert stored is not None
        values = stored.dequantize()
        zeros = (values.reshape(-1, 4) == 0).sum(axis=1)
        assert zeros.min() >= 2, name
        assert 0 < made.errors[name] < 0.9
    assert np.isfinite(logits(made.source)).all()


def test_magnitude_needs_no_text(tmp_path: Path) -> None:
    from llmc.quant.methods import Calibration, calibrated

    source = opened("llama", tmp_path)
    made, _ = calibrated(source, {}, Calibration("rtn", None, prune=PruneRule.parse("magnitude:0.25")))
    assert made.weights is not None and source.weights is not None
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = source.weights.load(name), made.weights.load(name)
    kept = after != 0
    assert float(kept.double().mean()) == pytest.approx(0.75, abs=1e-3)
    torch.testing.assert_close(after[kept], before[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_factors_look_at_activations(shape: tuple[int, int]) -> None:
    n, k = shape
    x = correlated(k)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(4))
    first, second = factors(weight, moments_of(x), 24)
    assert first.shape == (24, k) and second.shape == (n, 24)
    u, s, v = torch.linalg.svd(weight)
    plain = (u[:, :24] * s[:24]) @ v[:24]
    error = ((second @ first - weight) @ x.T).norm()
    assert error < 0.9 * ((plain - weight) @ x.T).norm()
    # the best that any matrix of that rank can do: the singular values of the outputs that are left out
    best = torch.linalg.svdvals((weight @ x.T).double())[24:].norm()
    assert best <= error * (1 + 1e-6) and error < 1.02 * best
    whole = factors(weight, moments_of(x), min(n, k))
    torch.testing.assert_close(whole[1] @ whole[0], weight, rtol=1e-4, atol=1e-4)


def test_low_rank_model_runs(tmp_path: Path) -> None:
    """The structure has two linear layers in the place of one, with the bias behind the second; gradual in the rank."""
    source = opened("qwen2", tmp_path)
    want = logits(source)
    errors = []
    for ratio in (0.5, 0.9):
        made = factor(source, SEQUENCES, RankRule(ratio=ratio)).source
        assert made.weights is not None
        names = dict(made.module.named_parameters())
        path = "model.layers.0.self_attn.q_proj"
        rank = int(ratio * 64 * 64 / 128)
        assert names[f"{path}.first.weight"].shape == (rank, 64) and f"{path}.weight" not in names
        assert f"{path}.second.bias" in names and set(names) == set(made.weights.names())
        errors.append(np.linalg.norm(logits(made) - want) / np.linalg.norm(want))
    assert errors[1] < 0.7 * errors[0]
    quantized = calibrate(made, {f"{path}.second.weight": SCHEMES["q8g32"]}, SEQUENCES, GPTQ()).weights
    assert quantized.quantized(f"{path}.second.weight") is not None


def test_ranks_that_save_nothing(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    _, ranks = low_rank(source, RankRule(rank=30))
    # k and v are 32 x 64: their factors would be larger than they are
    assert {p.rpartition(".")[2] for p in ranks} == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(LlmcError, match="largest rank that makes one smaller is 42"):
        low_rank(source, RankRule(rank=60))


def test_width_that_the_pattern_does_not_divide() -> None:
    with pytest.raises(LlmcError, match=r"2:4 needs a number of inputs that 4 divides; a\.b has 30"):
        pruned("a.b", torch.ones(4, 30), None, PruneRule.parse("wanda:2:4"))


@pytest.mark.parametrize(
    ("fields", "ref"),
    [
        ({"prune": "wanda"}, "prune-pattern"),
        ({"prune": "wanda:4:4", "calib_text": "a"}, "prune-pattern"),
        ({"prune": "wanda:1.5", "calib_text": "a"}, "prune-pattern"),
        ({"prune": "wanda:x", "calib_text": "a"}, "prune-pattern"),
        ({"prune": "obs:2:4", "calib_text": "a"}, "prune-method"),
        ({"prune": "sparsegpt:2:4"}, "method-without-text"),
        ({"svd": "0.5"}, "method-without-text"),
        ({"svd": "-3", "calib_text": "a"}, "svd-rank"),
        ({"svd": "1.5", "calib_text": "a"}, "svd-rank"),
        ({"svd": "half", "calib_text": "a"}, "svd-rank"),
        ({"svd": "8", "prune": "magnitude:0.5", "calib_text": "a"}, "prune-and-svd"),
        ({"prune": "magnitude:0.5", "meta_weights": True}, "transform-without-weights"),
    ],
)
def test_bad_requests_are_one_sentence(fields: dict[str, object], ref: str) -> None:
    with pytest.raises(LlmcError) as caught:
        CompileSpec.from_json({"model": "m", **fields})
    assert caught.value.ref == ref


def test_requests_go_through_the_spec() -> None:
    spec = CompileSpec.from_json({"model": "m", "svd": 64, "calib_text": "a"})
    assert spec.rank_rule() == RankRule(rank=64) and spec.calibrates()
    spec = CompileSpec.from_json({"model": "m", "prune": "magnitude:1:4"})
    assert (
        spec.prune_rule() == PruneRule("magnitude", 0.75, 1, 4) and str(spec.prune_rule()) == "magnitude:1:4"
    )
    assert CompileSpec.from_json(spec.to_json()) == spec


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    from llmc.quant.methods import Calibration, calibrated
    from tests.quant.prequantized import DEMO

    source = open_model(str(save(tiny_model("llama"), tmp_path)), dtype=None)
    plan = {"model.layers.0.mlp.up_proj.weight": SCHEMES["q4g32"]}
    made = calibrate(source, plan, SEQUENCES, GPTQ())
    from dataclasses import replace

    stored = replace(source, weights=made.weights)
    with pytest.raises(LlmcError, match="already-quantized"):
        calibrated(
            stored, {}, Calibration("rtn", DEMO / "calibration.txt", prune=PruneRule.parse("magnitude:0.5"))
        )
