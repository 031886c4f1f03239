"""Results of matrix units on their way to memory: four threads hold a row of 8 columns, memory wants 16 bytes of a thread.

In a fragment of 8 columns thread q of a quad (four neighbouring threads) holds columns 2 q and 2 q + 1: a word of 16-bit
numbers. Four fragments make 32 columns: after an exchange within the quad each thread has one of the fragments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g

QUAD = 4


def turned(words: Sequence[Any], thread: Any) -> list[Any]:
    """Four values of every thread, a matrix of the quad's threads and values, transposed; its own inverse."""
    found = list(words)
    for bit in (1, 2):
        upper = e.let(tirx.FloorMod(tirx.FloorDiv(thread, g.i32(bit)), g.i32(2)) != 0)
        for i in range(QUAD):
            if i & bit:
                continue
            low, high = found[i], found[i + bit]
            other = g.held(g.across(e.let(tirx.Select(upper, low, high)), bit))
            found[i] = g.held(tirx.Select(upper, other, low))
            found[i + bit] = g.held(tirx.Select(upper, high, other))
    return found


def gates_apart(first: Sequence[Any], second: Sequence[Any], thread: Any) -> tuple[list[Any], list[Any]]:
    """Of two fragments of gated weights (columns 0 to 3 are gates, 4 to 7 what they multiply), one of each.

    Args:
        first, second: the thread's values of the fragments.
        thread: its number; two threads away is the one with the other half.

    Returns:
        (gates, what they multiply) of 8 columns of y: those of `first`, then of `second`.
    """
    upper = e.let(tirx.FloorMod(tirx.FloorDiv(thread, g.i32(2)), g.i32(2)) != 0)
    gates, others = [], []
    for a, b in zip(first, second, strict=True):
        came = e.let(g.across(e.let(tirx.Select(upper, a, b)), 2))
        gates.append(e.let(tirx.Select(upper, came, a)))
        others.append(e.let(tirx.Select(upper, b, came)))
    return gates, others


def unpacked(word: Any, dtype: str) -> list[Any]:
    """The two 16-bit numbers of a word, as float32."""
    found = []
    for shift in (0, 16):
        bits = tirx.Cast("uint16", tirx.bitwise_and(tirx.shift_right(word, g.u32(shift)), g.u32(0xFFFF)))
        number = bits if dtype == "bfloat16" else tirx.reinterpret("float16", bits)
        found.append(e.let(e.widen(number, dtype, 1)))
    return found
