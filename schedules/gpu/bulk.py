"""Words for bulk copies and for the barriers in shared memory that announce them (PTX ISA, "mbarrier", "cp.async.bulk").

A barrier counts arrivals of threads and bytes of copies; when all that it expects have come, its phase ends and the next one
begins. Phases are numbered from 0, and a wait names the lowest bit of the number of the phase that must have ended.

Copies in bulk and the warpgroup's matrix units are the "async proxy": what threads wrote to shared memory themselves (by a
store, or by copy16) they see only after async_fence() of the thread that wrote it.
llmc/simulate/bulk.py holds a model of each word.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules.gpu import emit as g

BARRIER_BYTES = 8

_ADDRESS = "(unsigned)__cvta_generic_to_shared"
_INIT = f"""
__device__ __forceinline__ void llmc_barrier_init(void* barrier, int arrivals) {{
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"({_ADDRESS}(barrier)), "r"(arrivals) : "memory");
}}
"""
_FENCE = """
__device__ __forceinline__ void llmc_async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
"""
_ARRIVE = f"""
__device__ __forceinline__ void llmc_barrier_arrive(void* barrier) {{
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"({_ADDRESS}(barrier)) : "memory");
}}
"""
_EXPECT = f"""
__device__ __forceinline__ void llmc_barrier_expect(void* barrier, int bytes) {{
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
    :: "r"({_ADDRESS}(barrier)), "r"(bytes) : "memory");
}}
"""
_WAIT = f"""
__device__ __forceinline__ void llmc_barrier_wait(void* barrier, int phase) {{
  unsigned address = {_ADDRESS}(barrier), done;
  do {{
    asm volatile("{{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }}"
      : "=r"(done) : "r"(address), "r"(phase) : "memory");
  }} while (!done);
}}
"""
_COPY = f"""
__device__ __forceinline__ void llmc_bulk_copy(void* to, const void* from, int bytes, void* barrier) {{
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
    :: "r"({_ADDRESS}(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"({_ADDRESS}(barrier)) : "memory");
}}
"""
_REGISTERS = """
__device__ __forceinline__ void llmc_registers_HOW_COUNT() { asm volatile("setmaxnreg.HOW.sync.aligned.u32 COUNT;"); }
"""


def init(barrier: Any, arrivals: int) -> None:
    """Make a barrier (an address): every phase takes so many arrivals. Then async_fence() and a barrier of the block."""
    T.evaluate(g.device_call("llmc_barrier_init", _INIT, barrier, g.i32(arrivals)))


def async_fence() -> None:
    """What the thread has written to shared memory so far becomes visible to bulk copies and warpgroup matrix units."""
    T.evaluate(g.device_call("llmc_async_fence", _FENCE))


def arrive(barrier: Any) -> None:
    """One arrival."""
    T.evaluate(g.device_call("llmc_barrier_arrive", _ARRIVE, barrier))


def expect(barrier: Any, count: Any) -> None:
    """One arrival, and so many bytes of copies that the phase waits for."""
    T.evaluate(g.device_call("llmc_barrier_expect", _EXPECT, barrier, g.i32(count)))


def wait(barrier: Any, phase: Any) -> None:
    """Until the phase whose number has this lowest bit has ended; a new barrier counts as having ended one of bit 1."""
    T.evaluate(g.device_call("llmc_barrier_wait", _WAIT, barrier, g.i32(phase)))


def copy(to: Any, source: Any, count: Any, barrier: Any) -> None:
    """Begin to copy bytes (addresses and count: multiples of 16) from global to shared memory; the barrier counts them."""
    T.evaluate(g.device_call("llmc_bulk_copy", _COPY, to, source, g.i32(count), barrier))


def set_registers(count: int, more: bool) -> None:
    """Give registers back (more = False) or take some: the warpgroup has `count` per thread from here on.

    All its warps must execute it, in a launch of a known number of registers (at_most_one_block).
    """
    how = "inc" if more else "dec"
    source = _REGISTERS.replace("HOW", how).replace("COUNT", str(count))
    T.evaluate(g.device_call(f"llmc_registers_{how}_{count}", source))


__all__ = ["BARRIER_BYTES", "arrive", "async_fence", "copy", "expect", "init", "set_registers", "wait"]
