"""Products whose operands are more than lanes by lanes: tiles of 2 x 2 sums, and one lane of a register for all.

A matrix instruction (smmla, bfmmla) multiplies 2 x 8 bytes by 2 x 8 bytes: a register's sums are 2 rows x 2 outputs, its
operands two rows of activations and two outputs of a weight, eight bytes of neighbouring columns each. Packed weights
hold four outputs by four bytes per register (schedules/layout.py, qlayout.py): two steps of four outputs, zipped, are two
operands of two outputs. So one packed weight serves dot products and matrix products.

    acc[r][v], acc[r + 1][v]      rows r and r + 1, outputs 4v .. 4v + 3
    <-> tile [r 0..1, r+1 0..1]   both rows, outputs 4v and 4v + 1; and another one for 4v + 2 and 4v + 3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules import emit as e

LANES = 4  # 32-bit lanes of such a register


def zipped(first: Any, second: Any) -> tuple[Any, Any]:
    """Steps j and j + 1 of four outputs (int32 lanes) as both operands of two outputs; the results are named."""
    return _shuffle("zip_low", first, second), _shuffle("zip_high", first, second)


def both_rows(first: Any, second: Any) -> Any:
    """Eight bytes of each of two rows (two int32 lanes each) as one operand."""
    return e.let(T.call_pure_extern("int32x4", "llmc_join", first, second))


def turned(first: Any, second: Any) -> tuple[Any, Any]:
    """Rows r and r + 1 of four outputs to both tiles of two outputs, or back: it is its own inverse."""
    kind = str(first.ty.dtype)
    parts = [T.reinterpret("int32x4", v) if kind != "int32x4" else v for v in (first, second)]
    made = [_shuffle(name, *parts) for name in ("lower", "upper")]
    low, high = (e.let(T.reinterpret(kind, v)) if kind != "int32x4" else v for v in made)
    return low, high


def multiply_lanes(
    acc: Sequence[Sequence[Any]],
    steps: Any,
    left: Callable[[int, Any], Sequence[Any]],
    right: Callable[[Any, int], Sequence[Any]],
    product: Callable[[Any, Any, Any], Any] = lambda c, a, b: c + a * b,
) -> None:
    """acc[r][v] += rows times weights over the first steps // 4 * 4 steps, with rows as lanes of a register.

    Args:
        acc: scratch of float32 lanes.
        left: (row, step) -> four lanes of steps `step` to `step` + 3; several if a step has several columns.
        right: (step, vector) -> as many vectors: columns of four outputs.
        product: of an accumulator, a lane of `left` in all lanes, and a vector of `right`.
    """
    with e.loop(steps // LANES) as j:
        values = [[e.let(value) for value in left(r, LANES * j)] for r in range(len(acc))]
        for i in range(LANES):
            for v in range(len(acc[0])):
                weights = [e.let(weight) for weight in right(LANES * j + i, v)]
                for r, row in enumerate(values):
                    for value, weight in zip(row, weights, strict=True):
                        one = e.splat(e.lane(value, i), LANES)
                        e.store(acc[r][v], 0, product(e.load(acc[r][v], 0, LANES), one, weight), LANES)


def _shuffle(name: str, first: Any, second: Any) -> Any:
    return e.let(T.call_pure_extern("int32x4", f"llmc_{name}", first, second))


def multiply_bf16(
    acc: Sequence[Sequence[Any]],
    steps: Any,
    left: Callable[[int, Any], Any],
    right: Callable[[Any, int], Any],
) -> None:
    """acc[r][v] += rows times weights over the first steps // 2 * 2 steps, two columns each, of bf16 pairs.

    Args:
        acc: scratch of float32 lanes, at least two rows; an odd last one takes dot products.
        left: (row, step) -> int32x2: columns of steps `step` and `step` + 1.
        right: (step, vector) -> int32 lanes: a pair of columns of four outputs.
    """
    vectors, pairs, odd = len(acc[0]), len(acc) // 2, len(acc) % 2
    sums = [[e.scratch(LANES) for _ in range(2 * vectors)] for _ in range(pairs)]
    for p, v in ((p, v) for p in range(pairs) for v in range(vectors)):
        rows = [e.let(e.load(acc[2 * p + i][v], 0, LANES)) for i in range(2)]
        for h, tile in enumerate(turned(*rows)):
            e.store(sums[p][2 * v + h], 0, tile, LANES)
    with e.loop(steps // 2) as j:
        a = [both_rows(*(e.let(left(2 * p + i, 2 * j)) for i in range(2))) for p in range(pairs)]
        last = e.let(left(2 * pairs, 2 * j)) if odd else None
        for v in range(vectors):
            steps_of = [e.let(right(2 * j + i, v)) for i in range(2)]
            for h, weight in enumerate(zipped(*steps_of)):
                for p in range(pairs):
                    tile = sums[p][2 * v + h]
                    e.store(tile, 0, e.mma_bf16(e.load(tile, 0, LANES), a[p], weight), LANES)
            for i in range(2 * odd):
                one = e.let(e.splat(e.lane(last, i), LANES))
                value = e.dot_bf16(e.load(acc[-1][v], 0, LANES), one, steps_of[i])
                e.store(acc[-1][v], 0, value, LANES)
    for p, v in ((p, v) for p in range(pairs) for v in range(vectors)):
        tiles = [e.let(e.load(sums[p][2 * v + h], 0, LANES)) for h in range(2)]
        for i, row in enumerate(turned(*tiles)):
            e.store(acc[2 * p + i][v], 0, row, LANES)
