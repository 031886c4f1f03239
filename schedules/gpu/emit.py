"""Words to write block-and-thread TIR with, beside those of schedules/emit.py.

A kernel writes its barriers itself: nothing is inserted behind its back (llmc/targets/simt.py), and the simulator
(llmc/simulate) finds a barrier that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.caps import Capabilities
from llmc.schedules import emit as e

WARP = 32


@contextmanager
def launch(grid: Any, threads: int) -> Iterator[tuple[Any, Any]]:
    """A launch of `grid` blocks of `threads` threads: (block as int64, thread as int32)."""
    with (
        T.launch_thread("blockIdx.x", e.i64(grid)) as block,
        T.launch_thread("threadIdx.x", threads) as thread,
    ):
        yield block, thread


def at_most_one_block() -> Any:
    """The launch of the body has a multiprocessor to itself: its threads may take all registers of one."""
    return T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 1)


def named(name: str, buffer: Any) -> Any:
    """The buffer with a name, for the generated source and the simulator's messages."""
    return IRBuilder.name(name, buffer)


def tensor(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """Declare a tensor argument, as emit.tensor does, with its name."""
    return named(name, e.tensor(name, shape, dtype))


def shared(size: int, dtype: str = "float32", name: str = "shared") -> Any:
    """Memory that the threads of a block share."""
    return named(name, T.alloc_buffer((size,), dtype, scope="shared"))


def arena(size: int) -> Any:
    """The kernel's dynamic shared memory, `size` bytes of it as uint16: one per kernel, and more than 48 KB if need be.

    The call tells of its size in the generated source (targets/cuda/build.py), where nothing else does.
    """
    T.evaluate(device_call("llmc_dynamic_shared", _DYNAMIC_SHARED, i32(size)))
    return named("arena", T.alloc_buffer((size // 2,), "uint16", scope="shared.dyn"))


_DYNAMIC_SHARED = """
__device__ __forceinline__ void llmc_dynamic_shared(int bytes) {}
"""


def local(size: int, dtype: str = "float32") -> Any:
    """Registers of a thread; index it with constants only, else it goes to memory."""
    return T.alloc_buffer((size,), dtype, scope="local")


def held(value: Any) -> Any:
    """A value that is computed once, in a register.

    A name (emit.let) alone does not say so: TVM's simplifier writes what stands behind it into every use, and a division
    of 64 bits in each address of a loop is more than the device's compiler takes out again.
    """
    register = local(1, str(value.ty.dtype))
    e.store(register, 0, value, 1)
    return register[0]


def barrier() -> None:
    """All threads of the block meet."""
    T.evaluate(T.tvm_storage_sync("shared"))


_WARP_BARRIER = """
__device__ __forceinline__ void llmc_warp_barrier() { __syncwarp(); }
"""


def warp_barrier() -> None:
    """All threads of the warp meet, and see what the others wrote before.

    TVM's own storage sync of scope "warp" becomes no instruction at all.
    """
    T.evaluate(device_call("llmc_warp_barrier", _WARP_BARRIER))


_DEVICE_FENCE = """
__device__ __forceinline__ void llmc_device_fence() { __threadfence(); }
"""


def device_fence() -> None:
    """What the thread wrote to global memory is there for all that is read on the device later, past all caches."""
    T.evaluate(device_call("llmc_device_fence", _DEVICE_FENCE))


def i32(value: Any) -> Any:
    """An int32 expression."""
    if isinstance(value, int):
        return tirx.IntImm("int32", value)
    return value if str(value.ty.dtype) == "int32" else tirx.Cast("int32", value)


def u32(value: int) -> Any:
    """An uint32 constant."""
    return tirx.IntImm("uint32", value)


def elements(vector: Any, count: int) -> list[Any]:
    """The elements of a vector."""
    return [e.let(tirx.Shuffle([vector], [i])) for i in range(count)]


def across(value: Any, offset: int) -> Any:
    """The value of the thread whose number in the warp differs in the bit `offset`."""
    return T.tvm_warp_shuffle_xor(tirx.IntImm("uint32", 0xFFFFFFFF), value, offset, WARP, WARP)


def from_first(value: Any) -> Any:
    """The value of the warp's first thread."""
    return T.tvm_warp_shuffle(tirx.IntImm("uint32", 0xFFFFFFFF), value, 0, WARP, WARP)


def warp_reduce(register: Any, op: Callable[[Any, Any], Any], first: int = WARP // 2, last: int = 1) -> None:
    """Combine register[0] over threads whose numbers differ in the bits first..last; all of them get the result."""
    offset = first
    while offset >= last:
        other = e.let(across(register[0], offset))
        e.store(register, 0, op(register[0], other), 1)
        offset //= 2


def block_reduce(
    register: Any, scratch: Any, thread: Any, threads: int, op: Callable[[Any, Any], Any], again: bool = False
) -> None:
    """Combine register[0] over the threads of a block; all get the result.

    Args:
        scratch: shared memory of threads / 32 elements; its earlier content is not used.
        again: scratch was used before, and its readers may still be at it.
    """
    warp_reduce(register, op)
    warps = threads // WARP
    if warps == 1:
        return
    if again:
        barrier()
    with T.If(thread % WARP == 0), T.Then():
        e.store(scratch, thread // WARP, register[0], 1)
    barrier()
    e.store(register, 0, scratch[0], 1)
    for w in range(1, warps):
        e.store(register, 0, op(register[0], scratch[w]), 1)


def add(a: Any, b: Any) -> Any:
    return a + b


def strided(first: Any, count: Any, step: int, body: Callable[[Any], None]) -> None:
    """body(i) for i = first, first + step, ... < count."""
    first = e.i64(first)
    with e.loop((e.i64(count) - first + (step - 1)) // step) as i:
        body(e.let(first + i * step))


def when(condition: Any) -> Any:
    """`with when(c):` executes the body where c holds."""

    @contextmanager
    def scope() -> Iterator[None]:
        with T.If(condition), T.Then():
            yield

    return scope()


_TO_BF16 = """
__device__ __forceinline__ unsigned short llmc_to_bf16(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
"""


_EXP2 = """
__device__ __forceinline__ float llmc_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
"""
_TANH = """
__device__ __forceinline__ float llmc_tanh(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 2.8853900817779268f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(y + 1.0f));
  return 1.0f - 2.0f * y;
}
"""


def exp2(value: Any) -> Any:
    """2^x in one instruction (error 2 ulp; 0 for very low x)."""
    return device_call("llmc_exp2", _EXP2, value, result="float32")


def tanh(value: Any) -> Any:
    """tanh(x) = 1 - 2 / (e^2x + 1), with an absolute error of a few 1e-7."""
    return device_call("llmc_tanh", _TANH, value, result="float32")


def narrow(value: Any, dtype: str, caps: Capabilities) -> Any:
    """float32 to `dtype` (bf16 as uint16 bits), rounded to nearest even; NaN stays NaN."""
    if dtype == "bfloat16" and caps.has_mma_bf16:  # such machines have the conversion too
        return device_call("llmc_to_bf16", _TO_BF16, value, result="uint16")
    return e.narrow(value, dtype, 1, caps)


def loop(count: Any) -> Any:
    """A serial loop over int32."""
    return T.serial(i32(count))


def address(buffer: Any, index: Any) -> Any:
    """The address of an element, for device functions."""
    return T.address_of(buffer[index])


_LOAD_WORDS = {
    1: """
__device__ __forceinline__ void llmc_load_words_1(unsigned* to, const void* from) {
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(to[0]) : "l"(__cvta_generic_to_global(from)));
}
""",
    2: """
__device__ __forceinline__ void llmc_load_words_2(unsigned* to, const void* from) {
  asm("ld.global.nc.v2.u32 {%0, %1}, [%2];"
    : "=r"(to[0]), "=r"(to[1]) : "l"(__cvta_generic_to_global(from)));
}
""",
    4: """
__device__ __forceinline__ void llmc_load_words_4(unsigned* to, const void* from) {
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
    : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(__cvta_generic_to_global(from)));
}
""",
}


def load_words(to: Any, at: int, source: Any, index: Any, count: int) -> None:
    """Registers to[at ...] (uint32) = `count` words (1, 2, 4) of global memory that no thread of the launch writes.

    They lie on a multiple of their size. TVM loads a vector as one only where it can prove that, which it cannot of an index
    that is held in a register.
    """
    name = f"llmc_load_words_{count}"
    T.evaluate(device_call(name, _LOAD_WORDS[count], address(to, at), address(source, index)))


def device_call(name: str, source: str, *args: Any, result: str = "void") -> Any:
    """Call of a device function that is given as CUDA source; llmc/simulate/intrinsics.py has its model."""
    return cuda_func_call(name, *args, source_code=source, return_type=result)
