"""Round to nearest: how far a value moves, edge cases, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.errors import LlmcError
from llmc.quant.quantizer import RoundToNearest
from llmc.quant.rtn import quantize
from llmc.quant.schemes import SCHEMES, Code, QuantRules
from llmc.quant.weight import E4M3_TABLE, TABLES

# those with outlier columns round the rest as their plain counterparts do
ALL = [name for name, scheme in SCHEMES.items() if not scheme.outlier_share]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def groups(values, scheme):
    """[N, G, size] of [N, K], K a multiple of the group size."""
    return values.reshape(len(values), -1, scheme.group_size or values.shape[1])


@pytest.mark.parametrize("name", ALL)
def test_no_value_moves_further_than_its_step(name):
    scheme = SCHEMES[name]
    weight = random(40, 256)
    made = quantize(weight, scheme)
    error = np.abs(groups(made.dequantize() - weight, scheme))
    step = np.abs(made.scales)[..., None]
    if scheme.code is Code.INT:
        # half a step; a whole one at an end that has one code less, or that a rounded zero point moved; a rounded
        # float16 scale falls short by up to 255 / 2**11 of a step
        most = 0.55 if scheme.bits > 4 and scheme.symmetric else 1.13
    else:
        table = TABLES[scheme.code]
        table = np.unique(table[np.isfinite(table)])
        most = np.diff(table).max() / 2 * 1.001 if scheme.code is not Code.E2M1 else 2.0
    assert (error <= most * step + 1e-7).all()


@pytest.mark.parametrize("name", ALL)
def test_every_value_takes_the_nearest_code(name):
    """No other code of the same group is nearer."""
    scheme = SCHEMES[name]
    weight = random(3, 128, seed=1)
    made = quantize(weight, scheme)
    error = np.abs(made.dequantize() - weight)
    for code in range(0, 1 << scheme.bits, 5 if scheme.bits == 8 else 1):
        if scheme.code is Code.E4M3 and not np.isfinite(E4M3_TABLE[code]):
            continue
        other = type(made)(scheme, np.full_like(made.codes, code), made.scales, made.zeros)
        assert (np.abs(other.dequantize() - weight) >= error - 1e-6).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("k", [1, 33, 100, 129])
def test_any_number_of_columns(name, k):
    """A last group that is cut short is quantized by its own values alone."""
    scheme = SCHEMES[name]
    weight = random(5, k)
    made = quantize(weight, scheme)
    size = scheme.group_size or k
    assert made.codes.shape == weight.shape
    assert made.scales.shape == (5, -(-k // size))
    tail = quantize(weight[:, (k - 1) // size * size :], scheme)
    np.testing.assert_array_equal(made.dequantize()[:, (k - 1) // size * size :], tail.dequantize())


@pytest.mark.parametrize("name", ALL)
def test_groups_of_zeros_and_tiny_values(name):
    scheme = SCHEMES[name]
    weight = np.zeros((4, 256), np.float32)
    weight[1] = 1e-12
    weight[2] = 1e-30 * random(256)
    weight[3] = -0.0
    values = quantize(weight, scheme).dequantize()
    assert np.isfinite(values).all()
    assert (values[[0, 3]] == 0).all()
    assert (np.abs(values) <= 2e-12).all()


@pytest.mark.parametrize(("name", "plain"), [("w8a8o", "w8a8"), ("w4a8o", "w4a8")])
def test_outlier_columns_stand_beside_the_rounding(name, plain):
    weight = random(6, 96)
    columns = np.array([3, 40, 41, 95], np.int32)
    weight[:, columns] *= 1000
    made = quantize(weight, SCHEMES[name], outliers=columns)
    rest = weight.copy()
    rest[:, columns] = 0
    other = quantize(rest, SCHEMES[plain])
    np.testing.assert_array_equal(made.codes, other.codes)
    np.testing.assert_array_equal(made.scales, other.scales)
    np.testing.assert_allclose(made.dequantize()[:, columns], weight[:, columns], rtol=2**-8)


@pytest.mark.parametrize("name", ["q8", "q4g32", "q4g64a", "nf4", "fp8", "mxfp4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused_by_name(name, bad):
    weight = random(70, 128)
    weight[64, 100] = bad
    with pytest.raises(LlmcError, match="layer\\.q_proj") as caught:
        RoundToNearest().quantize("layer.q_proj", weight, SCHEMES[name])
    assert caught.value.ref == "weight-not-finite"


def test_too_large_for_float16_scales():
    weight = random(4, 64) * 1e7
    with pytest.raises(LlmcError) as caught:
        quantize(weight, SCHEMES["q4g32"])
    assert caught.value.ref == "weight-too-large"
    assert np.isfinite(quantize(weight, SCHEMES["q8"]).dequantize()).all()


@pytest.mark.parametrize("name", ["q4g32", "q4g32a", "q3g64", "nf4", "mxfp4"])
def test_search_is_never_worse(name):
    weight = random(64, 256) ** 3

    def error(made):
        return ((made.dequantize() - weight) ** 2).sum()

    plain, searched = quantize(weight, SCHEMES[name]), quantize(weight, SCHEMES[name], search=True)
    assert error(searched) < error(plain)


def test_experts_are_quantized_like_their_matrices():
    weight = random(3, 20, 70)
    made = quantize(weight, SCHEMES["q4g32a"])
    for i in range(3):
        np.testing.assert_array_equal(
            made.dequantize()[i], quantize(weight[i], SCHEMES["q4g32a"]).dequantize()
        )


def test_rules_the_last_match_wins():
    rules = QuantRules("q4g32", (("*.down_proj", "q6g64"), ("model.layers.0.*", "none"), ("lm_head", "q8")))
    assert rules.named("model.layers.1.mlp.down_proj.weight") == "q6g64"
    assert rules.named("model.layers.0.mlp.down_proj.weight") == "none"
    assert rules.named("model.layers.1.mlp.up_proj.weight") is None  # the default, q4g32
    assert rules.named("lm_head.weight") == "q8"
    with pytest.raises(LlmcError, match="q4g32"):
        QuantRules("q5")
