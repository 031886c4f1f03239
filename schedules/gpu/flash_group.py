"""Prefill attention on matrix units that four warps feed together (Shah et al. 2024, "FlashAttention-3"): one warpgroup
fetches tiles of keys and values, two multiply, each 64 rows.

Keys are dim-major and values token-major on their pages, so both are operands whose columns lie side by side; the threads that
fetch put their 16 bytes where the matrix units look for them. Weights are the first operand of the second product as they
lie in the registers of the first one's sums. While one warpgroup turns scores into weights the other one's products run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.gpu import bulk
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu import warpgroup as wg
from llmc.schedules.gpu.attention_pages import PageTiles
from llmc.schedules.gpu.configs import GpuPrefillSchedule
from llmc.schedules.gpu.flash import FlashTile
from llmc.schedules.gpu.flash_warp import Fragment, WarpTile, takes

_CHUNK = 8  # elements in 16 bytes
_STEP = 16  # elements of a row that one instruction multiplies
_WARPS = wg.WARPGROUP // g.WARP
# warpgroups that multiply -> registers of a thread that fetches, of one that multiplies
_REGISTERS = {1: (56, 240), 2: (56, 224), 3: (32, 160)}
_BESIDE = 48  # registers of a thread that multiplies, beside sums and weights
_WIDEST = 256
_NARROW = (
    128  # up to so many elements the sums of 128 keys' scores fit the registers beside those of the values
)
# 16 bytes that neighbouring threads copy to neighbouring blocks of 8 keys, or of 8 elements, fall into different banks
_KEY_PAD, _VALUE_PAD = 16, 8


@dataclass(frozen=True)
class GroupShape:
    """How a block is cut: 64 rows per warpgroup that multiplies.

    Attributes:
        keys: of a tile.
        groups: warpgroups that multiply.
        stages: tiles in shared memory.
    """

    keys: int
    groups: int = 2
    stages: int = 2

    @property
    def rows(self) -> int:
        return self.groups * wg.ROWS

    @property
    def threads(self) -> int:
        return (self.groups + 1) * wg.WARPGROUP

    @property
    def registers(self) -> tuple[int, int]:
        """(of a thread that fetches, of one that multiplies)."""
        return _REGISTERS[self.groups]

    @property
    def shares(self) -> bool:
        """Whether threads that fetch give registers away: a block of two warpgroups has as many as threads can address."""
        return self.groups > 1

    def fits(self, cfg: AttentionConfig, caps: Capabilities) -> bool:
        """Whether a multiprocessor has the shared memory, and threads the registers: scores, weights of them, values."""
        needed = self.keys // 2 + self.keys // 4 + cfg.value_dim // 2 + _BESIDE
        return self.shared_bytes(cfg) <= caps.shared_bytes and needed <= self.registers[1]

    def key_block(self, cfg: AttentionConfig) -> int:
        """Elements from 8 keys to the next 8."""
        return cfg.key_dim * _CHUNK + _KEY_PAD

    @property
    def value_block(self) -> int:
        """Elements from 8 elements of the values to the next 8."""
        return self.keys * _CHUNK + _VALUE_PAD

    def key_elements(self, cfg: AttentionConfig) -> int:
        return self.keys // _CHUNK * self.key_block(cfg)

    def stage_elements(self, cfg: AttentionConfig) -> int:
        return self.key_elements(cfg) + cfg.value_dim // _CHUNK * self.value_block

    def barriers_at(self, cfg: AttentionConfig) -> int:
        """Element behind queries and tiles."""
        return self.rows * cfg.key_dim + self.stages * self.stage_elements(cfg)

    def shared_bytes(self, cfg: AttentionConfig) -> int:
        return 2 * self.barriers_at(cfg) + 2 * self.stages * bulk.BARRIER_BYTES


def shape(cfg: AttentionConfig, caps: Capabilities) -> GroupShape | None:
    """The cut for these heads; None = this kernel is not made for them."""
    widest = max(cfg.key_dim, cfg.value_dim)
    if not caps.has_wgmma or cfg.coded or not takes(cfg, caps) or widest > _WIDEST:
        return None
    tuned = cfg.prefill.choices[0]
    if isinstance(tuned, GpuPrefillSchedule) and tuned.groups:
        return GroupShape(tuned.keys, tuned.groups, tuned.stages)
    cut = GroupShape(128 if widest <= _NARROW else 64)
    return cut if cut.shared_bytes(cfg) <= caps.shared_bytes else None


class _BlockTiles(PageTiles):
    """Tiles as the matrix units want them: pieces of 8 keys by 8 elements, 128 bytes, those of a column below each other."""

    def __init__(self, cut: GroupShape, cfg: AttentionConfig, *args: Any) -> None:
        super().__init__(cfg, *args)
        self._key_block, self._value_block = cut.key_block(cfg), cut.value_block
        self.v_offset, self.size = cut.key_elements(cfg), cut.stage_elements(cfg)
        self.dim_step = _CHUNK

    def _key_place(self, dim: Any, key: Any) -> Any:
        return key // _CHUNK * self._key_block + dim * _CHUNK

    def _value_place(self, key: Any, dim: Any) -> Any:
        return dim // _CHUNK * self._value_block + key * _CHUNK + self.v_offset


class _GroupWarp(WarpTile):
    """A warp of a warpgroup.

    Args:
        cut: of the block.
        queries, keys, values: descriptors of the group's rows, and of what belongs to the first stage.
    """

    def __init__(self, *args: Any, cut: GroupShape, queries: Any, keys: Any, values: Any) -> None:
        self._cut, self._queries, self._keys, self._values = cut, queries, keys, values
        super().__init__(*args)

    def _sums(self) -> list[list[Fragment]]:
        self._scores_of_all = g.local(wg.registers_of(self._cut.keys))
        self._out_of_all = g.local(wg.registers_of(self.columns))
        return [[Fragment(self._out_of_all, 4 * n) for n in range(self.columns // 8)]]

    @property
    def kept_steps(self) -> int:
        return 0

    def _score(self, base: Any) -> list[list[Fragment]]:
        cfg, sums = self.cfg, self._scores_of_all
        right = self._at(self._keys, base)
        wg.fence()
        for step in range(self.steps):
            ahead = _units(step * _STEP * _CHUNK)
            wg.mma_across(
                sums, self._queries + ahead, right + ahead, int(step > 0), self._cut.keys, cfg.dtype
            )
        wg.commit()
        wg.wait_for(sums, self._cut.keys, cfg.dtype)
        return [[Fragment(sums, 4 * n) for n in range(self._cut.keys // 8)]]

    def _weigh(self, base: Any, weights: list[list[Fragment]]) -> None:
        cfg = self.cfg
        right = self._at(self._values, base)
        operands = [self._weight_operand(weights[0], step) for step in range(self._cut.keys // _STEP)]
        wg.fence()
        for step, left in enumerate(operands):
            ahead = _units(step * _STEP * _CHUNK)
            words = [left[i] for i in range(4)]
            wg.mma_across(self._out_of_all, words, right + ahead, 1, self.columns, cfg.dtype)
        wg.commit()
        wg.wait_for(self._out_of_all, self.columns, cfg.dtype)

    def _at(self, first: Any, base: Any) -> Any:
        return e.let(first + tirx.Cast("uint64", T.truncdiv(base, g.i32(wg.UNIT // 2))))


def _units(elements: int) -> Any:
    return tirx.IntImm("uint64", elements * 2 // wg.UNIT)


class GroupTile(FlashTile):
    """A block's memory and steps; see FlashTile."""

    cut: Any

    def run(self, first_token: Any, used: Any, table: Any, begin: Any, end: Any, position: Any) -> None:
        begin, end, position = (g.held(g.i32(value)) for value in (begin, end, position))
        count = g.held(T.truncdiv(end - begin + (self.cut.keys - 1), g.i32(self.cut.keys)))
        with g.when(self.thread == 0):
            for stage in range(self.cut.stages):
                bulk.init(self._filled(stage), _WARPS)
                bulk.init(self._free(stage), self.cut.groups * _WARPS)
        self._load_queries(first_token, used)
        unit.commit()
        unit.wait(0)
        bulk.async_fence()
        g.barrier()
        with T.If(self.thread < wg.WARPGROUP):
            with T.Then():
                if self.cut.shares:
                    bulk.set_registers(self.cut.registers[0], more=False)
                self._fetch(table, begin, end, count)
            with T.Else():
                if self.cut.shares:
                    bulk.set_registers(self.cut.registers[1], more=True)
                self._multiply(first_token, used, begin, end, position, count)

    def _address(self, element: Any) -> Any:
        return g.address(self.memory, element)

    def _filled(self, stage: Any) -> Any:
        return self._address(self.cut.barriers_at(self.cfg) + stage * (bulk.BARRIER_BYTES // 2))

    def _free(self, stage: Any) -> Any:
        return self._filled(stage + self.cut.stages)

    def _query_place(self, row: Any, piece: Any) -> Any:
        pieces = self.cfg.key_dim // _CHUNK
        return (row // 8 * pieces + piece) * (8 * _CHUNK) + row % 8 * _CHUNK

    def _tiles(self, table: Any, end: Any) -> _BlockTiles:
        return _BlockTiles(
            *(self.cut, self.cfg, self.args, self.memory, self.cut.keys, self.kv_head),
            *(g.held(table), end, self.thread, wg.WARPGROUP),
        )

    def _fetch(self, table: Any, begin: Any, end: Any, count: Any) -> None:
        tiles, ring = self._tiles(table, end), self.cut.rows * self.cfg.key_dim
        tiles.find(begin)
        with g.loop(count) as i:
            first = g.held(begin + i * self.cut.keys)
            stage = g.held(i % self.cut.stages)
            bulk.wait(self._free(stage), 1 - i // self.cut.stages % 2)
            tiles.copy(stage * tiles.size + ring, first)
            unit.commit()
            tiles.find(first + self.cut.keys)
            unit.wait(0)
            bulk.async_fence()
            g.warp_barrier()
            with g.when(self.thread % g.WARP == 0):
                bulk.arrive(self._filled(stage))

    def _multiply(self, first_token: Any, used: Any, begin: Any, end: Any, position: Any, count: Any) -> None:
        cfg, cut = self.cfg, self.cut
        inside = e.let(self.thread - wg.WARPGROUP)
        # the same in all threads of a warp, and known to be: descriptors are kept once per warp
        warp = e.let(g.from_first(inside // g.WARP))
        ring = cut.rows * cfg.key_dim
        own = e.let(warp // _WARPS * (wg.ROWS * cfg.key_dim))
        rows_of_8 = cfg.key_dim * 8 * 2
        tile = _GroupWarp(
            *(cfg, self.caps, self.args, self._tiles(e.i64(0), end), 0, e.let(inside % g.WARP)),
            *(e.let(warp * 16), position, self.first_head, self.share),
            cut=cut,
            queries=e.let(wg.descriptor(self._address(own), wg.PIECE_BYTES, rows_of_8)),
            keys=e.let(wg.descriptor(self._address(ring), wg.PIECE_BYTES, 2 * cut.key_block(cfg))),
            values=e.let(
                wg.descriptor(
                    self._address(ring + cut.key_elements(cfg)), wg.PIECE_BYTES, 2 * cut.value_block
                )
            ),
        )
        tile.start()
        with g.loop(count) as i:
            stage = g.held(i % self.cut.stages)
            bulk.wait(self._filled(stage), i // self.cut.stages % 2)
            tile.visit(stage * cut.stage_elements(cfg), g.held(begin + i * cut.keys), end)
            with g.when(inside % g.WARP == 0):
                bulk.arrive(self._free(stage))
        tile.add_up()
        self._store(tile, first_token, used)
