"""Packed layouts of quantized weights: nothing is lost, and sizes are what the schemes promise."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.quant.schemes import SCHEMES, by_name
from llmc.quant.weight import FIELDS
from llmc.schedules.qlayout import QuantLayout, in_turns, turns
from tests.quant.random_weight import random_weight

# of the families that checkpoints hold
STORED = [
    "q4k",
    "q5k",
    "q6k",
    "q2g32a",
    "q3g96af",
    "q4g16b",
    "q5g32o",
    "q8a",
    "nf4g128f",
    "fp8g64",
    "q4g32ap",
]


def weight_of(scheme, *shape):
    return random_weight(scheme, *shape)


def same(a, b):
    assert a.scheme == b.scheme
    for name in (*FIELDS, "order", "outlier_columns"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            np.testing.assert_array_equal(one, other, name)


@pytest.mark.parametrize("scheme", [*SCHEMES, *STORED])
@pytest.mark.parametrize("n_block", [16, 64])
@pytest.mark.parametrize("shape", [(130, 67), (64, 256), (5, 32), (3, 20, 70)])
def test_pack_and_unpack(scheme, n_block, shape):
    weight = weight_of(scheme, *shape)
    layout = QuantLayout(scheme, n_block, *shape[-2:])
    packed = layout.pack(weight)
    assert packed.shape == (*shape[:-2], *layout.packed_shape)
    assert packed.dtype == np.uint8
    same(layout.unpack(packed), weight)


@pytest.mark.parametrize("scheme", [*SCHEMES, *(s for s in STORED if not s.endswith("p"))])
def test_size_is_the_schemes(scheme):
    layout = QuantLayout(scheme, 64, 256, 768)
    bits = 8 * (layout.size - 4 * layout.listed) / (256 * 768)
    assert bits == pytest.approx(by_name(scheme).bits_per_weight(768), rel=1e-12)


def test_text_round_trip():
    layout = QuantLayout("q4g32a", 64, 2048, 8192)
    assert layout.as_text() == "quant(q4g32a,n=64,of=2048x8192)"
    assert QuantLayout.parse(layout.as_text()) == layout
    for text in ("rows", "quant(q7,n=64,of=1x1)", "blocked(n=64,k=2)"):
        with pytest.raises(ValueError, match="layout"):
            QuantLayout.parse(text)


def test_another_shape_or_scheme_is_refused():
    with pytest.raises(ValueError, match="cannot hold"):
        QuantLayout("q4g32", 64, 64, 64).pack(weight_of("q4g32", 64, 32))
    with pytest.raises(ValueError, match="cannot hold"):
        QuantLayout("q4g64", 64, 64, 64).pack(weight_of("q4g32", 64, 64))


def test_gate_and_up_in_turns():
    weight = weight_of("q4g32a", 2 * 5, 64)
    order = turns(10, 8)
    assert order.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 4, -1, -1, -1, 9, -1, -1, -1]
    mixed = in_turns(weight, 8).dequantize()
    np.testing.assert_array_equal(mixed[order >= 0], weight.dequantize()[order[order >= 0]])
    assert (mixed[order < 0] == 0).all()
