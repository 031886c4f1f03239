"""What ``--prune`` and ``--svd`` ask for, as text and parsed. Nothing here needs torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmc.errors import LlmcError

MAGNITUDE = "magnitude"
# how the weights that go are chosen; all but the first look at activations
PRUNE_METHODS = (MAGNITUDE, "wanda", "sparsegpt")
_EXAMPLES = "wanda:2:4, sparsegpt:0.5"


@dataclass(frozen=True)
class PruneRule:
    """Which weights become zero.

    Attributes:
        method: a name of PRUNE_METHODS.
        share: of the weights that become zero; exactly 1 - kept / of for a pattern.
        kept, of: so many of every `of` neighbouring inputs may be non-zero; of = 0: no pattern.
    """

    method: str
    share: float
    kept: int = 0
    of: int = 0

    @staticmethod
    def parse(text: str) -> PruneRule:
        """``METHOD:N:M`` or ``METHOD:SHARE``.

        Raises:
            LlmcError: anything else.
        """
        method, _, pattern = text.partition(":")
        if method not in PRUNE_METHODS:
            raise LlmcError(
                "prune-method",
                f"prune must begin with one of {', '.join(PRUNE_METHODS)} and a colon; found {text!r}.",
                hint=f"For instance {_EXAMPLES}.",
            )
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        if found:
            kept, of = int(found[1]), int(found[2])
            if 0 < kept < of <= 64:
                return PruneRule(method, 1 - kept / of, kept, of)
        else:
            share = _number(pattern)
            if share is not None and 0 < share < 1:
                return PruneRule(method, share)
        raise LlmcError(
            "prune-pattern",
            f"prune = {text!r}: after the method, N:M (N of every M neighbouring weights stay, 0 < N < M <= 64) or a share "
            f"of zeros between 0 and 1 is required; found {pattern!r}.",
            hint=f"For instance {_EXAMPLES}.",
        )

    @property
    def needs_text(self) -> bool:
        return self.method != MAGNITUDE

    def __str__(self) -> str:
        return f"{self.method}:{f'{self.kept}:{self.of}' if self.of else f'{self.share:g}'}"


@dataclass(frozen=True)
class RankRule:
    """How far linear layers are factored into two of low rank.

    Attributes:
        rank: of every layer; 0 = by `ratio`.
        ratio: of the weights that the two factors may have together.
    """

    rank: int = 0
    ratio: float = 0.0

    @staticmethod
    def parse(text: str) -> RankRule:
        """A whole number is a rank, a number below 1 a ratio.

        Raises:
            LlmcError: anything else.
        """
        value = _number(text)
        if value is not None and 0 < value < 1:
            return RankRule(ratio=value)
        if value is not None and value >= 1 and value == int(value):
            return RankRule(rank=int(value))
        raise LlmcError(
            "svd-rank",
            "svd must be a rank (a whole number) or the share of the weights that is kept (between 0 and 1); found "
            f"{text!r}.",
            hint="For instance 0.5, or 256.",
        )

    def of(self, rows: int, columns: int) -> int | None:
        """Rank of a matrix of that size; None if its factors would not be smaller than it."""
        even = rows * columns / (rows + columns)
        rank = self.rank or max(1, int(self.ratio * even))
        return rank if rank < even else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
