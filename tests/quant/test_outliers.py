"""Outlier columns: found by calibration, left out of the rounding, the same for weights that are packed as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.errors import LlmcError
from llmc.frontend.checkpoint import open_model
from llmc.frontend.graph import SourceModel
from llmc.packing import quantize_sources
from llmc.passes.step_module import PackedParam
from llmc.products import InputRounding
from llmc.quant.activations import rounded_product
from llmc.quant.awq import AWQ
from llmc.quant.calibrate import Method, Nearest, calibrate
from llmc.quant.gptq import GPTQ
from llmc.quant.quantizer import RoundToNearest
from llmc.quant.rtn import quantize
from llmc.quant.schemes import SCHEMES
from llmc.quant.smooth import SmoothQuant
from llmc.quant.stored import SourceQuantizer
from llmc.reference import reference_logits
from llmc.schedules.qlayout import quant_layout
from llmc.spec import CompileSpec
from llmc.targets.backend import get
from tests.frontend.tiny import save, tiny_model
from tests.quant.test_calibrate import SEQUENCES, matrices

PLANTED = [5, 40]
IDS = [3, 17, 99, 4, 21, 8, 150, 77, 31, 2, 64, 12]


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    """Two channels of both norms are made 30 times larger and the columns behind them smaller: the same model."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[PLANTED] *= 30
            layer.post_attention_layernorm.weight[PLANTED] *= 30
            for name in (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
            ):
                layer.get_submodule(name).weight[:, PLANTED] /= 30
    return open_model(str(save(model, tmp_path)), dtype=None)


def groups(source: SourceModel) -> list[tuple[str, ...]]:
    """As the fusions join them."""
    found = []
    for i in range(2):
        path = f"model.layers.{i}"
        found.append(tuple(f"{path}.self_attn.{n}_proj.weight" for n in "qkv"))
        found.append(tuple(f"{path}.mlp.{n}_proj.weight" for n in ("gate", "up")))
    return found


def logits_error(source: SourceModel, scheme: str, method: Method) -> float:
    """Of the whole model's logits with weights and activations rounded."""
    plan = matrices(source, scheme)
    found = calibrate(source, plan, SEQUENCES, method, joined=groups(source))
    weights = found.weights
    made = {name: weights.quantized(name) for name in plan}
    weights.rounded_inputs = {  # type: ignore[attr-defined]
        name: InputRounding.of(plan[name], _columns(weight))
        for name, weight in made.items()
        if plan[name].activation_bits
    }
    exact = reference_logits(source, IDS, "float32").logits
    got = reference_logits(replace(source, weights=weights), IDS, "float32").logits
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def _columns(weight) -> torch.Tensor | None:
    return (
        None if weight.outlier_columns is None else torch.from_numpy(weight.outlier_columns.astype(np.int64))
    )


def test_activations_with_outliers_need_them(source: SourceModel) -> None:
    """Plain w8a8 is clearly worse than weights alone in 8 bits; with outlier columns it is no worse than those."""
    plain, kept, weights = (logits_error(source, s, Nearest(search=False)) for s in ("w8a8", "w8a8o", "q8"))
    assert plain > 2 * weights
    assert kept < weights and kept < plain / 4


@pytest.mark.parametrize(
    "method", [Nearest(search=False), GPTQ(), AWQ(), SmoothQuant()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("scheme", ["w8a8o", pytest.param("w4a8o", marks=pytest.mark.slow)])
def test_columns_are_found_and_shared(source: SourceModel, method: Method, scheme: str) -> None:
    plan = matrices(source, scheme)
    found = calibrate(source, plan, SEQUENCES, method, joined=groups(source))
    zero = 1 << (SCHEMES[scheme].bits - 1)
    for names in groups(source):
        made = [found.weights.quantized(name) for name in names]
        columns = made[0].outlier_columns
        assert len(columns) == 8 and (np.diff(columns) > 0).all()
        if not isinstance(method, AWQ | SmoothQuant):  # those move the outliers into the weights
            assert set(PLANTED) <= set(columns.tolist())
        for name, weight in zip(names, made, strict=True):
            np.testing.assert_array_equal(weight.outlier_columns, columns)
            assert (weight.codes[:, columns] == zero).all()
            if isinstance(method, Nearest):
                want = (
                    source.weights.load(name)[:, columns.astype(np.int64)].to(torch.bfloat16).float().numpy()
                )
                np.testing.assert_array_equal(weight.outlier_weights, want)
                np.testing.assert_array_equal(weight.dequantize()[:, columns], want)


def test_packed_as_one(source: SourceModel) -> None:
    """What the calibration found goes through the packer unchanged, q, k and v as one weight."""
    names = groups(source)[0]
    plan = {name: SCHEMES["w8a8o"] for name in names}
    found = calibrate(source, plan, SEQUENCES, Nearest(search=False), joined=[names])
    shapes = [source.weights.info(name).shape for name in names]
    layout = quant_layout(SCHEMES["w8a8o"], sum(s[0] for s in shapes), 64, get("cpu/x86-64-v3")[1])
    param = PackedParam(
        "qkv", names[0], "uint8", layout.packed_shape, layout.as_text(), more=names[1:], scheme="w8a8o"
    )
    packed = quantize_sources(param, found.weights.load, SourceQuantizer(found.weights))
    np.testing.assert_array_equal(
        layout.columns_of(packed), found.weights.quantized(names[0]).outlier_columns
    )
    want = np.concatenate([found.weights.quantized(name).dequantize() for name in names])
    np.testing.assert_array_equal(layout.unpack(packed).dequantize(), want)


def test_experts_share_their_columns(tmp_path: Path) -> None:
    """Rows are rounded before they go to their experts; so do experts that no token reached."""
    source = open_model(str(save(tiny_model("mixtral"), tmp_path)), dtype=None)
    names = [n for n, p in source.module.named_parameters() if p.ndim == 3]
    assert names
    found = calibrate(source, dict.fromkeys(names, SCHEMES["w8a8o"]), SEQUENCES[:1, :3], Nearest())
    for name in names:
        weight = found.weights.quantized(name)
        assert weight.outlier_columns.ndim == 1 and weight.outlier_weights.ndim == 3
        assert (weight.codes[..., weight.outlier_columns] == 128).all()


def test_how_many() -> None:
    of = SCHEMES["w8a8o"]
    assert [of.outliers(k) for k in (5, 32, 1024, 1025, 2048, 8192)] == [5, 8, 8, 16, 16, 64]
    assert SCHEMES["w8a8"].outliers(2048) == 0
    assert of.bits_per_weight(2048) == 8 + 32 / 2048 + 16 * 16 / 2048


def test_a_product_as_the_search_sees_it() -> None:
    """Columns with the largest inputs are exact, so that inputs without others lose nothing."""
    x, weight = torch.zeros(3, 64), torch.randn(5, 64)
    x[:, :8] = torch.randn(3, 8) * 50
    plain, kept = (rounded_product(x, weight, SCHEMES[s]) for s in ("w8a8", "w8a8o"))
    torch.testing.assert_close(kept, x @ weight.T)
    assert float((plain - kept).abs().max()) > 0.01


def refused(**fields) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        CompileSpec(model="m", **fields)
    return caught.value


@pytest.mark.parametrize(
    "fields",
    [dict(quant="w8a8o"), dict(quant_head="w4a8o"), dict(quant="q8", quant_rules=(("down_proj", "w8a8o"),))],
)
def test_without_a_text_they_are_not_known(fields: dict) -> None:
    """One sentence, before any work; a graph without weights needs none."""
    error = refused(**fields)
    assert error.ref == "outliers-without-text" and "--calib" in error.hint
    CompileSpec(model="m", calib_text="a.txt", **fields)
    assert not CompileSpec(model="m", meta_weights=True, **fields).calibrates()
    assert CompileSpec(model="m", calib_text="a.txt", **fields).calibrates()


def test_not_with_the_search() -> None:
    error = refused(
        quant="auto",
        quant_rules=(("down_proj", "w8a8o"),),
        calib_text="a.txt",
        eval_text="b.txt",
        max_ppl_increase=1.0,
    )
    assert error.ref == "outliers-with-auto"


def test_never_rounded_without_their_columns() -> None:
    """A weight that no calibration has seen is refused, not stored as plain w8a8."""
    with pytest.raises(LlmcError, match="not calibrated"):
        RoundToNearest().quantize("w", np.ones((32, 32), np.float32), SCHEMES["w8a8o"])
    with pytest.raises(LlmcError, match="not-finite"):
        quantize(np.full((8, 64), np.nan, np.float32), SCHEMES["w8a8o"], outliers=np.arange(8))


def test_head_and_embedding() -> None:
    """Below 5 bits the head has 8, with outlier columns too."""
    spec = CompileSpec(model="m", quant="w4a8o", calib_text="a.txt")
    assert spec.head_scheme() == "w8a8o"
    assert CompileSpec(model="m", quant="w8a8o", calib_text="a.txt").head_scheme() is None
