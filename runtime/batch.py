"""From sequences and new tokens to the arguments of a compiled step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from llmc.runtime.engine import StepInputs
from llmc.runtime.memory import ALIGN, aligned_zeros
from llmc.runtime.pages import Int32s, PageTable
from llmc.runtime.sequence import Sequence

_WORDS = ALIGN // 4


@dataclass(frozen=True)
class Piece:
    """Tokens ``begin..end`` of the new tokens of batch entry `entry`."""

    entry: int
    begin: int
    end: int


def plan_rounds(counts: Seq[int], max_step_tokens: int) -> list[list[Piece]]:
    """Split new tokens (counts[i] of batch entry i) into steps of at most max_step_tokens, in order."""
    rounds: list[list[Piece]] = [[]]
    room = max_step_tokens
    for entry, count in enumerate(counts):
        begin = 0
        while begin < count:
            if room == 0:
                rounds.append([])
                room = max_step_tokens
            end = min(count, begin + room)
            rounds[-1].append(Piece(entry, begin, end))
            room -= end - begin
            begin = end
    return rounds


class StepBuilder:
    """Lays out the arguments of a step in one reused, aligned buffer; they are valid until the next call."""

    def __init__(self, groups: int, page_size: int) -> None:
        self._groups = groups
        self._page_size = page_size
        self._buffer = aligned_zeros(1 << 12)
        self._at = 0

    def build(self, batch: Seq[tuple[Sequence, Int32s]], all_rows: bool | Seq[bool]) -> StepInputs:
        """Arguments for sequences whose tables have room for their new tokens.

        Args:
            batch: sequence and its new tokens, i32[n], n >= 1.
            all_rows: logits of every token (of each entry), or of the last one only.
        """
        counts = [len(ids) for _, ids in batch]
        total, size = sum(counts), len(batch)
        flags = [all_rows] * size if isinstance(all_rows, bool) else list(all_rows)
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        widths = [max(seq.tables[g].end for seq, _ in batch) for g in range(self._groups)]
        row_counts = [count if every else 1 for count, every in zip(counts, flags, strict=True)]
        self._reserve(
            [total] * (2 + self._groups) + [size + 1, size, sum(row_counts)] + [size * w for w in widths]
        )
        input_ids, positions = self._take(total), self._take(total)
        query_start, context_len = self._take(size + 1), self._take(size)
        rows = self._take(sum(row_counts))
        slots = tuple(self._take(total) for _ in range(self._groups))
        query_start[:] = starts
        row = 0
        for b, (seq, ids) in enumerate(batch):
            start, end, count = starts[b], starts[b + 1], counts[b]
            input_ids[start:end] = ids
            context_len[b] = seq.length + count
            if count == 1:  # decode: plain integers are faster than arrays of one
                positions[start] = seq.length
                entry, offset = divmod(seq.length, self._page_size)
                for g, slot in enumerate(slots):
                    slot[start] = seq.tables[g].pages[entry] * self._page_size + offset
            else:
                where = np.arange(seq.length, seq.length + count, dtype=np.int32)
                positions[start:end] = where
                entries, offsets = np.divmod(where, self._page_size)
                for g, slot in enumerate(slots):
                    slot[start:end] = seq.tables[g].pages[entries] * self._page_size + offsets
            if flags[b]:
                rows[row : row + count] = np.arange(start, end, dtype=np.int32)
            else:
                rows[row] = end - 1
            row += row_counts[b]
        tables = tuple(
            self._table([seq.tables[g] for seq, _ in batch], width) for g, width in enumerate(widths)
        )
        return StepInputs(input_ids, positions, query_start, context_len, tables, slots, rows)

    def _table(self, tables: Seq[PageTable], width: int) -> Int32s:
        """Block table i32[B, width]; of a single sequence its own table, without a copy."""
        if len(tables) == 1:
            return tables[0].pages[:width].reshape(1, width)
        out = self._take(len(tables) * width).reshape(len(tables), width)
        for b, table in enumerate(tables):
            out[b] = table.pages[:width]
        return out

    def _reserve(self, counts: Seq[int]) -> None:
        self._at = 0
        need = sum(-(-count // _WORDS) * _WORDS for count in counts)
        if need > len(self._buffer):
            self._buffer = aligned_zeros(2 * need)

    def _take(self, count: int) -> Int32s:
        """The next `count` integers of the buffer, aligned."""
        piece = self._buffer[self._at : self._at + count]
        self._at += -(-count // _WORDS) * _WORDS
        return piece
