"""The matmul on warpgroups' matrix units in the simulator: numbers, and that each of its waits and fences is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.caps import Capabilities
from llmc.schedules import emit as e
from llmc.schedules.gpu import bulk, warpgroup, warpgroup_gemm
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu.gemv import Operands
from llmc.schedules.gpu.linear import linear
from llmc.schedules.gpu.warpgroup_gemm import WarpgroupTile
from llmc.schedules.linear import LinearConfig
from llmc.simulate import SimulationError
from tests.simulate.gpu import DTYPES, SimulatedTools, gpu
from tests.simulate.test_gpu_kernels import ACTIVATIONS, _packed

TOOLS = SimulatedTools()
# two blocks of threads work through all tiles: each has several
CAPS = replace(gpu("sm_90a"), multiprocessors=2)
SMALL = WarpgroupTile(64, 4)


def only(cfg: LinearConfig, caps: Capabilities, tile: WarpgroupTile) -> Any:
    """The kernel by itself, for any number of rows."""
    built: list[Any] = []
    with e.kernel(built):
        ops = Operands(cfg, caps, e.dim("T"))
        with e.root():
            ops.view()
            warpgroup_gemm.gemm(ops, caps, tile)
    return built[0]


def check(func: Any, cfg: LinearConfig, rows: int) -> None:
    """Run a kernel and compare with numpy in float64."""
    rng, n = np.random.default_rng(0), cfg.n
    assert warpgroup_gemm.takes(cfg, CAPS)
    kernel = TOOLS.build(CAPS, k=func)["k"]
    outputs = 2 * n if cfg.gated else n
    weight, bias = (
        TOOLS.random(rng, (outputs, cfg.k), cfg.in_dtype),
        TOOLS.random(rng, (outputs,), cfg.in_dtype),
    )
    x, residual = TOOLS.random(rng, (rows, cfg.k), cfg.in_dtype), TOOLS.random(rng, (rows, n), cfg.in_dtype)
    y = TOOLS.tensor(np.full((rows, n), np.nan, DTYPES[cfg.out_dtype]))
    extra = [bias] * cfg.has_bias + [residual] * cfg.has_residual
    kernel(TOOLS.tensor(x), TOOLS.tensor(_packed(cfg, CAPS, weight)), *map(TOOLS.tensor, extra), y)
    sums = x.astype(np.float64) @ weight.astype(np.float64).T + (bias if cfg.has_bias else 0)
    act = ACTIVATIONS[cfg.activation]
    if cfg.gated:
        gate, other = sums[:, :n], sums[:, n:]
        sums = act(other) * gate if cfg.gate_second else act(gate) * other
    else:
        sums = act(sums)
    sums = sums + (residual if cfg.has_residual else 0)
    error = np.abs(y.numpy().astype(np.float64) - sums).max() / np.abs(sums).max()
    assert error < TOOLS.exact[cfg.out_dtype] / 2


CASES = [
    # tile, rows, n, k, types, options: tails of rows, columns and depth; more stages than there are, and fewer
    (SMALL, 200, 136, 336, "bfloat16", "bfloat16", {"has_bias": True, "has_residual": True}),
    (SMALL, 70, 72, 48, "float16", "float32", {"has_residual": True, "activation": "gelu_tanh"}),
    (SMALL, 130, 40, 64, "bfloat16", "bfloat16", {"gated": True, "activation": "silu", "has_bias": True}),
    (
        WarpgroupTile(64, 4, 1, 56, 168),
        65,
        64,
        128,
        "float16",
        "float16",
        {"gated": True, "gate_second": True},
    ),
]
WHOLE = [
    (warpgroup_gemm.WIDE, 200, 264, 640, "bfloat16", "bfloat16", {"has_bias": True}),
    (warpgroup_gemm.NARROW, 200, 264, 640, "float16", "float16", {"has_residual": True}),
    (warpgroup_gemm.WIDE, 140, 264, 64, "bfloat16", "bfloat16", {"gated": True, "activation": "silu"}),
]


@pytest.mark.parametrize(
    "case", [*CASES[1:3], *(pytest.param(c, marks=pytest.mark.slow) for c in [*WHOLE, *CASES])]
)
def test_numbers(case: tuple[Any, ...]) -> None:
    tile, rows, n, k, dtype, out_dtype, options = case
    cfg = LinearConfig(n, k, dtype, dtype, out_dtype, **options)
    check(only(cfg, CAPS, tile), cfg, rows)


CFG = LinearConfig(72, 320, "bfloat16", "bfloat16", "float32")


def run(patch: Callable[[pytest.MonkeyPatch], None] | None = None, tile: WarpgroupTile = SMALL) -> None:
    """The kernel for a matmul of several tiles, with something changed while it is built."""
    with pytest.MonkeyPatch.context() as context:
        if patch is not None:
            patch(context)
        func = only(CFG, CAPS, tile)
    check(func, CFG, 200)


def without(module: Any, name: str, which: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Leave out call number `which` of a word."""

    def patch(context: pytest.MonkeyPatch) -> None:
        original, calls = getattr(module, name), []

        def word(*args: Any) -> None:
            calls.append(0)
            if len(calls) - 1 != which:
                original(*args)

        context.setattr(module, name, word)

    return patch


def instead(module: Any, name: str, word: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Another word; it gets the one that there is first."""

    def patch(context: pytest.MonkeyPatch) -> None:
        original = getattr(module, name)
        context.setattr(module, name, lambda *args: word(original, *args))

    return patch


# what is wrong -> (how, what the simulator says)
WRONG: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    # the stages' barriers are made, but nobody knows that they are
    "no barrier behind the initialisation": (without(g, "barrier", 0), "not initialised for certain"),
    "no fence behind the initialisation": (without(bulk, "async_fence", 0), "not initialised for certain"),
    "x is not shown to the matrix units": (without(bulk, "async_fence", 1), "no async fence, between"),
    "one thread announces what others copied": (without(g, "warp_barrier", 1), "no async fence, between"),
    "x is announced before it has arrived": (
        instead(unit, "wait", lambda original, groups: original(groups + 1)),
        "simulate-race",
    ),
    "nobody waits for a free stage": (without(bulk, "wait", 0), "simulate-race"),
    "nobody waits for a filled stage": (without(bulk, "wait", 1), "simulate-(race|deadlock)"),
    "fewer bytes are expected than come": (
        instead(bulk, "expect", lambda original, barrier, count: original(barrier, count - 16)),
        "simulate-deadlock",
    ),
    "a product without a fence": (without(warpgroup, "fence", 0), "no matrix fence"),
    "products are not waited for": (without(warpgroup, "wait", 0), "simulate-race"),
}


FEW = ("x is not shown to the matrix units", "products are not waited for")
ALL = [pytest.param(w, marks=[] if w in FEW else [pytest.mark.slow]) for w in WRONG]


@pytest.mark.parametrize("what", ALL)
def test_a_slip_is_found(what: str) -> None:
    patch, said = WRONG[what]
    with pytest.raises(SimulationError, match=said):
        run(patch)


def wrong_start(original: Any, *args: Any) -> Any:
    return original(*args) + 1


# words that are replaced, and by what: an error, or numbers that are wrong; descriptors are decoded, so that an operand is
# what lies where they point to
CHANGED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "sums are read early": instead(warpgroup, "wait_for", lambda original, *_: warpgroup.wait(1)),
    "strides of a descriptor": instead(
        warpgroup, "descriptor", lambda original, first, leading, stride: original(first, stride, leading)
    ),
    "start of a descriptor": instead(warpgroup, "descriptor", wrong_start),
    "a wait for the other phase": instead(
        bulk, "wait", lambda original, barrier, phase: original(barrier, 1 - phase)
    ),
}


@pytest.mark.parametrize(
    "what", [pytest.param(c, marks=[] if "strides" in c else [pytest.mark.slow]) for c in CHANGED]
)
def test_a_change_does_not_pass(what: str) -> None:
    with pytest.raises((AssertionError, SimulationError)):
        run(CHANGED[what])


def test_the_linear_kernel_takes_it_above_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[WarpgroupTile] = []
    monkeypatch.setattr(warpgroup_gemm, "gemm", lambda ops, caps, tile: seen.append(tile))
    cfg = LinearConfig(64, 64, "bfloat16", "bfloat16", "bfloat16")
    linear(cfg, gpu("sm_90a"))
    assert seen == [warpgroup_gemm.WIDE, warpgroup_gemm.NARROW]
    for other in (
        replace(cfg, k=72),
        replace(cfg, n=60),
        replace(cfg, in_dtype="float32", weight_dtype="float32"),
    ):
        assert not warpgroup_gemm.takes(other, gpu("sm_90a"))
    assert not warpgroup_gemm.takes(cfg, gpu("sm_90")) and not warpgroup_gemm.takes(cfg, gpu("sm_90,sm_90a"))


def test_a_tile_that_cannot_be() -> None:
    for wrong in ((48, 4), (320, 4), (64, 3)):
        with pytest.raises(ValueError, match="not a tile"):
            WarpgroupTile(*wrong)
    with pytest.raises(ValueError, match="65536 registers"):
        WarpgroupTile(64, 4, 2, 40, 240)
