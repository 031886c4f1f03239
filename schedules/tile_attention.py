"""The two products of attention's prefill on tile registers; all else of a tile is attention_tile.py's.

Queries and softmax weights are rows of bf16 pairs, and so left operands where they lie; a block's keys and values are laid out
in scratch as pairs by lanes, which is what right operands are.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import Capabilities, TileUnit
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.attention_tile import Tile, uses_dot
from llmc.schedules.tile_product import LEFT, PAIR, RIGHT
from llmc.schedules.tiles import ROWS, TileDot, Tiles


def attention_unit(cfg: AttentionConfig, caps: Capabilities) -> Tiles | None:
    """The unit for a prefill kernel; None if vectors do it: no unit, no bf16, heads that are not whole tiles, or latents."""
    if cfg.latent or caps.tiles is TileUnit.NONE or not uses_dot(cfg, caps) or cfg.key_dim % (2 * ROWS):
        return None
    return Tiles(caps, LEFT, RIGHT)


class UnitTile(Tile):
    """A Tile that multiplies on the unit; rows are padded to pairs of register tiles.

    Args:
        unit: whose `launch` the task is in.
        others: arguments of Tile.
    """

    def __init__(self, unit: Tiles, *others: Any) -> None:
        super().__init__(*others, direct=False)
        self.unit = unit
        self.rows_padded = -(-self.rows // PAIR) * PAIR

    def visit(self, table: Any, first_key: Any, end_key: Any, first_position: Any) -> None:
        """As of Tile."""
        keys = e.let(T.min(e.i64(self.block), end_key - first_key))
        page = e.let(table + first_key // self.cfg.page_size)
        self._lay_out_keys(page, keys)
        self._multiply(
            (self.query, self.k_steps), (self.keys, self.block), (self.scores, self.block), self.k_steps, True
        )
        self._softmax(first_key, first_position, keys)
        self._lay_out_values(page, keys)
        # weights behind the last key are zero, values must not be NaN there
        pairs = e.let((keys + 1) // 2)
        steps = e.let((pairs + (ROWS - 1)) // ROWS)
        vectors = self.value_width // ROWS
        with e.loop(pairs * vectors, steps * (ROWS * vectors)) as i:
            e.store(self.values, i * ROWS, e.const("int32", 0, ROWS), ROWS)
        self._multiply(
            (self.weights, self.block // 2),
            (self.values, self.value_width),
            (self.out, self.value_width),
            steps * ROWS,
            False,
        )

    def _multiply(
        self,
        left: tuple[Any, int],
        right: tuple[Any, int],
        target: tuple[Any, int],
        pairs: Any,
        clear: bool,
    ) -> None:
        """target[rows, width] (+)= left[rows, pairs] x right[pairs, width]; each with its stride in 32-bit elements.

        pairs: a multiple of 16.
        """
        a, a_stride = left
        b, b_stride = right
        c, c_stride = target
        unit, columns = self.unit, b_stride // ROWS

        def part(row: Any, first: Any, width: int) -> None:
            at = e.let(row * c_stride + first * ROWS)
            sums = [(r, v, r * width + v) for r in (0, 1) for v in range(width)]
            for r, v, tile in sums:
                if clear:
                    unit.zero(tile)
                else:
                    unit.load(tile, c, at + r * ROWS * c_stride + v * ROWS, c_stride * 4)
            with e.loop(pairs // ROWS) as k:
                for v in range(width):
                    unit.load(RIGHT[v], b, k * (ROWS * b_stride) + (first + v) * ROWS, b_stride * 4)
                    for r in (0, 1):
                        if v == 0:
                            unit.load(LEFT[r], a, (row + r * ROWS) * a_stride + k * ROWS, a_stride * 4)
                        unit.dot(TileDot.BF16, r * width + v, LEFT[r], RIGHT[v])
            for r, v, tile in sums:
                unit.store(tile, c, at + r * ROWS * c_stride + v * ROWS, c_stride * 4)

        with e.loop((self.used + (PAIR - 1)) // PAIR) as i:
            row = e.let(i * PAIR)
            with e.loop(columns // 2) as group:
                part(row, e.let(group * 2), 2)
            if columns % 2:
                part(row, e.i64(columns - 1), 1)
