"""The quantization method in the spec: what goes together, before any work is done."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.errors import LlmcError
from llmc.quant.methods import METHODS
from llmc.quant.schemes import QUANT_METHODS, RTN
from llmc.spec import CompileSpec


def test_every_method_has_its_implementation() -> None:
    assert {RTN, *METHODS} == set(QUANT_METHODS)


@pytest.mark.parametrize(
    ("fields", "ref"),
    [
        ({"quant": "q4g32", "quant_method": "magic"}, "unknown-quant-method"),
        ({"quant": "q4g32", "quant_method": "gptq"}, "method-without-text"),
        ({"quant_method": "gptq", "calib_text": "a.txt"}, "method-without-weights"),
        (
            {"quant": "q4g32", "quant_method": "awq", "calib_text": "a.txt", "meta_weights": True},
            "method-without-weights",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(fields: dict[str, Any], ref: str) -> None:
    with pytest.raises(LlmcError) as caught:
        CompileSpec(model="m", **fields)
    assert caught.value.ref == ref


def test_a_single_rule_is_enough() -> None:
    rules = (("*.down_proj", "q4g32"),)
    assert (
        CompileSpec(model="m", quant_rules=rules, quant_method="gptq", calib_text="a.txt").quant_rules
        == rules
    )
