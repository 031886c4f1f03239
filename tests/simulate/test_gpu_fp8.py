"""Kernels with e4m3 weights and e4m3 activations in the simulator against the rounded operands in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.caps import Capabilities, Fp8Mma
from llmc.quant.schemes import by_name
from llmc.schedules import emit as e
from llmc.schedules.gpu import qfloat, qgemm, warpgroup_qgemm
from llmc.schedules.gpu import warpgroup as wg
from llmc.schedules.gpu.experts import quant_expert_linear
from llmc.schedules.gpu.qgemv import gemv
from llmc.schedules.gpu.qlinear import quant_linear
from llmc.schedules.gpu.qoperands import QuantOperands
from llmc.schedules.qexperts import QuantExpertConfig
from llmc.schedules.qlayout import in_turns, quant_layout
from llmc.schedules.qlinear import QuantLinearConfig
from llmc.simulate import SimulationError, intrinsics, warpgroup
from tests.quant.random_weight import random_weight
from tests.quant.rounded_rows import e4m3_rows
from tests.simulate.gpu import SimulatedTools, gpu
from tests.simulate.test_gpu_quant import check
from tests.simulate.test_sort_experts import plan_of

TOOLS = SimulatedTools()
GROUPS = replace(gpu("sm_90a"), multiprocessors=2)  # each block of threads has several tiles


def run(caps: Capabilities, cfg: QuantLinearConfig, func: Any, rows: tuple[int, ...]) -> None:
    """A kernel with random weights and rows of several sizes."""
    scheme, n, k = cfg.layout.of, cfg.n, cfg.layout.k
    rng, kernel = np.random.default_rng(1), TOOLS.build(caps, k=func)["k"]
    weight = random_weight(scheme.name, 2 * n if cfg.gated else n, k)
    packed = TOOLS.tensor(cfg.layout.pack(in_turns(weight, cfg.layout.n_block) if cfg.gated else weight))
    bias = TOOLS.random(rng, (n,), cfg.in_dtype)
    for count in rows:
        x = TOOLS.random(rng, (count, k), cfg.in_dtype)
        x[0], x[:, : k // 2] = 0, x[:, : k // 2] / 50
        residual = TOOLS.random(rng, (count, n), cfg.in_dtype)
        extra = [bias] * cfg.has_bias + [residual] * cfg.has_residual
        y = TOOLS.tensor(np.full((count, n), np.nan, np.float32))
        kernel(TOOLS.tensor(x), packed, *map(TOOLS.tensor, extra), y)
        sums = e4m3_rows(x, scheme) @ weight.dequantize().astype(np.float64).T
        sums = sums + bias.astype(np.float64) if cfg.has_bias else sums
        sums = np.maximum(sums[:, :n], 0) * sums[:, n:] if cfg.gated else sums
        check(y.numpy(), sums + (residual.astype(np.float64) if cfg.has_residual else 0))


def config(scheme: str, n: int, k: int, dtype: str, caps: Capabilities, **options: Any) -> QuantLinearConfig:
    layout = quant_layout(by_name(scheme), n, k, caps, gated=options.get("gated", False))
    return QuantLinearConfig(n, layout, dtype, "float32", **options)


slow = pytest.mark.slow


# fp8 units, e4m3 numbers as bfloat16, the instruction without units, plain arithmetic; columns that fill no step or group
FAST = (("sm_89", "fp8a8"), ("sm_80", "fp8a8g128"))
SHAPES = {"fp8a8": (320, "bfloat16"), "fp8a8g128": (300, "bfloat16"), "fp8a8-": (67, "float32")}


@pytest.mark.parametrize(
    ("preset", "case"),
    [
        pytest.param(p, c, marks=[] if (p, c) in FAST else [slow])
        for p in ("sm_89", "sm_80", "sm_90", "sm_75")
        for c in SHAPES
    ],
)
def test_linear(preset: str, case: str) -> None:
    (k, dtype), caps = SHAPES[case], gpu(preset)
    cfg = config(case.removesuffix("-"), 70, k, dtype, caps, has_bias=True)
    run(caps, cfg, quant_linear(cfg, caps), (1, 37))


@slow
@pytest.mark.parametrize("scheme", ["fp8a8", "fp8a8g128"])
def test_plain_arithmetic_on_codes(scheme: str) -> None:
    """What the tuner may choose for few rows where there are matrix units too."""
    caps = gpu("sm_89")
    cfg = config(scheme, 40, 300, "bfloat16", caps)
    built: list[Any] = []
    with e.kernel(built):
        ops = QuantOperands(cfg, e.dim("T"))
        with e.root():
            ops.view()
            qfloat.quantize_rows(ops, caps)
            gemv(ops, caps, 2, 4)
    run(caps, cfg, built[0], (1, 3))


@pytest.mark.parametrize(
    ("scheme", "preset"),
    [
        ("fp8a8g128", "sm_89"),
        *(
            pytest.param(s, p, marks=slow)
            for s, p in (("fp8a8", "sm_89"), ("fp8a8", "sm_90"), ("fp8a8", "sm_80"), ("fp8a8", "sm_75"))
        ),
    ],
)
def test_experts(scheme: str, preset: str) -> None:
    experts, n, k, caps, rng = 5, 40, 200, gpu(preset), np.random.default_rng(4)
    layout = quant_layout(by_name(scheme), n, k, caps)
    cfg = QuantExpertConfig(experts, layout, "bfloat16", "float32", "int64", True)
    weight, kernel = (
        random_weight(scheme, experts, n, k),
        TOOLS.build(caps, k=quant_expert_linear(cfg, caps))["k"],
    )
    b = TOOLS.random(rng, (experts, n), "bfloat16")
    for rows in (1, 90):  # a few, and so many that tiles are larger
        x = TOOLS.random(rng, (rows, k), "bfloat16")
        ids = rng.integers(0, experts - 1, rows)  # the last one stays without rows
        y = TOOLS.tensor(np.full((rows, n), np.nan, np.float32))
        kernel(*map(TOOLS.tensor, (x, plan_of(ids, experts), layout.pack(weight), b)), y)
        expected = np.einsum(
            "rk,rnk->rn", e4m3_rows(x, by_name(scheme)), weight.dequantize().astype(np.float64)[ids]
        )
        check(y.numpy(), expected + b.astype(np.float64)[ids])


def only(cfg: QuantLinearConfig) -> Any:
    """The kernel for warpgroups by itself, for any number of rows."""
    built: list[Any] = []
    with e.kernel(built):
        ops = QuantOperands(cfg, e.dim("T"))
        with e.root():
            ops.view()
            qfloat.quantize_rows(ops, GROUPS)
            assert warpgroup_qgemm.takes(ops, GROUPS)
            warpgroup_qgemm.gemm(ops, GROUPS)
    return built[0]


# what does not fill tiles; a last stage of half its columns
@pytest.mark.parametrize(
    ("scheme", "k", "options"),
    [
        ("fp8a8", 320, {}),
        pytest.param("fp8a8g128", 200, {"gated": True, "activation": "relu"}, marks=slow),
        pytest.param("fp8a8", 256, {"gated": True, "activation": "relu"}, marks=slow),
        pytest.param("fp8a8g128", 384, {"has_residual": True, "has_bias": True}, marks=slow),
    ],
)
def test_warpgroups(scheme: str, k: int, options: dict[str, Any]) -> None:
    cfg = config(scheme, 136, k, "bfloat16", GROUPS, **options)
    run(GROUPS, cfg, only(cfg), (150,))


# what is replaced, and by what; the simulator says so, or numbers are wrong
CHANGED: dict[str, tuple[str, Any]] = {
    "sums are read early": ("wait_for", lambda original, *_: wg.wait(1)),
    "strides of a descriptor": (
        "descriptor",
        lambda original, first, leading, stride: original(first, stride, leading),
    ),
    "a product without a fence": ("fence", lambda original: None),
}


@pytest.mark.parametrize("what", CHANGED)
@slow
def test_a_change_does_not_pass(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, word = CHANGED[what]
    original = getattr(wg, name)
    monkeypatch.setattr(wg, name, lambda *args: word(original, *args))
    cfg = config("fp8a8", 64, 384, "bfloat16", GROUPS)
    with pytest.raises((AssertionError, SimulationError)):
        run(GROUPS, cfg, only(cfg), (130,))


# -- matrix units that add with few bits -------------------------------------------------------------------------------------


def few_bits(old: np.ndarray, product: np.ndarray) -> np.ndarray:
    """The sum with 13 bits of mantissa, cut off."""
    bits = np.ascontiguousarray(old + product, np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFFC00)).view(np.float32)


def relative_error(rows: int, caps: Capabilities, func: Any, cfg: QuantLinearConfig) -> float:
    """Against float64, root mean square, of numbers that are all positive, whose sums grow."""
    weight, rng = random_weight(cfg.layout.scheme, cfg.n, cfg.layout.k), np.random.default_rng(5)
    weight = replace(weight, codes=weight.codes & 0x7F)
    x = np.abs(TOOLS.random(rng, (rows, cfg.layout.k), "bfloat16"))
    y = TOOLS.tensor(np.full((rows, cfg.n), np.nan, np.float32))
    TOOLS.build(caps, k=func)["k"](TOOLS.tensor(x), TOOLS.tensor(cfg.layout.pack(weight)), y)
    exact = e4m3_rows(x, cfg.layout.of) @ weight.dequantize().astype(np.float64).T
    return float(np.sqrt(((y.numpy() - exact) ** 2).mean() / (exact**2).mean()))


def test_sums_leave_the_matrix_units_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With units of 14 bits the error is that of four sums of 32 products, and does not grow with the columns."""
    monkeypatch.setitem(
        intrinsics.FUNCTIONS,
        "llmc_mma_e4m3",
        lambda m, *a: intrinsics.mma(m, ml_dtypes.float8_e4m3fn, *a, add=few_bits),
    )
    caps = gpu("sm_89")
    errors = {}
    for k in (128, 1024):
        cfg = config("fp8a8", 32, k, "bfloat16", caps)
        errors[k] = relative_error(16, caps, quant_linear(cfg, caps), cfg)
    assert 1e-5 < errors[128] < 2.0**-12 and errors[1024] < 1.2 * errors[128]
    monkeypatch.setattr(qfloat, "PROMOTED", 1024)
    monkeypatch.setattr(qgemm, "_AHEAD", 128)
    layout = type(cfg.layout)
    monkeypatch.setattr(layout, "piece", property(lambda self: 1024))
    assert relative_error(16, caps, quant_linear(cfg, caps), cfg) > 3 * errors[128]


@slow
def test_sums_of_warpgroups_leave_the_matrix_units_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warpgroup, "added", few_bits)
    errors = []
    for k in (128, 1024):
        cfg = config("fp8a8", 64, k, "bfloat16", GROUPS)
        errors.append(relative_error(64, GROUPS, only(cfg), cfg))
    assert 1e-5 < errors[0] < 2.0**-12 and errors[1] < 1.2 * errors[0]


def test_which_machines_have_which_products() -> None:
    found = {
        p: gpu(p).fp8_mma for p in ("sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120", "sm_80,sm_120")
    }
    assert found == {
        "sm_86": Fp8Mma.NONE,
        "sm_89": Fp8Mma.UNITS,
        "sm_90": Fp8Mma.EXPANDED,
        "sm_90a": Fp8Mma.EXPANDED,
        "sm_100": Fp8Mma.EXPANDED,
        "sm_120": Fp8Mma.UNITS,
        "sm_80,sm_120": Fp8Mma.NONE,
    }
