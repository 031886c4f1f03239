"""Cache pages: who holds which page of which group, and how many pages a group gets.

The method is the paged cache of vLLM (Kwon et al., 2023, https://arxiv.org/abs/2309.06180). Each KVGroup has its own
pool and each sequence one page table per group; a kernel only sees the tables' integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from llmc.errors import LlmcError
from llmc.kv_plan import KVGroup, KVKind, KVPlan
from llmc.runtime.memory import aligned_zeros

Int32s = npt.NDArray[np.int32]


class PageTable:
    """Pages of one sequence in one group.

    Attributes:
        pages: i32[most pages of a sequence]; entry j is the page of tokens j*page_size.., 0 = none or freed.
        end: entries that have been handed a page so far.
        begin: first entry at or behind the sinks that has not been freed.
    """

    __slots__ = ("begin", "end", "pages")

    def __init__(self, entries: int, sinks: int) -> None:
        self.pages: Int32s = aligned_zeros(entries)
        self.begin = sinks
        self.end = 0

    def held(self) -> list[int]:
        """The pages that the sequence holds now."""
        return [int(page) for page in self.pages[: self.end] if page]


class GroupPool:
    """The free pages of one group, and which part of a sequence has to stay.

    Args:
        group: layout and lifetime.
        page_size: tokens per page.
        pages: size of the pool, with the reserved page 0.
    """

    def __init__(self, group: KVGroup, page_size: int, pages: int) -> None:
        if group.kind not in (KVKind.FULL, KVKind.SLIDING_WINDOW, KVKind.CHUNKED):
            raise LlmcError(
                "kv-kind",
                f"The artifact's cache group {group.name} is of kind {group.kind.value}, which this llmc cannot run.",
                hint="Install the llmc that compiled it.",
            )
        self.group = group
        self.page_size = page_size
        self.pages = pages
        # a stack with the lowest page on top: what was used before is used again, so that untouched memory stays so
        self._free = list(range(pages - 1, 0, -1))
        self.sinks = -(-group.sink_tokens // page_size) if group.kind is KVKind.SLIDING_WINDOW else 0

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def first_live(self, length: int) -> int:
        """First entry (apart from the sinks) that a token at position `length`, or a later one, may read."""
        if self.group.kind is KVKind.SLIDING_WINDOW:
            return max(length - self.group.window + 1, 0) // self.page_size
        if self.group.kind is KVKind.CHUNKED:
            return length // self.group.window * self.group.window // self.page_size
        return 0

    def needed(self, length: int, new: int) -> int:
        """Pages that a sequence of `length` tokens holds while `new` more are computed."""
        end = -(-(length + new) // self.page_size)
        first = min(self.first_live(length), end)
        return end - max(first - self.sinks, 0)

    def grow(self, table: PageTable, length: int) -> None:
        """Hand out pages until `length` tokens fit; the caller has made sure that there are enough."""
        end = -(-length // self.page_size)
        while table.end < end:
            table.pages[table.end] = self._free.pop()
            table.end += 1

    def shrink(self, table: PageTable, length: int) -> None:
        """Take back the pages behind the last of `length` tokens."""
        end = -(-length // self.page_size)
        while table.end > end:
            table.end -= 1
            self._take_back(table, table.end)

    def trim(self, table: PageTable, length: int) -> None:
        """Take back the pages that no token from position `length` on can see."""
        first = min(self.first_live(length), table.end)
        while table.begin < first:
            self._take_back(table, table.begin)
            table.begin += 1

    def release(self, table: PageTable) -> None:
        """Take back all pages."""
        self.shrink(table, 0)
        table.begin = self.sinks

    def _take_back(self, table: PageTable, entry: int) -> None:
        page = int(table.pages[entry])
        if page:
            table.pages[entry] = 0
            self._free.append(page)


def pages_per_sequence(group: KVGroup, page_size: int, max_seq_len: int, max_step_tokens: int) -> int:
    """Most pages that one sequence ever holds in a group."""
    longest = -(-max_seq_len // page_size)
    if group.kind is KVKind.FULL:
        return longest
    sinks = -(-group.sink_tokens // page_size)
    return min(longest, -(-(group.window + max_step_tokens) // page_size) + 1 + sinks)


def plan_pages(
    plan: KVPlan,
    *,
    max_seq_len: int,
    max_batch: int,
    max_step_tokens: int,
    kv_pages: int | None = None,
    budget: int | None = None,
) -> tuple[int, ...]:
    """Pages of each group's pool, with the reserved page 0.

    Args:
        kv_pages: pages of every group (fewer where a window needs fewer).
        budget: bytes for all pools, if kv_pages is not given.

    Raises:
        LlmcError: not even one page per group.
    """
    most = [
        max_batch * pages_per_sequence(g, plan.page_size, max_seq_len, max_step_tokens) for g in plan.groups
    ]

    def sizes(pages: int) -> tuple[int, ...]:
        return tuple(min(pages, limit) + 1 for limit in most)

    def cost(pages: int) -> int:
        return pool_bytes(plan, sizes(pages))

    if kv_pages is not None:
        if kv_pages < 1:
            raise LlmcError("kv-pages", f"kv_pages must be at least 1, found {kv_pages}.")
        return sizes(kv_pages)
    if budget is None or not most:
        return sizes(max(most, default=0))
    if cost(1) > budget:
        raise LlmcError(
            "max-memory",
            f"The smallest KV cache takes {cost(1)} bytes; {max(budget, 0)} are left for it.",
            hint="Give a larger max_memory.",
        )
    low, high = 1, max(most)  # the largest number of pages that the budget holds lies within
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return sizes(low)


def pool_bytes(plan: KVPlan, pages: Iterable[int]) -> int:
    """Bytes of all pools."""
    return sum(g.page_bytes(plan.page_size) * n for g, n in zip(plan.groups, pages, strict=True))


class PageAllocator:
    """The pools of all groups.

    Args:
        plan: the artifact's KV plan.
        pages: size of each group's pool, with page 0.
        max_seq_len: longest sequence.
    """

    def __init__(self, plan: KVPlan, pages: Sequence[int], max_seq_len: int) -> None:
        self.plan = plan
        self.pools = tuple(
            GroupPool(group, plan.page_size, n) for group, n in zip(plan.groups, pages, strict=True)
        )
        self._entries = -(-max_seq_len // plan.page_size)

    def new_tables(self) -> tuple[PageTable, ...]:
        """Empty page tables for a new sequence, one per group."""
        return tuple(PageTable(self._entries, pool.sinks) for pool in self.pools)

    def check_room(self, rounds: Sequence[Sequence[tuple[int, int]]], first: Sequence[int]) -> None:
        """Find out beforehand whether sequences can grow; takes no page.

        Args:
            rounds: for each round of a step (length, new tokens) of every sequence of the batch.
            first: lengths before the first round.

        Raises:
            LlmcError: in some round a pool would be too small.
        """
        for pool in self.pools:
            held = sum(pool.needed(length, 0) for length in first)
            for batch in rounds:
                extra = sum(pool.needed(length, new) for length, new in batch) - held
                if extra > pool.free_pages:
                    raise self._full(pool, extra)

    def grow(self, tables: Sequence[PageTable], length: int) -> None:
        """Hand out pages in all groups until `length` tokens fit."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.grow(table, length)

    def settle(self, tables: Sequence[PageTable], length: int) -> None:
        """The sequence now has `length` tokens: take back what is behind its end or behind its windows."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.shrink(table, length)
            pool.trim(table, length)

    def release(self, tables: Sequence[PageTable]) -> None:
        """Take back all pages of a sequence."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.release(table)

    def used_pages(self) -> tuple[int, ...]:
        """Pages in use, per group."""
        return tuple(pool.pages - 1 - pool.free_pages for pool in self.pools)

    def _full(self, pool: GroupPool, extra: int) -> LlmcError:
        usable = pool.pages - 1
        return LlmcError(
            "kv-pool-exhausted",
            f"The KV cache is full: group {pool.group.name} needs {extra} more pages of {pool.page_size} tokens, "
            f"{pool.free_pages} of {usable} are free.",
            hint="Free sequences, shorten the prompt, or load with a larger kv_pages or max_memory.",
            context={"group": pool.group.name, "needed": extra, "free": pool.free_pages, "pages": usable},
        )
