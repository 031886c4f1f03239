"""SmoothQuant: outliers of activations are moved into the weights, and only where that helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.frontend.checkpoint import open_model
from llmc.products import InputRounding, RoundedInputs
from llmc.quant.activations import RowSample
from llmc.quant.calibrate import LayerWork, Nearest, calibrate
from llmc.quant.fold import Fold
from llmc.quant.recorder import Recorder
from llmc.quant.schemes import SCHEMES
from llmc.quant.smooth import SmoothQuant
from tests.frontend.tiny import save, tiny_model
from tests.quant.test_calibrate import SEQUENCES, matrices, opened, runner_of


def test_rounding_of_activations() -> None:
    x = torch.tensor([[0.0, 1.0, -7.0], [0.5, 0.2, 0.1], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(InputRounding(4)(x)[0], [0, 1, -7])
    np.testing.assert_allclose(InputRounding(4)(x)[1] * 14, [7, 3, 1], rtol=1e-6)
    assert (InputRounding()(x)[2] == 0).all()
    kept = InputRounding(4, torch.tensor([2]))(x)
    np.testing.assert_allclose(kept, [[0, 1, -7], [0.5, 3 / 14, 0.1], [0, 0, 0]], rtol=1e-6)
    assert InputRounding(4, torch.tensor([2]))(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_inputs_are_rounded_while_a_model_runs(tmp_path: Path) -> None:
    """Those of the named weights only; experts, whose functional calls differ, too."""
    source = opened("mixtral", tmp_path)
    runner = runner_of(source)
    path = runner.layers[0]
    with runner.held(path) as layer:
        matrix = f"{path}.self_attn.o_proj.weight"
        tap = RowSample(layer.parameters, 1000)
        runner.feed(layer, tap.watch)
        x = tap.sampled()[matrix]
        assert x.shape == (SEQUENCES.numel(), 64)
        plain = runner.probe(layer, lambda: RoundedInputs.of(layer.parameters, {}))
        int8 = InputRounding()
        rounded = runner.probe(layer, lambda: RoundedInputs.of(layer.parameters, {matrix: int8}))
        all_rounded = runner.probe(
            layer, lambda: RoundedInputs.of(layer.parameters, dict.fromkeys(tap.usages, int8))
        )
        change = (int8(x) - x)[: plain.shape[1]] @ layer.parameters[matrix].T
        difference = float((rounded - plain).abs().max())
        assert 0 < difference < 3 * float(change.abs().max())
        assert float((all_rounded - plain).norm()) > float((rounded - plain).norm())


class _Watched(SmoothQuant):
    """Keeps what every layer's rounding does to its output, before and after the scales."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[float] = []
        self.after: list[float] = []

    def prepare(self, work: LayerWork) -> None:
        exact = work.runner.probe(work.layer, lambda: Recorder({}).watch())
        self.before.append(_error(work, exact))
        super().prepare(work)
        self.after.append(_error(work, exact))


def _error(work: LayerWork, exact: torch.Tensor) -> float:
    """Of the layer's output with weights and activations rounded."""
    with _rounded(work):
        inputs = {n: InputRounding.of(s) for n, s in work.plan.items()}
        out = work.runner.probe(work.layer, lambda: RoundedInputs.of(work.layer.parameters, inputs))
    return float((out - exact).norm() / exact.norm())


@contextmanager
def _rounded(work: LayerWork) -> Iterator[None]:
    from llmc.quant.rounding import decode

    saved = {n: work.layer.parameters[n].clone() for n in work.plan}
    for name, scheme in work.plan.items():
        codes, grid = Nearest().round(saved[name], None, scheme)
        work.layer.parameters[name].copy_(decode(codes, grid))
    yield
    for name, tensor in saved.items():
        work.layer.parameters[name].copy_(tensor)


def test_outliers_are_moved(tmp_path: Path) -> None:
    """Two channels of a norm are made 60 times larger and their columns smaller: the same model, hard to round."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[[5, 40]] *= 60
            for name in "qkv":
                getattr(layer.self_attn, f"{name}_proj").weight[:, [5, 40]] /= 60
    source = open_model(str(save(model, tmp_path)), dtype=None)
    plan = {n: SCHEMES["w8a8"] for n in matrices(source) if "self_attn" in n}
    method = _Watched()
    calibrate(source, plan, SEQUENCES, method)
    assert all(a < 0.4 * b for a, b in zip(method.after, method.before, strict=True))


def test_nothing_is_moved_where_it_does_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a threshold that nothing can reach, every group keeps its inputs: no migration is among the choices."""
    monkeypatch.setattr("llmc.quant.smooth._WORTH", 1.0)
    applied: list[Fold] = []
    monkeypatch.setattr("llmc.quant.smooth.apply_scale", lambda work, fold, scale: applied.append(fold))
    source = opened("llama", tmp_path)
    plan = {n: replace(SCHEMES["w8a8"]) for n in matrices(source)}
    calibrate(source, plan, SEQUENCES, SmoothQuant())
    assert not applied
    monkeypatch.setattr("llmc.quant.smooth._WORTH", 0.0)
    calibrate(source, plan, SEQUENCES, SmoothQuant())
    assert applied
