"""What a target machine can do. Passes and schedules ask these; they never ask for a target's name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ByteDot(str, Enum):
    """How products of bytes are summed in 32-bit lanes."""

    NONE = "none"  # by plain arithmetic
    WORDS = "words"  # two products of 16-bit words (vpmaddwd)
    UNSIGNED_SIGNED = "u8s8"  # four products of an unsigned and a signed byte (vpdpbusd)
    SIGNED = "s8s8"  # four products of signed bytes (sdot)


class TileUnit(str, Enum):
    """What multiplies tiles of two matrices held in tile registers: 8 of 16 rows by 64 bytes."""

    NONE = "none"
    AMX = "amx"  # tdpbf16ps, tdpb[su][su]d
    EMULATED = "emulated"  # the same operations on memory, for machines without the unit: tests of kernels


class Fp8Mma(str, Enum):
    """What becomes of a product of tiles of e4m3 numbers (mma.m16n8k32) that a warp makes from registers."""

    NONE = "none"  # there is no such instruction
    EXPANDED = "expanded"  # the assembler makes products of float16 of it: exact, and no faster than those
    UNITS = "units"  # matrix units multiply them


@dataclass(frozen=True)
class Capabilities:
    """Facts about the machine that the code is generated for.

    Attributes:
        target: name of the target folder, for messages and the manifest only.
        preset: the resolved preset, e.g. ``cpu/x86-64-v4``.
        triple: LLVM target triple.
        mcpu: LLVM processor name.
        mattr: extra LLVM features, each with its sign, e.g. ``+avx512bf16``.
        features: what the running machine must have, in /proc/cpuinfo's names; checked when loading.
        vector_bytes: width of a vector register.
        vector_registers: how many there are.
        has_bf16_dot: 2-way bf16 dot product with float32 accumulation, of a register's width (vdpbf16ps, bfdot).
        has_bf16_mma: products of 2 x 4 tiles of bf16 with float32 accumulation (bfmmla).
        has_f16_fma: products of eight float16 that are added to float32 (fmlal).
        has_byte_mma: products of 2 x 8 tiles of signed bytes with 32-bit accumulation (smmla).
        has_lane_operands: a product may take one lane of a register for all lanes (sdot and fmla by element), and bytes
            are shifted; registers of 16 bytes.
        has_lookup: a register can be permuted by another one (vpermps, vpermw, tbl): small tables are one instruction.
        byte_dot: the best integer dot product of bytes.
        tiles: the unit that multiplies tiles of bf16 and of bytes.
        threads: worker threads that default schedules are sized for.
        simt: kernels are blocks of threads with shared memory; else loops over worker threads.
        shared_bytes: most shared memory of a block.
        multiprocessors: how many blocks run at a time, at least; default schedules spread work over so many.
        has_mma_f16, has_mma_bf16: matrix units with float32 accumulation for that type (mma.m16n8k16).
        has_mma_bytes: matrix units for signed bytes with int32 sums (mma.m16n8k32).
        fp8_mma: the same for e4m3 numbers with float32 sums.
        has_wgmma: matrix units that four warps feed from shared memory, with barriers that count and copies in bulk (wgmma,
            mbarrier, cp.async.bulk); also for e4m3.
        has_async_copy: copies to shared memory that do not pass through registers (cp.async).
    """

    target: str
    preset: str
    triple: str
    mcpu: str
    mattr: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    vector_bytes: int = 16
    vector_registers: int = 16
    has_bf16_dot: bool = False
    has_bf16_mma: bool = False
    has_f16_fma: bool = False
    has_byte_mma: bool = False
    has_lane_operands: bool = False
    has_lookup: bool = False
    byte_dot: ByteDot = ByteDot.NONE
    tiles: TileUnit = TileUnit.NONE
    threads: int = 2
    simt: bool = False
    shared_bytes: int = 0
    multiprocessors: int = 0
    has_mma_f16: bool = False
    has_mma_bf16: bool = False
    has_mma_bytes: bool = False
    has_async_copy: bool = False
    has_wgmma: bool = False
    fp8_mma: Fp8Mma = Fp8Mma.NONE

    @property
    def lanes_f32(self) -> int:
        """float32 elements in a vector register."""
        return self.vector_bytes // 4
