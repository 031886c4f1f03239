"""Formulas of bytes and operations: text and back, and their symbols against what they mean."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.kernel_work import Formula, KernelCost, Workload, smaller


def visible(queries: tuple[int, ...], contexts: tuple[int, ...], window: int) -> tuple[int, int]:
    """(cached tokens that are seen, pairs of query and key) by going through every pair."""
    tokens = pairs = 0
    for n, c in zip(queries, contexts, strict=True):
        i, j = np.arange(c - n, c)[:, None], np.arange(c)[None]
        mask = (j <= i) & ((i - j < window) if window else True)
        tokens += int(mask.any(0).sum())
        pairs += int(mask.sum())
    return tokens, pairs


@pytest.mark.parametrize("window", [0, 1, 7, 64])
@pytest.mark.parametrize(
    "sizes", [((1,), (1,)), ((1, 1), (9, 70)), ((5, 1, 30), (5, 80, 100)), ((64,), (64,))]
)
def test_context_and_pairs(sizes: tuple[tuple[int, ...], tuple[int, ...]], window: int) -> None:
    work = Workload(*sizes)
    suffix = str(window or "")
    found = (Formula.of(1, f"C{suffix}").at(work), Formula.of(1, f"P{suffix}").at(work))
    assert found == visible(*sizes, window)


def test_sizes() -> None:
    work = Workload((3, 2), (10, 2), rows=4)
    assert [Formula.of(1, s).at(work) for s in "TBR"] == [5, 2, 4]
    assert Workload((3, 2), (10, 2)).value("R", 0) == 2
    assert Workload.prefill(7).value("P", 0) == 28


def test_arithmetic_and_text() -> None:
    rows = Formula.of(2, "T") + Formula.of(3)
    both = rows * Formula.of(4, "R") + Formula.of(5, smaller(8, Formula.of(2, "T")))
    assert str(rows) == "3 + 2*T"
    assert Formula.parse(str(both)) == both
    assert both.at(Workload((3,), (3,))) == (2 * 3 + 3) * 4 + 5 * 6
    assert both.at(Workload((30,), (30,))) == (2 * 30 + 3) * 4 + 5 * 8
    assert str(Formula()) == "0" and Formula.parse("0") == Formula()
    assert (Formula.of(2, "T") + Formula.of(-2, "T")).is_constant


def test_local_symbols_are_replaced() -> None:
    local = Formula.of(6, "N") + Formula.of(1, smaller(4, Formula.of(1, "N"))) + Formula.of(2, "D0_1")
    bound = local.with_symbols({"N": Formula.of(2, "T"), "D0_1": Formula.of(1, "R")})
    assert str(bound) == "2*R + 12*T + 1*min(4,2*T)"


@pytest.mark.parametrize("text", ["", "T", "2*", "2*t", "1 - T", "2*T**3"])
def test_what_is_no_formula(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        Formula.parse(text)


def test_cost_as_text() -> None:
    used = Formula.of(64, smaller(8, Formula.of(1, "N")))
    cost = KernelCost(
        "experts q4", Formula.of(7, "N"), ((2, used), (3, Formula())), ((-2, Formula.of(1, "T")),)
    )
    assert KernelCost.parse(cost.as_text()) == cost
