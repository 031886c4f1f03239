"""Words for the matrix units: asynchronous copies to shared memory, ldmatrix, mma (PTX ISA, "Warp-level matrix
instructions").

Each is a device function given as source. llmc/simulate/intrinsics.py holds a model of each, under the same name.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules.gpu import emit as g

_COPY = """
__device__ __forceinline__ void llmc_copy16(void* to, const void* from, int bytes) {
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(address), "l"(from), "r"(bytes) : "memory");
}
"""
_COMMIT = """
__device__ __forceinline__ void llmc_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
"""
_WAIT = """
__device__ __forceinline__ void llmc_copy_wait_%d() { asm volatile("cp.async.wait_group %d;" ::: "memory"); }
"""
_LOAD = """
__device__ __forceinline__ void llmc_ldmatrix_x4(unsigned* to, const void* from) {
  unsigned address = (unsigned)__cvta_generic_to_shared(from);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
"""
_LOAD_TRANSPOSED = _LOAD.replace("llmc_ldmatrix_x4", "llmc_ldmatrix_x4_trans").replace(
    ".x4.shared", ".x4.trans.shared"
)
_MMA = """
__device__ __forceinline__ void llmc_mma_NAME(
    float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 "
    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""
_MMA_BYTES = """
__device__ __forceinline__ void llmc_mma_s8(
    int* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""
_MMA_E4M3 = """
__device__ __forceinline__ void llmc_mma_e4m3(
    float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""
_TYPES = {"bfloat16": "bf16", "float16": "f16"}


def copy16(to: Any, to_index: Any, source: Any, source_index: Any, valid: Any) -> None:
    """Begin to copy 16 bytes from global to shared memory; zeros if not `valid` (the source must exist all the same)."""
    size = g.i32(16) if valid is True else T.Select(valid, g.i32(16), g.i32(0))
    target, origin = g.address(to, to_index), g.address(source, source_index)
    T.evaluate(g.device_call("llmc_copy16", _COPY, target, origin, size))


def commit() -> None:
    """The thread's copies since the last commit become a group."""
    T.evaluate(g.device_call("llmc_copy_commit", _COMMIT))


def wait(groups: int) -> None:
    """Until all but the last `groups` groups of the thread have arrived; a barrier makes them visible to the others."""
    T.evaluate(g.device_call(f"llmc_copy_wait_{groups}", _WAIT % (groups, groups)))


def load_x4(to: Any, source: Any, index: Any, transposed: bool = False) -> None:
    """Four 8 x 8 matrices of 16 bits from shared memory to registers to[0..3] (uint32).

    Thread i gives the address of row i % 8 of matrix i / 8, and gets elements 2 (i % 4) and the next of row i / 4 of each
    (of column i / 4, if transposed).
    """
    name, text = ("llmc_ldmatrix_x4_trans", _LOAD_TRANSPOSED) if transposed else ("llmc_ldmatrix_x4", _LOAD)
    T.evaluate(g.device_call(name, text, g.address(to, 0), g.address(source, index)))


def ones(dtype: str) -> Any:
    """A register of an operand that is 1 everywhere."""
    return g.u32({"bfloat16": 0x3F803F80, "float16": 0x3C003C00}[dtype])


def mma(acc: Any, a: Any, b: Any, first: int, dtype: str) -> None:
    """acc[0..3] (float32) += A [16, 16] x B [16, 8]; A in a[0..3], B in b[first..first + 1] (uint32)."""
    name = _TYPES[dtype]
    source = _MMA.replace("NAME", name).replace("TYPE", name)
    args = [a[0], a[1], a[2], a[3], b[first], b[first + 1]]
    T.evaluate(g.device_call(f"llmc_mma_{name}", source, g.address(acc, 0), *args))


def mma_bytes(acc: Any, a: list[Any], b: list[Any]) -> None:
    """acc[0..3] (int32) += A [16, 32] x B [32, 8] of signed bytes; four of them in each of a[0..3] and b[0..1] (uint32)."""
    T.evaluate(g.device_call("llmc_mma_s8", _MMA_BYTES, g.address(acc, 0), *a, *b))


def mma_e4m3(acc: Any, a: list[Any], b: list[Any]) -> None:
    """acc[0..3] (float32) += A [16, 32] x B [32, 8] of e4m3 numbers, which lie as in mma_bytes."""
    T.evaluate(g.device_call("llmc_mma_e4m3", _MMA_E4M3, g.address(acc, 0), *a, *b))


__all__ = ["commit", "copy16", "load_x4", "mma", "mma_bytes", "mma_e4m3", "ones", "wait"]
