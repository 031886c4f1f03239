"""Integer products where an instruction takes one lane of a register as an operand, and shifts bytes (sdot by element).

Activations of sixteen columns are one load instead of four broadcasts, and the upper codes of bytes come out clean.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules import emit as e
from llmc.schedules.iactivations import IntActivations
from llmc.schedules.iblocks import IntBlocks
from llmc.schedules.isums import Vectors
from llmc.schedules.qlayout import UNIT

_QUADS = 4  # of activations in a register


class LaneIntBlocks(IntBlocks):
    """IntBlocks with activations as lanes."""

    @property
    def max_rows(self) -> int:
        """Beside sums: a register of activations per row, and the weights of a word."""
        spare = self.caps.vector_registers - 2 * self.vectors
        return max(1, min(6, spare // (self.vectors * (2 if self.grouped else 1) + 1)))

    def _unit(self, x: IntActivations, part: Vectors, unit: Any, at: Any, columns: list[Any]) -> None:
        words = UNIT // 8 if self.nibbles else UNIT // 4
        each = _QUADS // 2 if self.nibbles else _QUADS  # words of a register of activations
        base = e.let(unit // 4 + at)

        def turn(i: Any, sums: Vectors) -> Vectors:
            held = [e.let(e.load(x.data, c + i * _QUADS, _QUADS)) for c in columns]
            for w in range(each):
                line = base + (i * each + w) * self.nb
                for v in range(len(sums[0])):
                    word = e.let(e.load(self.words, line + v * self.lanes, self.lanes))
                    for h, quad in enumerate(self._quads(word)):
                        weights = self.dot.weights(quad)
                        for r, values in enumerate(held):
                            spread = [e.splat(e.lane(values, w * (_QUADS // each) + h), self.lanes)]
                            sums[r][v] = e.let(self.dot.add(sums[r][v], weights, spread))
            return sums

        if len(columns) == 1:
            sums = self._values(part)
            for i in range(words // each):
                sums = turn(i, sums)
            self._store(part, sums)
            return
        with e.loop(words // each) as i:
            self._store(part, turn(i, self._values(part)))

    def _quads(self, word: Any) -> list[Any]:
        return list(e.nibbles(word, self.lanes)) if self.nibbles else [word]

    def _products(
        self, x: IntActivations, sums: Vectors, bases: list[Any], source: Any, begin: Any, quads: Any
    ) -> None:
        lanes = self.lanes
        with e.loop(quads // _QUADS) as q:
            held = [e.let(e.load(x.data, base + q * _QUADS, _QUADS)) for base in bases]
            values = self._values(sums)
            for i in range(_QUADS):
                for v in range(len(sums[0])):
                    at = begin + (q * _QUADS + i) * self.nb + v * lanes
                    weights = self.dot.weights(e.let(e.load(source, at, lanes)))
                    for r, row in enumerate(held):
                        spread = [e.splat(e.lane(row, i), lanes)]
                        values[r][v] = e.let(self.dot.add(values[r][v], weights, spread))
            self._store(sums, values)

    def _values(self, vectors: Vectors) -> Vectors:
        return [[e.load(vector, 0, self.lanes) for vector in row] for row in vectors]
