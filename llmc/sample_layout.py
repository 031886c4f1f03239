"""What the kernels that sample on a device and the runtime that calls them agree on: the function and its scratch memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FUNCTION = "sample_tokens"  # of model.so; a change of what it takes raises the manifest's schema number
COLUMNS = 4096  # logits that a block of threads looks at
DIGITS = 16  # values of the bits that a pass of a selection looks at
PASSES = 8  # over 32 bits


@dataclass(frozen=True)
class SampleConfig:
    """Tokens of rows of `vocab` logits in float32."""

    vocab: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def blocks(self) -> int:
        """Blocks of threads that share a row; also float32 of scratch memory for a row: the largest of each block."""
        return -(-self.vocab // COLUMNS)

    @property
    def ints(self) -> int:
        """int32 of scratch memory for a row: index of the largest, counts, ties of a block; bits and rest of a pass."""
        return (2 + 2 * DIGITS) * self.blocks + 3 * (PASSES + 1)

    @property
    def doubles(self) -> int:
        """float64 of scratch memory for a row: sums by digit, all and kept of a block; sum below the cut of a pass."""
        return (2 + 2 * DIGITS) * self.blocks + PASSES + 1
