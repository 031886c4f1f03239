"""Prefill attention on warpgroups' matrix units: numbers in the simulator, the need of every wait and fence, registers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.schedules.attention_config import AttentionConfig
from llmc.schedules.gpu import bulk, flash_group
from llmc.schedules.gpu import emit as g
from llmc.schedules.gpu import matrix_unit as unit
from llmc.schedules.gpu import warpgroup as wg
from llmc.schedules.gpu.attention import attention_prefill
from llmc.schedules.gpu.rope import kv_append
from llmc.simulate import SimulationError
from llmc.targets.cuda.backend import tvm_target
from llmc.targets.cuda.build import build_kernels
from tests.schedules.test_attention import Cache, run
from tests.simulate.gpu import DTYPES, SimulatedTools, gpu
from tests.simulate.test_gpu_attention import BF16, CASES, config
from tests.targets.test_cuda import needs_compiler

TOOLS = SimulatedTools()
CAPS = gpu("sm_90a")
FEW = ([(5, 5), (70, 170)],)
MANY = ([(5, 5), (1, 33), (140, 170)], [(3, 300)])
EACH = [
    pytest.param("bf16-sinks", FEW, id="bf16-sinks"),
    *(pytest.param(name, MANY, id=name, marks=pytest.mark.slow) for name in CASES if name != "bf16-sinks"),
]


@pytest.mark.parametrize(("case", "batches"), EACH)
def test_against_numpy(case: str, batches: Any) -> None:
    cfg = config(**CASES[case])
    assert flash_group.shape(cfg, CAPS) is not None
    kernels = TOOLS.build(CAPS, append=kv_append(cfg, CAPS), prefill=attention_prefill(cfg, CAPS))
    for batch in batches:
        assert run(cfg, TOOLS, kernels, batch, decode=False) < TOOLS.exact[cfg.dtype] * 2, batch


def test_what_the_kernel_is_not_made_for() -> None:
    wide = config(**BF16, key_dim=272, value_dim=128)
    for cfg, caps in ((config(**BF16), gpu("sm_90")), (config(), CAPS), (wide, CAPS)):
        assert flash_group.shape(cfg, caps) is None


def attend() -> np.ndarray:
    """One token with 500 keys: each stage is used twice."""
    cfg = config(**BF16)
    cache = Cache(cfg, TOOLS, [(1, 500)], np.random.default_rng(0))
    for pool in (cache.k_pool, cache.v_pool):
        pool.array[...] = 1
    kernel = TOOLS.build(CAPS, k=attention_prefill(cfg, CAPS))["k"]
    q = TOOLS.tensor(np.ones((1, cfg.heads, 1, cfg.key_dim), DTYPES[cfg.dtype]))
    out = TOOLS.tensor(np.zeros((1, 1, cfg.heads, cfg.value_dim), DTYPES[cfg.dtype]))
    tables = (np.array([0, 1], np.int32), np.array([500], np.int32), cache.table)
    kernel(q, cache.k_pool, cache.v_pool, *map(TOOLS.tensor, tables), 0, out)
    found: np.ndarray = out.numpy().astype(np.float32)
    return found


# words that order things, and which uses of each are looked at; the first fence is the writers' own of the queries, and
# that of the warps that fetch, which have met the writers, would do for them
WORDS: list[tuple[Any, str, tuple[int, ...]]] = [
    (g, "barrier", (0,)),
    (g, "warp_barrier", (0,)),
    (bulk, "wait", (0, 1)),
    (bulk, "async_fence", (1,)),
    (unit, "wait", (0, 1)),
    (wg, "fence", (0, 1)),
    (wg, "wait_for", (0, 1)),
]
DEFAULT = (("wait_for", 1), ("async_fence", 1))
ORDER = [
    pytest.param(module, name, i, id=f"{name}-{i}", marks=[] if (name, i) in DEFAULT else [pytest.mark.slow])
    for module, name, uses in WORDS
    for i in uses
]


@pytest.mark.parametrize(("module", "name", "number"), ORDER)
def test_what_orders_is_needed(module: Any, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it there is a race, a deadlock, or a NaN that nobody waited for."""
    seen: list[int] = []
    original = getattr(module, name)

    def word(*args: Any) -> None:
        if len(seen) != number:
            original(*args)
        seen.append(0)

    monkeypatch.setattr(module, name, word)
    try:
        assert not np.isfinite(attend()).all()
    except SimulationError as error:
        assert "simulate-race" in str(error) or "simulate-deadlock" in str(error), error
    assert len(seen) > number


def test_the_kernel_is_right_with_all_of_them() -> None:
    assert (attend() == 1).all()


@needs_compiler
@pytest.mark.parametrize(
    "dim", [128, *(pytest.param(d, marks=pytest.mark.slow) for d in (64, 80, 96, 192, 256))]
)
def test_no_spills(dim: int) -> None:
    cfg = AttentionConfig(32, 8, dim, dim, "bfloat16", "bfloat16", 32, 32, 0.1, token_major=True)
    _, _, kernels = build_kernels({"prefill": attention_prefill(cfg, CAPS)}, tvm_target(CAPS), ("sm_90a",))
    assert not [k for k in kernels if k.spill_bytes or k.stack_bytes], kernels
    cut = flash_group.shape(cfg, CAPS)
    assert cut is not None and kernels[0].shared_bytes == cut.shared_bytes(cfg)
