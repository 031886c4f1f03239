"""Words for matrix units that four warps feed together from shared memory (PTX ISA, "Asynchronous warpgroup level matrix
multiply-accumulate": wgmma.mma_async).

Operands lie in pieces of 8 rows by 16 bytes, 128 consecutive bytes each, without swizzling: the layout of packed weights
(schedules/layout.py). A descriptor says where the first piece is, and how far the next ones are: `leading` bytes along the
columns, `stride` bytes along the rows.
llmc/simulate/warpgroup.py holds a model of each word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules.gpu import emit as g

WARPGROUP = 128  # threads
ROWS = 64  # of the left operand
STEP_BYTES = 32  # of a row that one instruction multiplies: two pieces
PIECE_BYTES = 128
UNIT = 16  # bytes that an address in a descriptor counts


@dataclass(frozen=True)
class Kind:
    """Types of an instruction.

    Attributes:
        name: of the operands' type.
        sums: type of the sums in TIR; in PTX `ptx_sums`, held in registers of `constraint`.
        options: operands behind the predicate: signs of both operands, and whether they are transposed.
    """

    name: str
    sums: str
    ptx_sums: str
    constraint: str
    options: str
    columns: int  # elements in STEP_BYTES


KINDS = {
    "bfloat16": Kind("bf16", "float32", "f32", "f", ", 1, 1, 0, 0", 16),
    "float16": Kind("f16", "float32", "f32", "f", ", 1, 1, 0, 0", 16),
    "int8": Kind("s8", "int32", "s32", "r", "", 32),
    "e4m3": Kind("e4m3", "float32", "f32", "f", ", 1, 1", 32),
}

_DESCRIPTOR = """
__device__ __forceinline__ unsigned long long llmc_descriptor(const void* first, int leading, int stride) {
  unsigned long long address = (unsigned)__cvta_generic_to_shared(first);
  return (address & 0x3FFFF) >> 4 | (unsigned long long)(leading >> 4) << 16 | (unsigned long long)(stride >> 4) << 32;
}
"""
_FENCE = """
__device__ __forceinline__ void llmc_matrix_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
"""
_COMMIT = """
__device__ __forceinline__ void llmc_matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
"""
_WAIT = """
__device__ __forceinline__ void llmc_matrix_wait_%d() { asm volatile("wgmma.wait_group.sync.aligned %d;" ::: "memory"); }
"""


def registers_of(columns: int) -> int:
    """Sums that each thread holds of 64 rows by so many columns."""
    return ROWS * columns // WARPGROUP


def descriptor(first: Any, leading: int, stride: int) -> Any:
    """uint64; addresses are added to it in units of 16 bytes."""
    return g.device_call(
        "llmc_descriptor", _DESCRIPTOR, first, g.i32(leading), g.i32(stride), result="uint64"
    )


def fence() -> None:
    """Before the first product after the sums' registers were used otherwise."""
    T.evaluate(g.device_call("llmc_matrix_fence", _FENCE))


def commit() -> None:
    """The products since the last commit become a group."""
    T.evaluate(g.device_call("llmc_matrix_commit", _COMMIT))


def wait(groups: int) -> None:
    """Until all but the last `groups` groups have read their operands and added their products up."""
    T.evaluate(g.device_call(f"llmc_matrix_wait_{groups}", _WAIT % (groups, groups)))


def wait_for(sums: Any, columns: int, dtype: str) -> None:
    """Until all products are there; only behind it may the sums be read."""
    kind, count = KINDS[dtype], registers_of(columns)
    operands = ", ".join(f'"+{kind.constraint}"(d[{i}])' for i in range(count))
    name = f"llmc_matrix_results_{kind.ptx_sums}_{count}"
    pointer = "float" if kind.constraint == "f" else "int"
    source = (
        f"\n__device__ __forceinline__ void {name}({pointer}* d) {{\n"
        f'  asm volatile("wgmma.wait_group.sync.aligned 0;" : {operands} :: "memory");\n}}\n'
    )
    T.evaluate(g.device_call(name, source, g.address(sums, 0)))


def mma_across(sums: Any, left: Any, right: Any, add: Any, columns: int, dtype: str) -> None:
    """sums (float32 [64, columns], as in mma) = left [64, 16] x right [16, columns] of 16-bit numbers.

    `right` lies with neighbouring columns side by side ("MN-major"): a piece of 128 bytes holds 8 of its rows by 8 columns, one
    row after the other. Its descriptor's `leading` bytes lie between pieces of 8 rows, `stride` between pieces of 8 columns.

    Args:
        left: a descriptor, or four registers (uint32) per thread: rows and columns as of the first operand of
            mma.m16n8k16, 16 rows for each of the four warps.
    """
    kind, count = KINDS[dtype], registers_of(columns)
    held = isinstance(left, list)
    name = f"llmc_wgmma_{kind.name}_{columns}_{'held' if held else 'across'}"
    shape = f"m{ROWS}n{columns}k{kind.columns}.{kind.ptx_sums}.{kind.name}.{kind.name}"
    numbers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    words = 4 if held else 1
    lefts = ", ".join(f"%{count + i}" for i in range(words))
    declared = ", ".join(f"unsigned a{i}" for i in range(4)) if held else "unsigned long long left"
    given = ", ".join(f'"r"(a{i})' for i in range(4)) if held else '"l"(left)'
    source = f"""
__device__ __forceinline__ void {name}(float* d, {declared}, unsigned long long right, int add) {{
  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{count + words + 1}, 0; wgmma.mma_async.sync.aligned.{shape} "
    "{{{numbers}}}, {"{" + lefts + "}" if held else lefts}, %{count + words}, p, 1, 1, {"1" if held else "0, 1"}; }}"
    : {operands}
    : {given}, "l"(right), "r"(add));
}}
"""
    arguments = left if held else [left]
    T.evaluate(g.device_call(name, source, g.address(sums, 0), *arguments, right, g.i32(add)))


def mma(sums: Any, left: Any, right: Any, add: Any, columns: int, dtype: str) -> None:
    """sums (float32 or int32 [64, columns], over 128 threads) = left [64, 32 bytes] x right [columns, 32 bytes]^T.

    Thread t of the warpgroup holds of rows 16 (t / 32) + t % 32 / 4 and 8 further, in each piece j of 8 columns, columns
    2 (t % 4) and the next: sums[4 j + 0..1] and sums[4 j + 2..3].

    Args:
        left, right: descriptors.
        add: whether the products are added to the sums, or replace them.
        columns: a multiple of 8 up to 256.
    """
    kind, count = KINDS[dtype], registers_of(columns)
    name = f"llmc_wgmma_{kind.name}_{columns}"
    pointer = "float" if kind.constraint == "f" else "int"
    shape = f"m{ROWS}n{columns}k{kind.columns}.{kind.ptx_sums}.{kind.name}.{kind.name}"
    numbers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+{kind.constraint}"(d[{i}])' for i in range(count))
    source = f"""
__device__ __forceinline__ void {name}(
    {pointer}* d, unsigned long long left, unsigned long long right, int add) {{
  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0; wgmma.mma_async.sync.aligned.{shape} "
    "{{{numbers}}}, %{count}, %{count + 1}, p{kind.options}; }}"
    : {operands}
    : "l"(left), "l"(right), "r"(add));
}}
"""
    T.evaluate(g.device_call(name, source, g.address(sums, 0), left, right, g.i32(add)))


__all__ = [
    "KINDS",
    "PIECE_BYTES",
    "ROWS",
    "STEP_BYTES",
    "UNIT",
    "WARPGROUP",
    "commit",
    "descriptor",
    "fence",
    "mma",
    "mma_across",
    "registers_of",
    "wait",
    "wait_for",
]
