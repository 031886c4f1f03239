"""The simulator: right numbers for right kernels, and a sentence for each kind of wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules import emit as e
from llmc.schedules.gpu import emit as g
from llmc.simulate import SimulationError, simulate
from llmc.targets import simt

THREADS = 64


def lowered(func: Any) -> Any:
    """A kernel as the simulator takes it."""
    host = {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu"}
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host=host)
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return simt.lower(module, target)["main"]


def kernel(
    body: Callable[[Any, Any, Any, Any, Any], None],
    dtype: str = "float32",
    threads: int = THREADS,
    width: int = 64,
) -> Any:
    """x[T, width], y[T, width]; one block per row runs body(x, y, row, thread, T)."""
    built: list[Any] = []
    with e.kernel(built):
        t = e.dim("T")
        x, y = g.tensor("x", [t, width], dtype), g.tensor("y", [t, width], "float32")
        with e.root():
            xf, yf = e.flat(x, t * width), e.flat(y, t * width)
            with g.launch(t, threads) as (block, thread):
                body(xf, yf, block, thread, t)
    return lowered(built[0])


def run(func: Any, x: np.ndarray) -> np.ndarray:
    y = np.zeros(x.shape, np.float32)
    simulate(func, [x, y])
    return y


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)


def reverse(x: Any, y: Any, row: Any, thread: Any, meet: bool = True) -> None:
    line = g.shared(THREADS)
    e.store(line, thread, x[row * 64 + thread], 1)
    if meet:
        g.barrier()
    e.store(y, row * 64 + thread, line[63 - thread], 1)


def test_exchange_through_shared_memory(x: np.ndarray) -> None:
    func = kernel(lambda x, y, row, thread, t: reverse(x, y, row, thread))
    np.testing.assert_array_equal(run(func, x), x[:, ::-1])


def test_a_missing_barrier_is_a_race(x: np.ndarray) -> None:
    func = kernel(lambda x, y, row, thread, t: reverse(x, y, row, thread, meet=False))
    with pytest.raises(SimulationError) as caught:
        run(func, x)
    text = str(caught.value)
    assert caught.value.ref == "simulate-race"
    assert (
        "read by block 0, thread" in text and "written by block 0, thread" in text and "line" not in text[:5]
    )
    low, high = sorted(caught.value.context["threads"])
    assert low + high == 63  # the two that exchange


def test_a_barrier_too_few_in_a_loop_is_a_race(x: np.ndarray) -> None:
    def body(x: Any, y: Any, row: Any, thread: Any, t: Any, last: bool) -> None:
        line = g.shared(THREADS)
        with e.loop(3) as i:
            e.store(line, thread, x[row * 64 + thread] * T.Cast("float32", i), 1)
            g.barrier()
            e.store(y, row * 64 + thread, line[63 - thread], 1)
            if last:
                g.barrier()

    np.testing.assert_array_equal(run(kernel(lambda *a: body(*a, last=True)), x), 2 * x[:, ::-1])
    with pytest.raises(SimulationError, match="simulate-race"):
        run(kernel(lambda *a: body(*a, last=False)), x)


def test_two_blocks_that_write_one_address_are_a_race(x: np.ndarray) -> None:
    func = kernel(lambda x, y, row, thread, t: e.store(y, thread, x[row * 64 + thread], 1))
    with pytest.raises(SimulationError, match=r"Global buffer y.*block 0, thread"):
        run(func, x)


def test_one_address_written_by_many_threads_is_a_race(x: np.ndarray) -> None:
    func = kernel(lambda x, y, row, thread, t: e.store(y, row * 64, x[row * 64 + thread], 1))
    with pytest.raises(SimulationError, match="simulate-race"):
        run(func, x)


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_reduction_with_shuffles(x: np.ndarray, threads: int) -> None:
    def body(x: Any, y: Any, row: Any, thread: Any, t: Any) -> None:
        scratch = g.shared(max(1, threads // 32))
        total = g.local(1)
        e.store(total, 0, e.f32(0.0), 1)
        g.strided(thread, 64, threads, lambda i: e.store(total, 0, total[0] + x[row * 64 + i], 1))
        g.block_reduce(total, scratch, thread, threads, g.add)
        g.strided(thread, 64, threads, lambda i: e.store(y, row * 64 + i, total[0], 1))

    y = run(kernel(body, threads=threads), x)
    np.testing.assert_allclose(y, np.repeat(x.sum(1, keepdims=True), 64, 1), rtol=1e-5)


def test_a_warp_barrier_orders_a_warp_and_no_more(x: np.ndarray) -> None:
    def body(x: Any, y: Any, row: Any, thread: Any, t: Any, distance: int) -> None:
        line = g.shared(THREADS)
        e.store(line, thread, x[row * 64 + thread], 1)
        g.warp_barrier()
        e.store(y, row * 64 + thread, line[T.bitwise_xor(thread, distance)], 1)

    order = np.arange(64) ^ 5
    np.testing.assert_array_equal(run(kernel(lambda *a: body(*a, distance=5)), x), x[:, order])
    with pytest.raises(SimulationError, match="simulate-race"):
        run(kernel(lambda *a: body(*a, distance=32)), x)


def test_out_of_bounds(x: np.ndarray) -> None:
    func = kernel(lambda x, y, row, thread, t: e.store(y, row * 64 + thread, x[row * 64 + thread + 1], 1))
    with pytest.raises(SimulationError, match="block 4, thread 63 accesses element 320 of x, which has 320"):
        run(func, x)


def test_a_guard_keeps_threads_out(x: np.ndarray) -> None:
    def body(x: Any, y: Any, row: Any, thread: Any, t: Any) -> None:
        with g.when(thread < 63):
            e.store(y, row * 64 + thread, x[row * 64 + thread + 1], 1)

    y = run(kernel(body), x)
    np.testing.assert_array_equal(y[:, :63], x[:, 1:])
    assert not y[:, 63].any()


def test_a_barrier_that_some_threads_miss(x: np.ndarray) -> None:
    def body(x: Any, y: Any, row: Any, thread: Any, t: Any) -> None:
        with g.when(thread < 40):
            g.barrier()
        e.store(y, row * 64 + thread, x[row * 64 + thread], 1)

    with pytest.raises(SimulationError, match="40 of 64 threads of block 0 reach a barrier"):
        run(kernel(body), x)


def test_a_shuffle_from_a_thread_that_is_elsewhere(x: np.ndarray) -> None:
    def body(x: Any, y: Any, row: Any, thread: Any, t: Any) -> None:
        with g.when(thread < 16):
            e.store(y, row * 64 + thread, g.across(x[row * 64 + thread], 16), 1)

    with pytest.raises(SimulationError, match="simulate-shuffle"):
        run(kernel(body), x)


def test_vectors_of_bf16_and_their_alignment() -> None:
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(ml_dtypes.bfloat16)

    def body(x: Any, y: Any, row: Any, thread: Any, t: Any, shift: int) -> None:
        values = e.let(e.load(x, row * 64 + thread * 8 + shift, 8))
        for i in range(8):
            one = e.let(e.widen(tirx.Shuffle([values], [i]), "bfloat16", 1))
            e.store(y, row * 64 + thread * 8 + i, one * e.f32(2.0), 1)

    y = run(kernel(lambda *a: body(*a, shift=0), "bfloat16", threads=8), x)
    np.testing.assert_array_equal(y, 2 * x.astype(np.float32))
    with pytest.raises(SimulationError, match="16 bytes of x at byte 2, which is no multiple of 16"):
        run(kernel(lambda *a: body(*a, shift=1), "bfloat16", threads=7), x)


def test_threads_that_leave_a_loop_early(x: np.ndarray) -> None:
    def body(x: Any, y: Any, row: Any, thread: Any, t: Any) -> None:
        total = g.local(1)
        e.store(total, 0, e.f32(0.0), 1)
        with e.loop(T.Cast("int64", thread) + 1) as i:
            e.store(total, 0, total[0] + x[row * 64 + i], 1)
        e.store(y, row * 64 + thread, total[0], 1)

    np.testing.assert_allclose(run(kernel(body), x), np.cumsum(x, 1), rtol=2e-4, atol=1e-5)


def test_registers_that_were_never_written_are_nan(x: np.ndarray) -> None:
    def body(x: Any, y: Any, row: Any, thread: Any, t: Any) -> None:
        total = g.local(1)
        e.store(y, row * 64 + thread, total[0] + x[row * 64 + thread], 1)

    assert np.isnan(run(kernel(body), x)).all()
