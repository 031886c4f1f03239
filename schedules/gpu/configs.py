"""Schedules of the kernels for machines with threads: which kernel runs for a range of rows, and how it is cut.

All zeros is the untuned choice, which the kernel makes from the shape and the machine. Schedules are what the tuner
searches (tune_linear.py, tune_qlinear.py, tune_attention.py beside this) and what records hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules.choice import ByRows

S = TypeVar("S")
_STATIC_SHARED = 48 << 10  # bytes that a kernel may declare; more has to be asked for when it is launched


class Way(IntEnum):
    """Which of the matmuls."""

    UNTUNED = 0  # by the number of rows, with constants as thresholds
    THREADS = 1  # plain arithmetic, columns shared among warps
    UNITS = 2  # matrix units, a warp at a time
    WARPGROUPS = 3  # matrix units that four warps feed together
    SPLIT = 4  # matrix units, columns shared among warps


@dataclass(frozen=True)
class GpuLinearSchedule:
    """How a linear kernel runs for some numbers of rows.

    Attributes:
        way: a Way.
        rows, warps, in_flight: of THREADS: rows of x that share one pass over the weight, warps of a block, 16-byte
            loads that a thread has under way. warps = 0: by the weight's size.
        tile_rows, tile_columns, warp_rows, warp_columns, stages: of UNITS: gemm.TileConfig.
        warpgroups: of WARPGROUPS, with tile_columns and stages: warpgroup_gemm.WarpgroupTile.
        Of SPLIT: tile_rows (8 or 16) and warps, as of flat.flat_gemm.
        vectors: as in LinearSchedule; on these machines the layout is the same for all schedules.
    """

    way: int = Way.UNTUNED
    rows: int = 0
    warps: int = 0
    in_flight: int = 0
    tile_rows: int = 0
    tile_columns: int = 0
    warp_rows: int = 0
    warp_columns: int = 0
    stages: int = 0
    warpgroups: int = 0
    vectors: ClassVar[int] = 0


@dataclass(frozen=True)
class GpuQuantSchedule:
    """How a kernel with a quantized weight runs for some numbers of rows.

    Attributes:
        way: a Way; WARPGROUPS has no further fields.
        rows: of THREADS: rows of x per block.
        tiles: of UNITS: tiles of 16 rows of x per block; 0 = half a tile.
        warps: of a block, which share the columns out.
    """

    way: int = Way.UNTUNED
    rows: int = 0
    tiles: int = 0
    warps: int = 0


@dataclass(frozen=True)
class GpuExpertSchedule:
    """How an expert kernel runs for some numbers of rows.

    Attributes:
        way: a Way.
        rows: of THREADS: rows of an expert per block.
        tiles: of UNITS: tiles of 16 rows of an expert per block; 0 = half a tile.
        warps: of both, which share the columns out.
        tile_columns, stages: of WARPGROUPS: warpgroup_gemm.WarpgroupTile.
        vectors: as in ExpertSchedule; on these machines the layout is the same for all schedules.
    """

    way: int = Way.UNTUNED
    rows: int = 0
    tiles: int = 0
    warps: int = 0
    tile_columns: int = 0
    stages: int = 0
    vectors: ClassVar[int] = 0


@dataclass(frozen=True)
class GpuNormSchedule:
    """How a norm's rows are shared out; threads = 0: by the row's length.

    Attributes:
        threads: of a row.
        rows: of a block; more than one only of a warp each.
    """

    threads: int = 0
    rows: int = 1


@dataclass(frozen=True)
class GpuPrefillSchedule:
    """How prefill attention is cut.

    Attributes:
        warps, tiles, keys, stages: on the matrix units: flash.FlashShape; warps = 0: by the heads' size.
        groups: of warpgroups that multiply (flash_group.GroupShape, with keys and stages); 0 = warps by themselves.
    """

    warps: int = 0
    tiles: int = 0
    keys: int = 0
    stages: int = 0
    groups: int = 0


@dataclass(frozen=True)
class GpuDecodeSchedule:
    """How decode attention is cut.

    Attributes:
        splits, least_keys: as in DecodeSchedule.
        warps, keys, stages: on the matrix units: flash_decode.DecodeShape; warps = 0: by the heads' size.
    """

    splits: int = 8
    least_keys: int = 128
    warps: int = 0
    keys: int = 0
    stages: int = 0


def schedules_in(schedule: ByRows[Any], kind: type[S]) -> ByRows[S]:
    """The schedules of a config if they are of that kind; else (another machine's defaults) the untuned one."""
    return schedule if isinstance(schedule.choices[0], kind) else ByRows((kind(),))


def emit_by_rows(schedules: ByRows[S], rows: Any, body: Callable[[S, int], None]) -> None:
    """ByRows.emit, without a word on `rows` to TVM's simplifier.

    Where few rows are known to come, it would write the number of the last row without the multiplication that shows that
    16 bytes may be loaded at a time.
    """
    schedules.emit(T.reinterpret("int64", T.reinterpret("uint64", rows)), body)


def kind_of(values: dict[str, Any], *kinds: type[Any]) -> type[Any]:
    """Which kind of schedules a ByRows was, from its JSON values: the first whose fields are those."""
    names = set(values["choices"][0])
    return next((kind for kind in kinds if names <= {f.name for f in fields(kind)}), kinds[0])


def shared_limit(caps: Capabilities) -> int:
    """Bytes of shared memory that a tuned kernel may declare."""
    return min(caps.shared_bytes, _STATIC_SHARED)
