"""A weight that is not quantized, in blocks of 8 rows by 16 bytes, for the matmuls of quantized weights.

A mixture of experts has them: their rows come from all over x, which suits kernels that read x from global memory.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu.gemv import element, layout_of, words_of
from llmc.schedules.gpu.qcodes import Weights
from llmc.schedules.qcodes import Place
from llmc.schedules.qlayout import UNIT


class WideWeight(Weights):
    """Columns of 32 rows, four blocks of 8.

    Args:
        packed: the weight, [..., blocks, steps, 8, elements of 16 bytes].
        size: its elements.
        shape: of one expert.
        first, last: number of the first block of 8 rows, and of the last one that there is.
    """

    def __init__(
        self, packed: Any, size: int, dtype: str, shape: tuple[int, ...], first: Any, last: Any
    ) -> None:
        _, self._steps, self._rows, self._each = shape
        self._dtype, self._first, self._last = dtype, first, last
        wide = dtype == "float32"
        self._data = e.flat(packed, size) if wide else e.flat(packed, size // 2, "uint32")
        self._lanes = 4  # of 16 bytes
        self.padded_k = -(-self._steps * self._each // UNIT) * UNIT
        self.chunk = UNIT

    def chunk_at(self, base: Any, number: Any) -> Place:
        zero = e.i64(0)
        return Place(e.let(number * UNIT), zero, zero, zero, zero)

    def unit_at(self, place: Place, number: Any) -> Any:
        return place.units

    def _places(self, unit: Any, first: Any, count: int, row: Any) -> list[Any]:
        """Where 16 bytes each lie; columns past the last one are some that there are."""
        block = e.let(T.min(self._first + row // self._rows, self._last))
        found = []
        for i in range(0, count, self._each):
            step = e.let(T.min((unit + first + i) // self._each, e.i64(self._steps - 1)))
            found.append(((block * self._steps + step) * self._rows + row % self._rows) * self._lanes)
        return found

    def words(self, unit: Any, first: Any, count: int, row: Any) -> list[list[Any]]:
        """16 bytes each."""
        return [[e.let(e.load(self._data, at, self._lanes)) for at in self._places(unit, first, count, row)]]

    def registers(self, count: int) -> int:
        return 4 * count // 2

    def fetch(self, to: Any, unit: Any, first: Any, count: int, row: Any) -> None:
        for i in range(4):
            for n, at in enumerate(self._places(unit, first, count, row + i)):
                g.load_words(to, (i * count // self._each + n) * self._lanes, self._data, at, self._lanes)

    def fetched(self, held: Any, i: int, first: Any, count: int) -> list[list[Any]]:
        return [[held[i * count // 2 + n] for n in range(count // 2)]]

    def floats(self, words: list[list[Any]], count: int, zero: Any) -> list[Any]:
        if self._dtype == "float32":
            return [element(word, i, self._dtype) for word in words[0] for i in range(self._lanes)]
        halves = [w for word in words[0] for w in g.elements(word, self._lanes)]
        out = []
        for half in halves:
            for shift in (0, 16):
                bits = T.bitwise_and(T.shift_right(half, g.u32(shift)), g.u32(0xFFFF))
                out.append(e.let(e.widen(T.reinterpret(self._bits, bits.astype("uint16")), self._dtype, 1)))
        return out

    @property
    def _bits(self) -> str:
        return "uint16" if self._dtype == "bfloat16" else "float16"

    def pairs(self, words: list[list[Any]], count: int, zero: Any, dtype: str) -> list[Any]:
        """Of what `grouped` gives."""
        return words[0]


__all__ = ["WideWeight", "layout_of", "words_of"]
