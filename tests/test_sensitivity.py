"""Sensitivities of weights measured under torch, and the whole search on a small model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.cli.quant_auto import choice_table, measured_table, write_plot
from llmc.errors import LlmcError
from llmc.evaluate import cut, evaluate
from llmc.frontend.checkpoint import open_model
from llmc.quant.choose import CANDIDATES, INT8_CANDIDATES, SEARCHED, SHARE, QuantSearch, choose
from llmc.quant.rtn import quantize
from llmc.quant.schemes import SCHEMES
from llmc.quant.sensitivity import Sensitivity, quantizables
from tools.tiny_configs import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return tiny_model("llama").float().eval()


@pytest.fixture(scope="module")
def windows(model: Any) -> list[Any]:
    """Text that the model itself writes: it predicts that well, as a trained model does its language."""
    ids = torch.tensor([[3]])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(191):
            probabilities = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return cut(ids[0].tolist(), window=64)


@pytest.mark.parametrize(
    ("architecture", "name", "shape", "transposed"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight", (64, 128), False),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", (192, 64), True),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", (4, 64, 128), False),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (4, 64, 128), True),
    ],
)
def test_weights_are_found_with_their_orientation(
    architecture: str, name: str, shape: tuple[int, ...], transposed: bool
) -> None:
    source = open_model(tiny_model(architecture), dtype=None)
    found = {q.name: q for q in quantizables(source)}
    assert found[name].shape[-1] == shape[-1] and found[name].shape[0] == shape[0]
    assert found[name].transposed == transposed
    assert not [n for n in found if "norm" in n or "router" in n or n.endswith("gate.weight")]


def test_a_tied_weight_occurs_once_under_its_first_name() -> None:
    source = open_model(tiny_model("llama", tie_word_embeddings=True), dtype=None)
    names = [q.name for q in quantizables(source)]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_loss_is_that_of_the_model_with_replaced_weights(model: Any, windows: list[Any]) -> None:
    names = {"model.layers.0.mlp.up_proj.weight": "q4g32", "lm_head.weight": "q3g64"}
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, scheme in names.items():
            weight = changed.get_parameter(name)
            weight.copy_(torch.from_numpy(quantize(weight.numpy(), SCHEMES[scheme]).dequantize()))

    def logits(of: Any) -> Any:
        def run(ids: Any) -> np.ndarray:
            with torch.no_grad():
                return of(torch.tensor([ids])).logits[0].numpy()

        return run

    growth = math.log(evaluate(logits(changed), windows).perplexity)
    growth -= math.log(evaluate(logits(model), windows).perplexity)
    oracle = Sensitivity(open_model(model, dtype=None), windows)
    assert oracle.loss(names) == pytest.approx(growth, abs=1e-5)
    assert oracle.loss(dict.fromkeys(names, "none")) == 0.0


def test_one_run_per_weight_predicts_the_other_schemes(model: Any, windows: list[Any]) -> None:
    """The quadratic rule: what q4g32 shows gives q3g64 and q8 within a factor of 1.6, over all weights."""
    oracle = Sensitivity(open_model(model, dtype=None), windows)
    predicted = oracle.candidates(["none", "q8", "q3g64"], "q4g32")
    direct = {s: oracle.candidates([s], s) for s in ("q8", "q3g64")}
    for at, scheme in ((1, "q8"), (2, "q3g64")):
        ratio = sum(c[at].loss for c in predicted.values()) / sum(c[0].loss for c in direct[scheme].values())
        assert 1 / 1.6 < ratio < 1.6, scheme
    for row in predicted.values():
        assert row[0].loss == 0 < row[1].loss < row[2].loss
        assert row[0].nbytes > row[1].nbytes > row[2].nbytes


def test_int8_activations_cost_what_a_direct_measurement_says(model: Any, windows: list[Any]) -> None:
    """w4a8 is predicted from two runs per weight; measured itself it is the same within a factor of 1.6, over all weights."""
    oracle = Sensitivity(open_model(model, dtype=None), windows)
    predicted = oracle.candidates(["none", "q4g32", "w4a8", "w8a8"], "q4g32")
    losses = [sum(row[at].loss for row in predicted.values()) for at in range(4)]
    assert 0 == losses[0] < losses[3] < losses[2] and losses[1] < losses[2]
    exact = oracle._logits({})(windows[0].ids)
    direct = 0.0
    for name in oracle.weights:
        result = evaluate(oracle._logits({name: "w4a8"}), windows[:1], against=lambda ids: exact).against
        assert result is not None
        direct += result.kl_mean
    assert 1 / 1.6 < losses[2] / direct < 1.6


def test_the_search_among_int8_schemes_stays_within_the_bound(model: Any, windows: list[Any]) -> None:
    found = choose(
        open_model(model, dtype=None),
        windows[:1],
        max_increase_percent=2.0,
        schemes=SEARCHED["auto-a8"],
        most=6,
        dtype="bfloat16",
    )
    assert found.choice.loss <= SHARE * math.log1p(0.02)
    chosen = {scheme for _, scheme in found.rules()}
    assert chosen <= set(INT8_CANDIDATES) and any(scheme.startswith("w") for scheme in chosen)
    assert found.choice.nbytes < 0.6 * found.full_bytes


@pytest.fixture(scope="module")
def found(model: Any, windows: list[Any]) -> QuantSearch:
    return choose(
        open_model(model, dtype=None),
        windows,
        max_increase_percent=2.0,
        uniform=True,
        most=8,
        dtype="bfloat16",
    )


def test_the_choice_is_smaller_than_any_single_scheme_within_the_bound(found: QuantSearch) -> None:
    budget = SHARE * math.log1p(0.02)
    assert found.choice.loss <= budget
    within = [nbytes for _, nbytes, loss in found.uniform if loss <= budget]
    assert found.choice.nbytes <= min([*within, found.full_bytes])
    assert sum(size.nbytes for size in found.sizes()) == found.choice.nbytes
    assert {scheme for _, scheme in found.rules()} <= set(CANDIDATES)
    assert all(not name.endswith(".weight") for name, _ in found.rules())


def test_the_tables_show_what_was_measured(found: QuantSearch) -> None:
    measured = measured_table(found)
    assert measured.row_count == len(found.choice.points) + len(found.uniform)
    assert sum("(chosen)" in str(cell) for cell in measured.columns[0].cells) == 1
    assert choice_table(found).row_count == len(found.sizes())


def test_a_plot_is_drawn_or_the_reason_said(found: QuantSearch, tmp_path: Path) -> None:
    said = write_plot(found, tmp_path / "plot.png")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        assert "matplotlib is not installed" in said
        return
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(LlmcError, match="cannot be written"):
        write_plot(found, tmp_path / "none" / "plot.png")


def test_rounded_activations_count(model: Any, windows: list[Any]) -> None:
    """The same weights with int8 activations lose more: a rule may name such a scheme."""
    name = "model.layers.1.mlp.down_proj.weight"
    oracle = Sensitivity(open_model(copy.deepcopy(model), dtype=None), windows[:1])
    ids = windows[0].ids
    plain, rounded = (oracle._logits({name: scheme})(ids) for scheme in ("q8", "w8a8"))
    assert 0 < np.abs(rounded - plain).max() < 0.1 * np.abs(plain).max()
