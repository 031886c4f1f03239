"""A sequence: tokens that are in the cache, and the pages that hold them."""

from __future__ import annotations

from llmc.errors import LlmcError
from llmc.runtime.pages import PageAllocator


class Sequence:
    """One conversation's place in the KV cache. Free it (or use it in a `with`) to give its pages back.

    Attributes:
        length: tokens in the cache.
        tables: page tables, one per group of the KV plan.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self.length = 0
        self.tables = allocator.new_tables()
        self.freed = False

    def free(self) -> None:
        """Give the pages back; the sequence cannot be used any more. Twice is no error."""
        if not self.freed:
            self.freed = True
            self._allocator.release(self.tables)

    def check_usable(self) -> None:
        """Raises:
        LlmcError: it has been freed.
        """
        if self.freed:
            raise LlmcError(
                "sequence-freed", "The sequence has been freed.", hint="Make a new one: model.new_sequence()."
            )

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def __del__(self) -> None:
        if not getattr(self, "freed", True):
            self.free()
