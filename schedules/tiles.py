"""Operations on tile registers, as a machine with a matrix unit has them or as functions that do the same on memory.

Eight tiles of 16 rows by 64 bytes. `dot` adds the product of two of them to a third one: 16 x 32 bf16 by 16 pairs of rows
by 16 columns in float32, or 16 x 64 bytes by 16 quads of rows by 16 columns in int32 (Intel 64 and IA-32 Architectures
Software Developer's Manual, vol. 1 chapter 18, vol. 2: LDTILECFG, TILELOADD, TDPBF16PS, TDPB[SU][SU]D). A kernel
is written once; where TileUnit.EMULATED is asked for, each operation becomes a call of a function with the same
arithmetic, the same configuration and the same faults (an illegal instruction), so that kernels can be checked on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities, TileUnit
from llmc.schedules import emit as e
from llmc.schedules.tile_emulation import CONFIG_AT, FILE_BYTES, emulation_text

ROWS = 16  # of a tile
ROW_BYTES = 64
COUNT = 8
ELEMENTS = 256  # 32-bit ones of a tile of sums

_PALETTE, _COLUMN_BYTES_AT, _ROWS_AT = 1, 16, 48  # in the 64 bytes that ldtilecfg reads


class TileDot(str, Enum):
    """What two tiles hold: the second half of the instruction's name."""

    BF16 = "bf16ps"  # pairs of bf16
    SIGNED = "bssd"  # bytes, both signed
    SIGNED_UNSIGNED = "bsud"  # signed bytes of rows, unsigned bytes of columns


class Tiles:
    """Emits tile operations inside `launch`.

    Args:
        left: numbers of the tiles that are left operands.
        right: numbers of the tiles that are right operands; all others hold sums.
        inner_bytes: bytes of a row of a left operand: 64, or less if sums end earlier; a right operand has a quarter as
            many rows.
    """

    def __init__(
        self, caps: Capabilities, left: tuple[int, ...], right: tuple[int, ...], inner_bytes: int = ROW_BYTES
    ) -> None:
        if caps.tiles is TileUnit.NONE:
            raise ValueError(f"{caps.preset} has no tile registers")
        if caps.lanes_f32 != ROWS:
            raise ValueError(f"a row of sums is a vector of {ROWS} lanes, found {caps.lanes_f32}")
        self.emulated = caps.tiles is TileUnit.EMULATED
        self.column_bytes = [inner_bytes if i in left else ROW_BYTES for i in range(COUNT)]
        self.rows = [inner_bytes // 4 if i in right else ROWS for i in range(COUNT)]
        self._file: Any = None

    @contextmanager
    def launch(self, extent: Any, text: str) -> Iterator[Any]:
        """A parallel loop over 0 .. extent - 1, in which every thread configures the unit once and releases it at the end.

        Args:
            text: LLVM functions that the body needs.
        """
        text += emulation_text() if self.emulated else ""
        annotations: dict[str, Any] = {"pragma_import_llvm": text} if text else {}
        alone = isinstance(extent, int) and extent == 1  # no loop, which a launch must have
        if not alone:
            annotations["pragma_parallel_launch_point"] = tirx.IntImm("int32", 1)
        config = self._config()
        with T.serial(e.i64(0), e.i64(1), annotations=annotations):
            if self.emulated:
                # not a buffer: those are allocated before the launch, one for all threads
                self._file = e.let(T.call_extern("handle", "malloc", e.i64(FILE_BYTES)))
            self._emit("ldtilecfg", T.address_of(config[0]))
            if alone:
                yield e.i64(0)
            else:
                with T.parallel(e.i64(extent)) as task:
                    yield task
            self._emit("tilerelease")
            if self.emulated:
                T.evaluate(T.call_extern("int32", "llmc_tile_free", self._file))

    def zero(self, tile: int) -> None:
        self._emit("tilezero", self._number(tile))

    def load(self, tile: int, buffer: Any, index: Any, stride: int) -> None:
        """Rows of a tile from buffer[index] on, `stride` bytes apart."""
        self._emit("tileloadd64", self._number(tile), T.address_of(buffer[index]), e.i64(stride))

    def store(self, tile: int, buffer: Any, index: Any, stride: int = ROW_BYTES) -> None:
        """Rows of a tile to buffer[index] on, `stride` bytes apart."""
        self._emit("tilestored64", self._number(tile), T.address_of(buffer[index]), e.i64(stride))

    def dot(self, kind: TileDot, sums: int, left: int, right: int) -> None:
        """sums += left x right."""
        self._emit(f"tdp{kind.value}", *(self._number(t) for t in (sums, left, right)))

    def _config(self) -> Any:
        """What ldtilecfg reads."""
        config = e.scratch(64, "uint8")
        values = [0] * 64
        values[0] = _PALETTE
        for i in range(COUNT):
            values[_COLUMN_BYTES_AT + 2 * i] = self.column_bytes[i]
            values[_ROWS_AT + i] = self.rows[i]
        for at, value in enumerate(values):
            e.store(config, at, tirx.IntImm("uint8", value), 1)
        return config

    def _number(self, tile: int) -> Any:
        if not 0 <= tile < COUNT:
            raise ValueError(f"there is no tile {tile}")
        return tirx.IntImm("int64" if self.emulated else "int8", tile)

    def _emit(self, name: str, *args: Any) -> None:
        if self.emulated:
            T.evaluate(T.call_extern("int32", f"llmc_{name}", self._file, *args))
        else:
            T.evaluate(T.call_llvm_intrin("void", T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}"), *args))


__all__ = ["CONFIG_AT", "COUNT", "ELEMENTS", "ROWS", "ROW_BYTES", "TileDot", "Tiles"]
