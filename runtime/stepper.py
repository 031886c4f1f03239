"""Steps over ragged batches: checks, pages, rounds, and which compiled function runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from llmc.artifact import Limits
from llmc.errors import LlmcError
from llmc.runtime.batch import Piece, StepBuilder, plan_rounds
from llmc.runtime.engine import Engine, Floats, SamplingEngine, StepInputs
from llmc.runtime.pages import Int32s, PageAllocator
from llmc.runtime.sampler import GREEDY, Sampler
from llmc.runtime.sequence import Sequence

Result = TypeVar("Result")
TokenIds = Seq[int] | npt.NDArray[np.integer]


class Stepper:
    """Feeds tokens of sequences to an engine.

    Args:
        engine: runs one step.
        allocator: pages of the engine's pools.
        limits: bounds of the compiled functions.
        vocab_size: token ids must be smaller.
        functions: names of the compiled functions; `decode` is optional.
    """

    def __init__(
        self,
        engine: Engine,
        allocator: PageAllocator,
        limits: Limits,
        vocab_size: int,
        functions: Seq[str] = ("step", "decode"),
    ) -> None:
        self.engine = engine
        self.allocator = allocator
        self.limits = limits
        self.vocab_size = vocab_size
        self._has_decode = "decode" in functions
        self._sampling = engine if isinstance(engine, SamplingEngine) else None
        self._builder = StepBuilder(len(allocator.pools), allocator.plan.page_size)
        # the cache, the argument buffer and the compiled functions' scratch memory are shared by all sequences
        self._lock = threading.Lock()

    def step(
        self,
        batch: Seq[tuple[Sequence, TokenIds]],
        *,
        all_rows: bool | Seq[bool] = False,
        function: str | None = None,
    ) -> Floats:
        """Append tokens to sequences and return logits.

        More tokens than one compiled step takes go through several. Nothing is changed if an argument is wrong or
        the pool is too small; when a step is interrupted, sequences keep what earlier rounds of it have computed.
        Threads take turns.

        Args:
            batch: each sequence (once) with its new tokens.
            all_rows: logits of all new tokens (for each entry), or of the last one of each entry.
            function: force `step` or `decode`; default: `decode` where every sequence gets one token.

        Returns:
            f32[R, vocab], in the order of the batch.

        Raises:
            LlmcError: bad token ids, too many sequences, too long a sequence, pool exhausted.
        """
        with self._lock:
            return self._step(batch, all_rows, function)

    def sample(self, batch: Seq[tuple[Sequence, TokenIds]], samplers: Seq[Sampler]) -> list[int]:
        """Append tokens to sequences and choose the next one of each, where the logits are if the engine can do that.

        Args:
            batch: as for step().
            samplers: one for each sequence; they remember what was chosen.

        Raises:
            LlmcError: as step(); logits that are not numbers.
        """
        if len(samplers) != len(batch):
            raise ValueError(f"{len(batch)} sequences, {len(samplers)} samplers")
        engine = self._sampling
        if engine is None:
            return [s.sample(row) for s, row in zip(samplers, self.step(batch), strict=True)]
        with self._lock:
            ids = self._check(batch)
            draws = [sampler.draw() for sampler in samplers]
            tokens = [-1] * len(batch)
            rounds = plan_rounds([len(x) for x in ids], self.limits.max_step_tokens)
            self._check_room([seq for seq, _ in batch], rounds)
            for pieces in rounds:
                last = [p.end == len(ids[p.entry]) for p in pieces]
                mine = [draws[p.entry] if end else GREEDY for p, end in zip(pieces, last, strict=True)]
                found = self._round(
                    [(batch[p.entry][0], ids[p.entry][p.begin : p.end]) for p in pieces],
                    [False] * len(pieces),
                    None,
                    lambda function, inputs, mine=mine: engine.sample(function, inputs, mine),  # type: ignore[misc]
                )
                for p, token, end in zip(pieces, found, last, strict=True):
                    if end:
                        tokens[p.entry] = token
            for sampler, token in zip(samplers, tokens, strict=True):
                sampler.accept(token)
            return tokens

    def _step(
        self, batch: Seq[tuple[Sequence, TokenIds]], all_rows: bool | Seq[bool], function: str | None
    ) -> Floats:
        ids = self._check(batch)
        rounds = plan_rounds([len(x) for x in ids], self.limits.max_step_tokens)
        self._check_room([seq for seq, _ in batch], rounds)
        flags = [all_rows] * len(batch) if isinstance(all_rows, bool) else list(all_rows)
        if len(rounds) == 1:
            whole = [(seq, x) for (seq, _), x in zip(batch, ids, strict=True)]
            return self._round(whole, flags, function, self.engine.run)
        parts = []
        for pieces in rounds:
            part = self._round(
                [(batch[p.entry][0], ids[p.entry][p.begin : p.end]) for p in pieces],
                [flags[p.entry] for p in pieces],
                function,
                self.engine.run,
            )
            parts.extend(_wanted(part, pieces, flags, ids))
        return np.concatenate(parts)

    def _round(
        self,
        batch: Seq[tuple[Sequence, Int32s]],
        flags: Seq[bool],
        function: str | None,
        run: Callable[[str, StepInputs], Result],
    ) -> Result:
        """One call of a compiled function by `run`; on any failure the sequences are as before."""
        try:
            for seq, ids in batch:
                self.allocator.grow(seq.tables, seq.length + len(ids))
            inputs = self._builder.build(batch, flags)
            if function is None:
                one_each = self._has_decode and len(inputs.input_ids) == len(batch)
                function = "decode" if one_each else "step"
            result = run(function, inputs)
            for seq, ids in batch:
                seq.length += len(ids)
        finally:
            for seq, _ in batch:
                self.allocator.settle(seq.tables, seq.length)
        return result

    def _check(self, batch: Seq[tuple[Sequence, TokenIds]]) -> list[Int32s]:
        if not batch:
            raise LlmcError("empty-batch", "A step needs at least one sequence.")
        if len(batch) > self.limits.max_batch:
            raise LlmcError(
                "batch-too-large",
                f"A step takes at most {self.limits.max_batch} sequences, found {len(batch)}.",
                hint="Split the batch, or compile with a larger max_batch.",
            )
        if len({id(seq) for seq, _ in batch}) != len(batch):
            raise LlmcError("duplicate-sequence", "A sequence occurs twice in one batch.")
        out = []
        for seq, tokens in batch:
            seq.check_usable()
            ids = self.check_ids(tokens)
            if seq.length + len(ids) > self.limits.max_seq_len:
                raise LlmcError(
                    "sequence-too-long",
                    f"The sequence would have {seq.length + len(ids)} tokens; the artifact takes "
                    f"{self.limits.max_seq_len}.",
                    hint="Shorten the prompt, or compile with a larger max_seq_len.",
                )
            out.append(ids)
        return out

    def check_ids(self, tokens: TokenIds) -> Int32s:
        """i32[n] of valid token ids.

        Raises:
            LlmcError: none at all, not integers, or out of the vocabulary.
        """
        raw = np.asarray(tokens)
        if raw.ndim != 1 or raw.size == 0 or raw.dtype.kind not in "iu":
            what = "none" if raw.size == 0 else f"{raw.dtype} of shape {raw.shape}"
            raise LlmcError("token-ids", f"Token ids must be a list of at least one integer, found {what}.")
        low, high = int(raw.min()), int(raw.max())
        if low < 0 or high >= self.vocab_size:
            raise LlmcError(
                "token-out-of-vocabulary",
                f"Token ids must lie in 0..{self.vocab_size - 1}, found {low if low < 0 else high}.",
                hint="Use the tokenizer of this model.",
            )
        return raw.astype(np.int32, copy=False)

    def _check_room(self, sequences: Seq[Sequence], rounds: Seq[Seq[Piece]]) -> None:
        lengths = [seq.length for seq in sequences]
        first = list(lengths)
        plans = []
        for pieces in rounds:
            new = [0] * len(lengths)
            for p in pieces:
                new[p.entry] = p.end - p.begin
            plans.append(list(zip(lengths, new, strict=True)))
            lengths = [length + n for length, n in zip(lengths, new, strict=True)]
        self.allocator.check_room(plans, first)


def _wanted(logits: Floats, pieces: Seq[Piece], flags: Seq[bool], ids: Seq[Int32s]) -> list[Floats]:
    """Rows of a round that the caller asked for: not the last row of an entry that goes on in a later round."""
    out, row = [], 0
    for p in pieces:
        rows = p.end - p.begin if flags[p.entry] else 1
        if flags[p.entry] or p.end == len(ids[p.entry]):
            out.append(logits[row : row + rows])
        row += rows
    return out
