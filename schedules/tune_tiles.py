"""Schedules on tile registers for the tuner: a second space beside that of the vector kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llmc.schedules.tunable import Bucket, Knob, Space

_COLUMNS = (0, 128, 256, 512, 1024)


def with_tiles(
    space: Space,
    bucket: Bucket,
    k: int,
    knobs: tuple[Knob, ...] = (),
    valid: Callable[[Any], bool] = lambda _: True,
) -> Space:
    """The space of a bucket on a machine with tile registers: schedules on vectors or tiles, the default's kind first.

    Args:
        space: of the vector kernel; its default decides from how many rows on the untuned kernel takes tiles.
        k: columns.
        knobs, valid: further fields that schedules on tiles may choose.
    """
    large = not bucket.high or bucket.high > 64
    columns = tuple(c for c in _COLUMNS if c < k)
    tile_knobs = (
        Knob("tile_rows", (0, 64, 128, 256, 512) if large else (0,)),
        Knob("tile_columns", columns),
        Knob("tile_blocks", (1, 0, 2, 4)),
        Knob("tile_unroll", (1, 2, 4)),
        Knob("tile_prefetch", (False, True)),
        Knob("tile_wide", (False, True)),
        *knobs,
    )
    if space.default.tiles_from <= bucket.low:
        vectors = replace(space, default=replace(space.default, tiles_from=0))
        return Space(space.default, tile_knobs, valid, vectors)
    return replace(space, other=Space(replace(space.default, tiles_from=1), tile_knobs, valid))
