"""WidenLogits: where the head's sums are kept in float32, and where the source's rounding stays."""

from __future__ import annotations

import pytest
from tvm import relax

from llmc.passes.lower_linear import LowerLinear
from llmc.passes.widen_logits import WidenLogits
from tests.passes.graphs import Model, attention_model, linear
from tests.passes.test_lower_linear import CAPS, called


def result_dtype(lowered) -> str:
    return str(lowered.module["main"].ret_ty.dtype)


def test_the_head_writes_float32():
    out = LowerLinear(CAPS)(WidenLogits()(attention_model(layers=1, dtype="bfloat16")))
    assert result_dtype(out) == "float32"
    assert "relax.astype" not in called(out)  # absorbed by the kernel


def test_float32_models_are_left_alone():
    model = attention_model(layers=1)
    assert WidenLogits()(model) is model


@pytest.mark.parametrize("bias", [True, False])
def test_with_and_without_a_bias(bias):
    m = Model("float16")
    w, b, x = m.param("w", 48, 32), m.param("b", 48), m.param("x", 1, 8, 32)

    def body(emit):
        y = linear(emit, x, w)
        return emit(relax.op.add(y, b)) if bias else y

    out = LowerLinear(CAPS)(WidenLogits()(m.build(body)))
    assert result_dtype(out) == "float32"
    assert called(out) == ["linear_48_32"]


def test_logits_that_are_computed_on_keep_the_sources_rounding():
    m = Model("bfloat16")
    w, x = m.param("w", 48, 32), m.param("x", 1, 8, 32)
    model = m.build(lambda emit: emit(relax.op.tanh(linear(emit, x, w))))
    assert WidenLogits()(model) is model
