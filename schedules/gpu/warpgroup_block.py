"""Blocks of threads that multiply with warpgroups: one warpgroup fetches stages, two multiply them (64 rows each).

Between them are a few stages in shared memory, each 128 bytes of every row of x and of the weight, and two barriers per stage:
it is filled, it is free. A block works through many tiles of y, and the next tile is fetched while the sums of the last one
are stored.

x lies in rows; the threads copy 16 bytes each to where pieces of 8 rows by 16 bytes want them. That needs no description of the
tensor on the host, drops rows past the last one, and is one instruction of a warp per 512 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import bulk
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu import rows as tile_rows
from llmc.schedules.gpu import warpgroup as wg
from llmc.schedules.gpu.fragment_store import FragmentStore
from llmc.schedules.gpu.sort_experts import ExpertTiles

CHUNK_BYTES = 16
CHUNKS = 8  # of a row in a stage
ROW_BYTES = CHUNKS * CHUNK_BYTES
PIECE_ROWS = 8
BLOCK_BYTES = PIECE_ROWS * ROW_BYTES  # of 8 rows in a stage
WARPS = wg.WARPGROUP // g.WARP
_BEHIND = 2  # stages of x that are on their way when the one before them is announced
_GROUP = 16  # tiles that lie below each other and are computed one after the other, before the next columns


@dataclass(frozen=True)
class WarpgroupTile:
    """How y is cut.

    Attributes:
        columns: of the weight's rows, per block; 64 rows of x for each warpgroup that multiplies.
        stages: of 128 bytes of each row.
        warpgroups: that multiply.
        fetch_registers, multiply_registers: of a thread, by its part; multiples of 8. With a single warpgroup that multiplies
            every thread has as many as it can address.
    """

    columns: int
    stages: int
    warpgroups: int = 2
    fetch_registers: int = 40
    multiply_registers: int = 232

    def __post_init__(self) -> None:
        per_thread = self.fetch_registers + self.warpgroups * self.multiply_registers
        # a stage is free when the next one is being multiplied, and filled when _BEHIND more are on their way
        if self.columns % 64 or not 64 <= self.columns <= 256 or self.stages < _BEHIND + 2:
            raise ValueError(f"not a tile: {self}")
        if per_thread * wg.WARPGROUP > 65536:
            raise ValueError(f"a multiprocessor has 65536 registers: {self}")

    @property
    def rows(self) -> int:
        return wg.ROWS * self.warpgroups

    @property
    def threads(self) -> int:
        return wg.WARPGROUP * (self.warpgroups + 1)

    @property
    def stage_bytes(self) -> int:
        return (self.rows + self.columns) * ROW_BYTES

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.stage_bytes + 2 * bulk.BARRIER_BYTES)


@dataclass(frozen=True)
class Rows:
    """The rows that are multiplied.

    Attributes:
        data: flat, of a type of warpgroup.KINDS; bfloat16 as its bits.
        dtype: of that name.
        columns: of a row; a multiple of what 16 bytes hold.
        padded: columns of the weight, which may be more (x counts as 0 there); a multiple of what 32 bytes hold.
    """

    data: Any
    dtype: str
    columns: int
    padded: int

    @property
    def chunk(self) -> int:
        """Elements in 16 bytes."""
        return wg.KINDS[self.dtype].columns // 2


@dataclass(frozen=True)
class Place:
    """Where a tile lies.

    Attributes:
        rows: of x, the tile's first row and all that follow.
        column: first row of the weight, int32.
        expert: number of the weight, int64, where there are several.
    """

    rows: tile_rows.Rows
    column: Any
    expert: Any = None


class Tiles:
    """Which tiles a block computes, in order: `blocks` apart, neighbours of few columns and a group of rows.

    Blocks that run at the same time then share x and the weight in the second-level cache.

    Args:
        t: rows of x.
        across: tiles beside each other.
        down: tiles below each other; None = as many as x has.
    """

    def __init__(
        self, t: Any, across: int, tile: WarpgroupTile, number: Any, blocks: Any, down: Any = None
    ) -> None:
        self._tile, self._t = tile, t
        self._number, self._blocks = g.i32(number), g.i32(blocks)
        self._down = g.held(g.i32(e.ceildiv(t, tile.rows))) if down is None else down
        self._across = across
        total = self._down * self._across
        self.count = g.held(tirx.truncdiv(total - self._number + self._blocks - 1, self._blocks))

    def at(self, turn: Any) -> Place:
        """The block's tile `turn`."""
        down, column = self._numbers(turn)
        return Place(tile_rows.Rows(g.held(down * self._tile.rows), self._t), column)

    def _numbers(self, turn: Any) -> tuple[Any, Any]:
        """(number of tiles above, first row of the weight) of the block's tile `turn`, int32."""
        index = g.held(self._number + turn * self._blocks)
        per_group = g.i32(_GROUP * self._across)
        first = g.held(tirx.truncdiv(index, per_group) * _GROUP)
        inside = g.held(tirx.truncmod(index, per_group))
        height = g.held(T.min(self._down - first, g.i32(_GROUP)))
        down = g.held(first + tirx.truncmod(inside, height))
        return down, g.held(tirx.truncdiv(inside, height) * self._tile.columns)


def launch(
    t: Any,
    outputs: int,
    caps: Capabilities,
    tile: WarpgroupTile,
    make: Callable[[Any, Callable[[], Tiles]], Block],
    experts: tuple[Any, int] | None = None,
) -> None:
    """One launch over all of y.

    Args:
        t: rows of x.
        outputs: rows of the weight.
        make: (thread, tiles) -> what the block does.
        experts: (plan, number of experts) where rows go to several weights (sort_experts.py).
    """
    across = -(-outputs // tile.columns)
    most = tiles_of(t, outputs, tile) + (experts[1] * across if experts else 0)
    blocks = T.min(most, e.i64(caps.multiprocessors))
    with g.launch(blocks, tile.threads) as (number, thread), g.at_most_one_block():

        def tiles() -> Tiles:
            if experts is None:
                return Tiles(t, across, tile, number, blocks)
            found = ExpertTiles(experts[0], experts[1], tile.rows, thread)
            return TilesOfExperts(found, t, across, tile, number, blocks)

        make(thread, tiles).run()


class TilesOfExperts(Tiles):
    """Tiles whose rows go to one expert each; neighbours of an expert read its weight together."""

    def __init__(self, found: ExpertTiles, *args: Any) -> None:
        super().__init__(*args, down=found.total())
        self._found = found

    def at(self, turn: Any) -> Place:
        down, column = self._numbers(turn)
        expert, rows = self._found.find(down)
        return Place(rows, column, g.held(e.i64(expert)))


def tiles_of(t: Any, outputs: int, tile: WarpgroupTile) -> Any:
    """Tiles of y."""
    return e.ceildiv(t, tile.rows) * -(-outputs // tile.columns)


class Block:
    """One block of threads; subclasses bring the weight, and say what becomes of the products.

    Args:
        ops: arguments of the kernel, for storing (FragmentStore).
        x: what is multiplied.
        tiles: makes the list of the block's tiles; each part of the block counts for itself, which saves registers.
        block_rows: rows of the weight that lie together (FragmentStore).
    """

    arrivals = WARPS  # at a stage that is filled, beside those of copies in bulk

    def __init__(
        self,
        ops: Any,
        caps: Capabilities,
        tile: WarpgroupTile,
        thread: Any,
        tiles: Callable[[], Tiles],
        x: Rows,
        block_rows: int,
    ) -> None:
        self.ops, self.caps, self.tile, self.thread, self.x = ops, caps, tile, thread, x
        self._tiles, self._block_rows = tiles, block_rows
        self.depth = CHUNKS * x.chunk  # columns of a stage
        self.steps = -(-x.padded // self.depth)
        self.instructions = self.depth // wg.KINDS[x.dtype].columns  # of a whole stage
        self.elements = g.arena(tile.shared_bytes)
        self.x_bytes = tile.rows * ROW_BYTES  # of a stage
        self.w_bytes = tile.columns * ROW_BYTES
        self.w_at = tile.stages * self.x_bytes
        self._barriers_at = tile.stages * tile.stage_bytes

    # -- for subclasses ----------------------------------------------------------------------------------------------

    def begin_tile(self, place: Place) -> None:
        """The fetching warpgroup turns to a tile."""

    def fetch_weight(self, stage: Any, step: Any, place: Place) -> None:
        """Fill the weight's part of a stage, by the fetching warpgroup."""
        raise NotImplementedError

    def begin(self) -> None:
        """The multiplying warpgroups allocate registers."""
        raise NotImplementedError

    def multiply_tile(self, number: Any, place: Place) -> Any:
        """All stages of a tile, from `number` on; the sums (registers). Every stage must be released."""
        raise NotImplementedError

    def finish_row(self, row: Any) -> Any:
        """What sums of a row of x are multiplied with; None = nothing."""
        return None

    # -- everything else ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        tile = self.tile
        with g.when(self.thread == 0):
            for stage in range(tile.stages):
                bulk.init(self.filled(stage), self.arrivals)
                bulk.init(self._free(stage), tile.warpgroups * WARPS)
            bulk.async_fence()
        g.barrier()
        with T.If(self.thread < wg.WARPGROUP):
            with T.Then():
                if tile.warpgroups > 1:
                    bulk.set_registers(tile.fetch_registers, more=False)
                self._fetch()
            with T.Else():
                if tile.warpgroups > 1:
                    bulk.set_registers(tile.multiply_registers, more=True)
                self._multiply()

    def filled(self, stage: Any) -> Any:
        """The barrier at which a stage is filled."""
        return self.address(self._barriers_at + stage * bulk.BARRIER_BYTES)

    def _free(self, stage: Any) -> Any:
        return self.address(self._barriers_at + (self.tile.stages + stage) * bulk.BARRIER_BYTES)

    def address(self, byte: Any) -> Any:
        """Of a byte of the shared memory, a multiple of 2."""
        return g.address(self.elements, byte // 2)

    def _fetch(self) -> None:
        tiles = self._tiles()
        with g.loop(tiles.count) as turn:
            place = tiles.at(turn)
            rows = self._x_rows(place.rows)
            self.begin_tile(place)
            with g.loop(self.steps) as step:
                number = e.let(turn * self.steps + step)
                stage = g.held(number % self.tile.stages)
                bulk.wait(self._free(stage), 1 - number // self.tile.stages % 2)
                self._fetch_x(stage, step, rows)
                self.fetch_weight(stage, step, place)
                unit.commit()
                unit.wait(_BEHIND)
                with g.when(number >= _BEHIND):
                    self._announce(number - _BEHIND)
        for left in reversed(range(_BEHIND)):
            unit.wait(left)
            number = e.let(tiles.count * self.steps - (left + 1))
            with g.when(number >= 0):
                self._announce(number)

    def _x_rows(self, rows: tile_rows.Rows) -> list[tuple[Any, Any]]:
        """(where its row begins in x, whether there is one) of each piece that the thread copies of a stage.

        Neighbouring threads take 8 neighbouring rows of a chunk: their 16 bytes are one piece of 128 in the stage.
        """
        found = []
        per_turn = wg.WARPGROUP // CHUNKS
        for turn in range(self.tile.rows // per_turn):
            group = self.thread // (PIECE_ROWS * CHUNKS)
            row = e.let(turn * per_turn + group * PIECE_ROWS + self.thread % PIECE_ROWS)
            start = e.let(rows.at(row) * self.x.columns)
            if rows.order is not None:  # it comes from memory: once per tile
                start = g.held(start)
            found.append((start, e.let(rows.inside(row))))
        return found

    def _fetch_x(self, stage: Any, step: Any, rows: list[tuple[Any, Any]]) -> None:
        x, chunks = self.x, self.x.columns // self.x.chunk
        column = e.let(step * CHUNKS + self.thread // PIECE_ROWS % CHUNKS)
        inside = None
        if x.columns % self.depth:
            inside, column = e.let(column < chunks), e.let(T.min(column, chunks - 1))
        for turn, (start, there) in enumerate(rows):
            piece = turn * wg.WARPGROUP + self.thread
            to = e.let((stage * self.x_bytes + piece * CHUNK_BYTES) // 2)
            valid = there if inside is None else T.And(there, inside)
            unit.copy16(self.elements, to, x.data, e.let(start + column * x.chunk), valid)

    def _announce(self, number: Any) -> None:
        """What the thread has brought to stage `number` has arrived: one arrival per warp."""
        bulk.async_fence()
        g.warp_barrier()
        with g.when(self.thread % g.WARP == 0):
            bulk.arrive(self.filled(g.held(number % self.tile.stages)))

    def _multiply(self) -> None:
        inside = e.let(self.thread - wg.WARPGROUP)
        self.lane = e.let(inside % g.WARP)
        # the same in all threads of a warp, and known to be: descriptors are kept once per warp
        group = e.let(g.from_first(inside // wg.WARPGROUP))
        first = e.let(group * (wg.ROWS // PIECE_ROWS * BLOCK_BYTES))
        self._left = e.let(wg.descriptor(self.address(first), wg.PIECE_BYTES, BLOCK_BYTES))
        self._right = e.let(wg.descriptor(self.address(self.w_at), wg.PIECE_BYTES, BLOCK_BYTES))
        self.begin()
        tiles = self._tiles()
        with g.loop(tiles.count) as turn:
            place = tiles.at(turn)
            # of the warp's 16 rows of x
            self.first_row = e.i64(group * wg.ROWS + inside % wg.WARPGROUP // g.WARP * 16)
            sums = self.multiply_tile(e.let(turn * self.steps), place)
            gated, column = self.ops.cfg.gated, e.i64(place.column)
            store = FragmentStore(self.ops, self.caps, sums, self.lane, self._block_rows, self.finish_row)
            if place.expert is not None and self.ops.bias is not None:
                store.bias = tile_rows.Shifted(self.ops.bias, place.expert * self.ops.cfg.n)
            store.store(
                place.rows,
                self.first_row,
                e.let(column // 2 if gated else column),
                self.tile.columns // (16 if gated else 8),
            )

    def wait_filled(self, number: Any) -> Any:
        """Until stage `number` is filled; where it lies."""
        stage = g.held(number % self.tile.stages)
        bulk.wait(self.filled(stage), number // self.tile.stages % 2)
        return stage

    def products(self, sums: Any, stage: Any, first: int, count: int, add: Any) -> None:
        """Begin instructions first .. first + count - 1 of a stage, as one group.

        Args:
            add: whether the first one adds to the sums, as the others do.
        """
        a = e.let(self._left + tirx.Cast("uint64", stage * (self.x_bytes // wg.UNIT)))
        b = e.let(self._right + tirx.Cast("uint64", stage * (self.w_bytes // wg.UNIT)))
        wg.fence()
        for part in range(count):
            ahead = tirx.IntImm("uint64", (first + part) * 2 * wg.PIECE_BYTES // wg.UNIT)
            wg.mma(sums, a + ahead, b + ahead, g.i32(1) if part else add, self.tile.columns, self.x.dtype)
        wg.commit()

    def sum_stages(self, sums: Any, number: Any, steps: int, tail: int) -> None:
        """sums = the products of `steps` stages from `number` on; of the last one `tail` instructions (0 = all)."""
        with g.loop(steps - (tail > 0)) as step:
            at = e.let(number + step)
            stage = self.wait_filled(at)
            self.products(sums, stage, 0, self.instructions, tirx.Cast("int32", step > 0))
            wg.wait(1)
            with g.when(step > 0):
                self.release(at - 1)
        last = e.let(number + (steps - 1))
        if tail:
            self.products(sums, self.wait_filled(last), 0, tail, g.i32(int(steps > 1)))
        wg.wait_for(sums, self.tile.columns, self.x.dtype)
        if tail and steps > 1:
            self.release(last - 1)
        self.release(last)

    def release(self, number: Any) -> None:
        """The warp has multiplied stage `number`."""
        with g.when(self.thread % g.WARP == 0):
            bulk.arrive(self._free(g.held(number % self.tile.stages)))
