"""Rows sorted by their experts in the simulator: order, races, and how warps find tiles in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.schedules import emit as e
from llmc.schedules.experts import SortConfig, plan_size
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import sort_experts as sorting
from llmc.schedules.gpu.sort_experts import ExpertTiles
from llmc.simulate import SimulationError
from tests.simulate.gpu import SimulatedTools, gpu

TOOLS, CAPS = SimulatedTools(), gpu("sm_90")


def plan_of(ids: np.ndarray, experts: int) -> np.ndarray:
    """The plan, by numpy."""
    begin = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=experts))])
    return np.concatenate([begin, np.argsort(ids, kind="stable")]).astype(np.int32)


def sort(ids: np.ndarray, experts: int, dtype: str = "int64") -> np.ndarray:
    kernel = TOOLS.build(CAPS, k=sorting.sort_experts(SortConfig(experts, dtype), CAPS))["k"]
    plan = TOOLS.tensor(np.full(plan_size(len(ids), experts), -7, np.int32))
    kernel(TOOLS.tensor(ids.astype(dtype)), plan)
    return plan.numpy()


# one launch and several; experts that are few, no multiple of a warp, more than pairs of a block, and without rows
@pytest.mark.parametrize(("experts", "rows"), [(8, 1), (8, 50), (40, 1024), (5, 2500), (70, 1100)])
def test_the_order_is_stable(experts: int, rows: int) -> None:
    ids = np.random.default_rng(rows).integers(0, experts - 1, rows)
    np.testing.assert_array_equal(sort(ids, experts), plan_of(ids, experts))


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "rows"), [(256, 2050), (700, 1500), (1, 3000), (128, 4096)])
def test_many_experts(experts: int, rows: int) -> None:
    ids = np.random.default_rng(rows).integers(0, experts, rows)
    np.testing.assert_array_equal(sort(ids, experts, "int32"), plan_of(ids, experts))


@pytest.mark.parametrize("expert", [0, 6])
def test_one_expert_takes_all(expert: int) -> None:
    ids = np.full(1030, expert)
    np.testing.assert_array_equal(sort(ids, 7), plan_of(ids, 7))


@pytest.mark.parametrize("which", range(4))
def test_every_barrier_is_needed(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = g.barrier, []

    def barrier() -> None:
        calls.append(0)
        if (len(calls) - 1) % 4 != which:
            original()

    with monkeypatch.context() as patched:
        patched.setattr(g, "barrier", barrier)
        kernel = TOOLS.build(CAPS, k=sorting.sort_experts(SortConfig(40), CAPS))["k"]
    plan = TOOLS.tensor(np.zeros(plan_size(70, 40), np.int32))
    with pytest.raises(SimulationError, match="no barrier between"):
        kernel(TOOLS.tensor(np.arange(70) % 40), plan)


@pytest.mark.parametrize(("experts", "size"), [(5, 16), (40, 4)])
def test_every_tile_is_found_once(experts: int, size: int) -> None:
    """A warp per number writes what it finds."""
    built: list[Any] = []
    most = 60
    with e.kernel(built):
        count = e.dim("N")
        plan = g.tensor("plan", [plan_size(count, experts)], "int32")
        out = g.tensor("out", [most, 4], "int32")
        with e.root():
            source, target = e.flat(plan, plan_size(count, experts)), e.flat(out, most * 4)
            with g.launch(most, g.WARP) as (number, thread):
                tiles = ExpertTiles(source, experts, size, thread)
                total = tiles.total()
                expert, rows = tiles.find(g.i32(number))
                with g.when(thread == 0):
                    for i, value in enumerate((expert, rows.first, rows.end, total)):
                        e.store(target, number * 4 + i, g.i32(value), 1)
    ids = np.random.default_rng(1).choice(experts, 70, p=np.arange(experts) / np.arange(experts).sum())
    kernel = TOOLS.build(CAPS, k=built[0])["k"]
    found = TOOLS.tensor(np.zeros((most, 4), np.int32))
    kernel(TOOLS.tensor(plan_of(ids, experts)), found)
    counts = np.bincount(ids, minlength=experts)
    begin, behind = np.cumsum(counts) - counts, experts + 1
    expected = [
        (i, begin[i] + first + behind, begin[i] + counts[i] + behind)
        for i in range(experts)
        for first in range(0, counts[i], size)
    ]
    assert len(expected) < most and (found.numpy()[:, 3] == len(expected)).all()
    np.testing.assert_array_equal(found.numpy()[: len(expected), :3], expected)
    assert (found.numpy()[len(expected) :, 0] == -1).all()
