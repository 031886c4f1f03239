"""Selection by bits, four at a time: the k-th largest of a row, or the element at which a running sum passes a limit.

Each launch is a pass: a block chooses the digit of the pass before from what all blocks of its row counted, and counts its own
elements that agree so far by their next digit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.sample_layout import DIGITS, PASSES
from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g

THREADS = 256
BITS = DIGITS.bit_length() - 1
_GROUPS = THREADS // DIGITS


class Selection:
    """Selection among the elements of one row; the methods are emitted for all threads of a block.

    Args:
        dtype: of the counts or sums.
        table, at: scratch memory for them, [2, blocks, DIGITS] from `at` on; passes take turns.
        part, blocks: number of this block in its row, and how many there are.
        bits, rest: (memory, place) of a number per pass: the digits chosen before it, and what is left to count down
            (descending) or has been added up (ascending).
        start: that number before the first pass.
        descending: from the largest digit on: where `rest` elements are reached. Else from the smallest one on: where the
            sum passes `limit`, which is to be set before.
    """

    def __init__(
        self,
        dtype: str,
        table: Any,
        at: Any,
        part: Any,
        blocks: int,
        thread: Any,
        *,
        bits: tuple[Any, Any],
        rest: tuple[Any, Any],
        start: Any,
        descending: bool,
    ) -> None:
        self._dtype, self._table, self._at = dtype, table, at
        self._part, self._blocks, self._thread = part, blocks, thread
        self._bits, self._rest, self._start = bits, rest, start
        self._descending = descending
        self.limit: Any = None

    def run(self, number: Any, all_of: Callable[[Callable[[Any, Any], None]], None]) -> None:
        """Pass `number` (int64): all_of(add) calls add(bits, amount) for each element that the thread looks at."""
        prefix, rest = self._state(number)
        with g.when(T.And(self._part == 0, self._thread == 0)):
            self._save(number, prefix, rest)
        shift = e.let(tirx.Cast("uint32", 32 - BITS * (number + 1)))
        sums = g.local(DIGITS, self._dtype)
        for d in range(DIGITS):
            e.store(sums, d, self._zero(), 1)

        def add(bits: Any, amount: Any) -> None:
            bits, amount = e.let(bits), e.let(amount)
            digit = e.let(T.shift_right(T.bitwise_xor(bits, prefix), shift))
            # what agrees in the digits before has zeros there now
            for d in range(DIGITS):
                with g.when(digit == g.u32(d)):
                    e.store(sums, d, sums[d] + amount, 1)

        all_of(add)
        self._publish(number, sums)

    def finish(self) -> tuple[Any, Any]:
        """(the bits of the element, rest) after the last pass; also left behind as the state of pass PASSES."""
        bits, rest = self._state(e.i64(PASSES))
        with g.when(T.And(self._part == 0, self._thread == 0)):
            self._save(PASSES, bits, rest)
        return bits, rest

    def _save(self, number: Any, bits: Any, rest: Any) -> None:
        e.store(self._bits[0], self._bits[1] + number, T.reinterpret("int32", bits), 1)
        e.store(self._rest[0], self._rest[1] + number, rest, 1)

    def _zero(self) -> Any:
        return g.i32(0) if self._dtype == "int32" else tirx.FloatImm("float64", 0.0)

    def _table_at(self, number: Any, part: Any) -> Any:
        return self._at + (number % 2 * self._blocks + part) * DIGITS

    def _publish(self, number: Any, sums: Any) -> None:
        """Add the threads' sums up, in an order that is always the same, and write the block's."""
        rows = g.shared(THREADS * DIGITS, self._dtype, "rows")
        groups = g.shared(_GROUPS * DIGITS, self._dtype, "groups")
        for d in range(DIGITS):
            e.store(rows, self._thread * DIGITS + d, sums[d], 1)
        g.barrier()
        digit, group = e.let(self._thread % DIGITS), e.let(self._thread // DIGITS)
        total = g.local(1, self._dtype)
        e.store(total, 0, self._zero(), 1)
        with g.loop(THREADS // _GROUPS) as i:
            e.store(total, 0, total[0] + rows[(group * (THREADS // _GROUPS) + i) * DIGITS + digit], 1)
        e.store(groups, self._thread, total[0], 1)
        g.barrier()
        with g.when(self._thread < DIGITS):
            e.store(total, 0, self._zero(), 1)
            with g.loop(_GROUPS) as i:
                e.store(total, 0, total[0] + groups[i * DIGITS + self._thread], 1)
            e.store(self._table, self._table_at(number, self._part) + self._thread, total[0], 1)

    def _state(self, number: Any) -> tuple[Any, Any]:
        """(digits chosen before pass `number`, rest), the same in all threads."""
        chosen, left = g.local(1, "uint32"), g.local(1, self._dtype)
        e.store(chosen, 0, g.u32(0), 1)
        e.store(left, 0, self._start, 1)
        sums = g.shared(DIGITS, self._dtype, "digits")
        with g.when(number > 0):
            bits = e.let(T.reinterpret("uint32", self._bits[0][self._bits[1] + number - 1]))
            rest = e.let(self._rest[0][self._rest[1] + number - 1])
            with g.when(self._thread < DIGITS):
                total = g.local(1, self._dtype)
                e.store(total, 0, self._zero(), 1)
                with e.loop(self._blocks) as s:
                    value = self._table[self._table_at(number - 1, s) + self._thread]
                    e.store(total, 0, total[0] + value, 1)
                e.store(sums, self._thread, total[0], 1)
            g.barrier()
            digit, now = self._down(sums, rest) if self._descending else self._up(sums, rest)
            shift = e.let(tirx.Cast("uint32", 32 - BITS * number))
            e.store(chosen, 0, T.bitwise_or(bits, T.shift_left(tirx.Cast("uint32", digit), shift)), 1)
            e.store(left, 0, now, 1)
        return e.let(chosen[0]), e.let(left[0])

    def _down(self, sums: Any, rest: Any) -> tuple[Any, Any]:
        """The largest digit with which `rest` elements are reached, and how many of them are still wanted there."""
        digit, left, done = g.local(1, "int32"), g.local(1, "int32"), g.local(1, "int32")
        e.store(digit, 0, g.i32(0), 1)
        e.store(left, 0, rest, 1)
        e.store(done, 0, g.i32(0), 1)
        for d in reversed(range(DIGITS)):
            with g.when(done[0] == 0), T.If(T.Or(sums[d] >= left[0], g.i32(d) == 0)):
                with T.Then():
                    e.store(digit, 0, g.i32(d), 1)
                    e.store(done, 0, g.i32(1), 1)
                with T.Else():
                    e.store(left, 0, left[0] - sums[d], 1)
        return e.let(digit[0]), e.let(left[0])

    def _up(self, sums: Any, rest: Any) -> tuple[Any, Any]:
        """The digit with which the sum passes the limit, else the last one that has any, and the sum below it."""
        digit, done = g.local(1, "int32"), g.local(1, "int32")
        below, running = g.local(1, "float64"), g.local(1, "float64")
        e.store(digit, 0, g.i32(0), 1)
        e.store(done, 0, g.i32(0), 1)
        e.store(below, 0, rest, 1)
        e.store(running, 0, rest, 1)
        for d in range(DIGITS):
            with g.when(T.And(done[0] == 0, sums[d] > tirx.FloatImm("float64", 0.0))):
                e.store(digit, 0, g.i32(d), 1)
                e.store(below, 0, running[0], 1)
                e.store(running, 0, running[0] + sums[d], 1)
                with g.when(running[0] > self.limit):
                    e.store(done, 0, g.i32(1), 1)
        return e.let(digit[0]), e.let(below[0])
