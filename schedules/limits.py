"""Kernels that reach a machine's limits, and do nothing else: the roofline of other kernels is drawn from them.

`read_kernel` reads memory once; `multiply_kernel` multiplies registers by registers. The results are stored only so
that the compiler keeps the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.caps import ByteDot, Capabilities, TileUnit
from llmc.schedules import emit as e
from llmc.schedules.tiles import ELEMENTS, ROWS, TileDot, Tiles

# independent accumulators: latency times instructions per cycle of a multiply-add is 8 to 10 on current cores
CHAINS = 12
# multiply-adds of one accumulator per iteration of the loop
UNROLL = 8
# vectors that one iteration reads
STREAMS = 4


@dataclass(frozen=True)
class MultiplyKind:
    """A multiply-accumulate instruction on vector registers.

    Attributes:
        operands: name of the operands' type.
        dtype: of an accumulator's lanes.
        per_lane: multiplications that go into one lane.
        usable: whether a machine with these capabilities has it.
        apply: (accumulator, operand, operand, lanes) -> accumulator; the operands are vectors of `dtype`'s width.
    """

    operands: str
    dtype: str
    per_lane: int
    usable: Callable[[Capabilities], bool]
    apply: Callable[[Any, Any, Any, int], Any]

    def operations(self, lanes: int) -> int:
        """Multiplications and additions of one iteration of the kernel's loop in one thread."""
        return 2 * self.per_lane * lanes * CHAINS * UNROLL


def _fma(acc: Any, a: Any, b: Any, lanes: int) -> Any:
    kind = e.vec("float32", lanes)
    a, b = T.reinterpret(kind, a), T.reinterpret(kind, b)
    return T.call_llvm_pure_intrin(kind, T.llvm_lookup_intrinsic_id("llvm.fma"), a, b, acc)


def _dot_bf16(acc: Any, a: Any, b: Any, lanes: int) -> Any:
    return e.dot_bf16(acc, a, b)


def _dot_int8(acc: Any, a: Any, b: Any, lanes: int) -> Any:
    a, b = T.reinterpret("uint8x64", a), T.reinterpret("int8x64", b)
    name = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512")
    return T.call_llvm_pure_intrin("int32x16", name, acc, a, b)


def _mma_bf16(acc: Any, a: Any, b: Any, lanes: int) -> Any:
    return e.mma_bf16(acc, a, b)


def _mma_int8(acc: Any, a: Any, b: Any, lanes: int) -> Any:
    return e.mma_bytes(acc, a, b)


def _dot_signed(acc: Any, a: Any, b: Any, lanes: int) -> Any:
    a, b = (T.reinterpret("int8x16", value) for value in (a, b))
    name = T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.sdot.v4i32.v16i8")
    return T.call_llvm_pure_intrin("int32x4", name, acc, a, b)


def _signed(caps: Capabilities) -> bool:
    return caps.byte_dot is ByteDot.SIGNED and not caps.has_byte_mma


# of each type of operands a machine can use one
MULTIPLY_KINDS = (
    MultiplyKind("f32", "float32", 1, lambda caps: True, _fma),
    MultiplyKind("bf16", "float32", 2, lambda caps: caps.has_bf16_dot and not caps.has_bf16_mma, _dot_bf16),
    MultiplyKind("bf16", "float32", 4, lambda caps: caps.has_bf16_mma, _mma_bf16),
    MultiplyKind("int8", "int32", 4, lambda caps: "+avx512vnni" in caps.mattr, _dot_int8),
    MultiplyKind("int8", "int32", 4, _signed, _dot_signed),
    MultiplyKind("int8", "int32", 8, lambda caps: caps.has_byte_mma, _mma_int8),
)


@dataclass(frozen=True)
class TileKind:
    """A multiply-accumulate instruction on tile registers; fields as of MultiplyKind, `per_lane` of a tile's element."""

    operands: str
    dtype: str
    per_lane: int
    dot: TileDot

    def operations(self, lanes: int) -> int:
        """As of MultiplyKind."""
        return 2 * self.per_lane * ELEMENTS * _TILE_SUMS * UNROLL


_TILE_SUMS = 4  # two left by two right operands: no instruction waits for the one before it
TILE_KINDS = (
    TileKind("bf16", "float32", 32, TileDot.BF16),
    TileKind("int8", "int32", 64, TileDot.SIGNED),
)


def multiply_kinds(caps: Capabilities) -> list[MultiplyKind | TileKind]:
    """The fastest instruction of a machine for each type of operands."""
    found: dict[str, MultiplyKind | TileKind] = {k.operands: k for k in MULTIPLY_KINDS if k.usable(caps)}
    if caps.tiles is not TileUnit.NONE:
        found.update({k.operands: k for k in TILE_KINDS})
    return list(found.values())


def multiply_kernel(kind: MultiplyKind | TileKind, caps: Capabilities) -> Any:
    """TIR of (operands int32[2, lanes], out dtype[threads, lanes], rounds int64): the loop, in every thread."""
    if isinstance(kind, TileKind):
        return _tile_kernel(kind, caps)
    lanes, threads = caps.lanes_f32, caps.threads
    built: list[Any] = []
    with e.kernel(built):
        operands = e.tensor("operands", (2, lanes), "int32")
        out = e.tensor("out", (threads, lanes), kind.dtype)
        rounds = e.scalar_arg("rounds")
        with e.root():
            inputs, results = e.flat(operands, 2 * lanes), e.flat(out, threads * lanes)
            with e.parallel(threads, caps) as thread:
                sums = e.scratch(CHAINS * lanes, kind.dtype)
                a, b = (e.let(e.load(inputs, i * lanes, lanes)) for i in range(2))
                zero = e.splat(0.0, lanes) if kind.dtype == "float32" else e.const("int32", 0, lanes)
                for chain in range(CHAINS):
                    e.store(sums, chain * lanes, zero, lanes)
                with e.loop(rounds):
                    for _ in range(UNROLL):
                        for chain in range(CHAINS):
                            acc = e.load(sums, chain * lanes, lanes)
                            e.store(sums, chain * lanes, kind.apply(acc, a, b, lanes), lanes)
                total = e.load(sums, 0, lanes)
                for chain in range(1, CHAINS):
                    total = e.let(total + e.load(sums, chain * lanes, lanes))
                e.store(results, thread * lanes, total, lanes)
    return built[0]


def _tile_kernel(kind: TileKind, caps: Capabilities) -> Any:
    """multiply_kernel on tiles whose rows all hold the operands; the sum of four tiles' first rows comes out."""
    lanes, threads = caps.lanes_f32, caps.threads
    built: list[Any] = []
    with e.kernel(built):
        operands = e.tensor("operands", (2, lanes), "int32")
        out = e.tensor("out", (threads, lanes), kind.dtype)
        rounds = e.scalar_arg("rounds")
        with e.root():
            inputs, results = e.flat(operands, 2 * lanes), e.flat(out, threads * lanes)
            tiles = Tiles(caps, (4, 5), (6, 7))
            with tiles.launch(threads, "") as thread:
                memory = e.workspace(_TILE_SUMS * ELEMENTS, kind.dtype)
                for tile in range(_TILE_SUMS):
                    tiles.zero(tile)
                    # a stride of nothing: the same row sixteen times
                    tiles.load(4 + tile, inputs, tile // 2 * lanes, 0)
                with e.loop(rounds):
                    for _ in range(UNROLL):
                        for tile in range(_TILE_SUMS):
                            tiles.dot(kind.dot, tile, 4 + tile // 2, 6 + tile % 2)
                for tile in range(_TILE_SUMS):
                    tiles.store(tile, memory, tile * ELEMENTS)
                total = e.load(memory, 0, ROWS)
                for tile in range(1, _TILE_SUMS):
                    total = e.let(total + e.load(memory, tile * ELEMENTS, ROWS))
                e.store(results, thread * lanes, total, ROWS)
    return built[0]


def read_kernel(caps: Capabilities) -> Any:
    """TIR of (source int32[n], out int32[threads, lanes]): reads all of it, each thread one contiguous part.

    n must be a multiple of threads * STREAMS * lanes.
    """
    lanes, threads = caps.lanes_f32, caps.threads
    built: list[Any] = []
    with e.kernel(built):
        size = e.dim("n")
        source = e.tensor("source", (size,), "int32")
        out = e.tensor("out", (threads, lanes), "int32")
        with e.root():
            results = e.flat(out, threads * lanes)
            step = STREAMS * lanes
            with e.parallel(threads, caps) as thread:
                sums = e.scratch(step, "int32")
                for stream in range(STREAMS):
                    e.store(sums, stream * lanes, e.const("int32", 0, lanes), lanes)
                count = e.let(size // (threads * step))
                with e.loop(count) as i:
                    at = e.let((thread * count + i) * step)
                    for stream in range(STREAMS):
                        value = e.load(sums, stream * lanes, lanes) + e.load(
                            source, at + stream * lanes, lanes
                        )
                        e.store(sums, stream * lanes, value, lanes)
                total = e.load(sums, 0, lanes)
                for stream in range(1, STREAMS):
                    total = e.let(total + e.load(sums, stream * lanes, lanes))
                e.store(results, thread * lanes, total, lanes)
    return built[0]
