"""The page allocator: no page twice, none lost, and pools sized to a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc.errors import LlmcError
from llmc.kv_plan import KVKind, KVPlan
from llmc.runtime.pages import PageAllocator, pages_per_sequence, plan_pages, pool_bytes

SIZE = 16


def plan(make_group: Callable[..., Any]) -> KVPlan:
    return KVPlan(
        SIZE,
        (
            make_group(),
            make_group(KVKind.SLIDING_WINDOW, window=40, name="g1"),
            make_group(KVKind.SLIDING_WINDOW, window=40, sinks=20, name="g2"),
            make_group(KVKind.CHUNKED, window=48, name="g3"),
        ),
    )


def test_random_use_never_shares_or_loses_a_page(make_group: Callable[..., Any]) -> None:
    rng = np.random.default_rng(1)
    kv = plan(make_group)
    pages = (60, 40, 50, 40)
    allocator = PageAllocator(kv, pages, 512)
    open_sequences: list[tuple[Any, int]] = []
    refused = 0
    for _ in range(3000):
        action = rng.random()
        if action < 0.1 or not open_sequences:
            open_sequences.append((allocator.new_tables(), 0))
        elif action < 0.17:
            allocator.release(open_sequences.pop(int(rng.integers(len(open_sequences))))[0])
        else:
            at = int(rng.integers(len(open_sequences)))
            tables, length = open_sequences[at]
            new = int(rng.integers(1, 40)) if action < 0.5 else 1
            if length + new > 512:
                continue
            before = allocator.used_pages()
            try:
                allocator.check_room([[(length, new)]], [length])
            except LlmcError:
                refused += 1
                assert allocator.used_pages() == before
                continue
            allocator.grow(tables, length + new)
            keep = length + new if rng.random() < 0.8 else length  # a failed step
            allocator.settle(tables, keep)
            open_sequences[at] = (tables, keep)
        for g, pool in enumerate(allocator.pools):
            held = [page for tables, _ in open_sequences for page in tables[g].held()]
            assert len(set(held)) == len(held) and 0 not in held
            assert len(held) + pool.free_pages == pages[g] - 1
            assert all(0 < page < pages[g] for page in held)
    assert refused > 50
    for tables, _ in open_sequences:
        allocator.release(tables)
        allocator.release(tables)
    assert allocator.used_pages() == (0, 0, 0, 0)


@pytest.mark.parametrize("length", [0, 1, 39, 40, 54, 55, 56, 96, 100, 300])
def test_exactly_the_pages_that_can_still_be_seen_are_kept(
    make_group: Callable[..., Any], length: int
) -> None:
    kv = plan(make_group)
    allocator = PageAllocator(kv, (100,) * 4, 512)
    tables = allocator.new_tables()
    for end in range(1, length + 1):
        allocator.grow(tables, end)
        allocator.settle(tables, end)
    for of, table in zip(kv.groups, tables, strict=True):
        first = {
            KVKind.FULL: 0,
            KVKind.SLIDING_WINDOW: max(length - of.window + 1, 0),
            KVKind.CHUNKED: length // max(of.window, 1) * of.window,
        }[of.kind]
        want = {j // SIZE for j in range(length) if j >= first or j < of.sink_tokens}
        assert {j for j, page in enumerate(table.pages) if page} == want, of


def test_needed_is_what_growing_takes(make_group: Callable[..., Any]) -> None:
    kv = plan(make_group)
    for length, new in ((0, 1), (0, 200), (31, 1), (32, 1), (150, 33), (96, 48)):
        allocator = PageAllocator(kv, (100,) * 4, 512)
        tables = allocator.new_tables()
        allocator.grow(tables, length)
        allocator.settle(tables, length)
        assert allocator.used_pages() == tuple(p.needed(length, 0) for p in allocator.pools)
        allocator.grow(tables, length + new)
        assert allocator.used_pages() == tuple(p.needed(length, new) for p in allocator.pools)


def test_pages_that_were_used_are_used_again(make_group: Callable[..., Any]) -> None:
    allocator = PageAllocator(KVPlan(SIZE, (make_group(),)), (1000,), 512)
    for _ in range(50):
        tables = allocator.new_tables()
        allocator.grow(tables, 100)
        assert max(tables[0].held()) == 7
        allocator.release(tables)


def test_plan_pages(make_group: Callable[..., Any]) -> None:
    full, window = make_group(), make_group(KVKind.SLIDING_WINDOW, window=40, name="g1")
    kv = KVPlan(SIZE, (full, window))
    limits = {"max_seq_len": 1000, "max_batch": 3, "max_step_tokens": 30}
    assert pages_per_sequence(full, SIZE, 1000, 30) == 63
    assert pages_per_sequence(window, SIZE, 1000, 30) == 6
    assert pages_per_sequence(window, SIZE, 50, 30) == 4
    assert plan_pages(kv, **limits) == (190, 19)
    assert plan_pages(kv, **limits, kv_pages=10) == (11, 11)
    assert plan_pages(kv, **limits, kv_pages=10**6) == (190, 19)
    page = full.page_bytes(SIZE)
    assert plan_pages(kv, **limits, budget=10**9) == (190, 19)
    assert plan_pages(kv, **limits, budget=page * 71 + 5) == (52, 19)
    assert plan_pages(kv, **limits, budget=page * 4) == (2, 2)
    for budget in range(page * 4, page * 220, page * 7 + 1):
        sizes = plan_pages(kv, **limits, budget=budget)
        assert pool_bytes(kv, sizes) <= budget
    with pytest.raises(LlmcError, match=rf"takes {page * 4} bytes; {page * 3} are left.*\[max-memory\]"):
        plan_pages(kv, **limits, budget=page * 3)
    with pytest.raises(LlmcError, match=r"kv_pages must be at least 1, found 0"):
        plan_pages(kv, **limits, kv_pages=0)


def test_kinds_that_cannot_run_yet_are_refused(make_group: Callable[..., Any]) -> None:
    with pytest.raises(LlmcError, match=r"group g0 is of kind recurrent.*\[kv-kind\]"):
        PageAllocator(KVPlan(SIZE, (make_group(KVKind.RECURRENT),)), (5,), 100)
